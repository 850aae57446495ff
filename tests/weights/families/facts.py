"""What every family is held to, against transformers and TransformerLens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastlens.config import HookedTransformerConfig
from fastlens.weights.family import Family
from fastlens.weights.source import open_source
from tests.weights.checkpoints import hf_model, weights_of


def check_defaults(family: Family) -> None:
    """The defaults written in the table are those of transformers' config class."""
    import transformers

    defaults = getattr(transformers, family.config_class)().to_dict()
    assert {theirs: default for theirs, (_, default) in family.config.items()} == {
        theirs: defaults[theirs] for theirs in family.config
    }
    assert {name: defaults[name] for name in family.switches} == dict(family.switches)
    assert defaults["tie_word_embeddings"] == family.ties_by_default


def check_aliases(family: Family, *fragments: str) -> int:
    """Every name TransformerLens has for our repositories leads to the same one; their number."""
    pytest.importorskip("transformer_lens")
    from transformer_lens.loading_from_pretrained import make_model_alias_map

    ours = {alias.lower(): repository for alias, repository in family.aliases.items()}
    ours |= {repository.lower(): repository for repository in family.hub_names()}
    theirs = {
        alias: repository
        for alias, repository in make_model_alias_map().items()
        if repository in family.hub_names()
    }
    assert all(any(fragment in name for name in theirs) for fragment in fragments)
    assert {alias: ours.get(alias) for alias in theirs} == theirs
    return len(theirs)


def check_same_as_transformerlens(case: Any, convert: Callable[..., dict[str, Any]]) -> None:
    """Our tensors equal those of TransformerLens' converter; what it adds beyond is zero.

    ``case`` is transformers' model, or the name of a case of `hf_model`.
    """
    model = hf_model(case) if isinstance(case, str) else case
    source = open_source("x", hf_model=model)
    cfg = HookedTransformerConfig(**source.config_fields(), device="cpu")
    theirs = convert(model, cfg)
    for key, tensor in weights_of(source).items():
        assert torch.equal(tensor, theirs.pop(key)), key
    assert not any(tensor.count_nonzero() for tensor in theirs.values()), list(theirs)
