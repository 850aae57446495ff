"""TransformerLens' tables of names: ours are a part of its own, plus models it does not know."""

import pytest

from fastlens.compat.supported_models import (
    DEFAULT_MODEL_ALIASES,
    MODEL_ALIASES,
    OFFICIAL_MODEL_NAMES,
)
from fastlens.weights.family import FAMILIES
from fastlens.weights.names import SMOLLM2, TOY, repository_of

# Not in TransformerLens.
OURS_ALONE = ("HuggingFaceTB/SmolLM2", SMOLLM2[0], TOY)


def test_every_name_leads_to_its_model():
    assert len(set(OFFICIAL_MODEL_NAMES)) == len(OFFICIAL_MODEL_NAMES) == len(DEFAULT_MODEL_ALIASES)
    assert set(MODEL_ALIASES) <= set(OFFICIAL_MODEL_NAMES)
    known = set().union(*(family.hub_names() for family in FAMILIES))
    assert known <= set(OFFICIAL_MODEL_NAMES)
    for official, aliases in MODEL_ALIASES.items():
        assert {repository_of(alias) for alias in aliases} == {official}
    for official, short in zip(OFFICIAL_MODEL_NAMES, DEFAULT_MODEL_ALIASES, strict=True):
        assert repository_of(short) == official


@pytest.mark.tl
def test_they_agree_with_transformerlens():
    tl = pytest.importorskip("transformer_lens.supported_models")
    loading = pytest.importorskip("transformer_lens.loading_from_pretrained")
    shared = [name for name in OFFICIAL_MODEL_NAMES if name in tl.OFFICIAL_MODEL_NAMES]
    alone = [name for name in OFFICIAL_MODEL_NAMES if name not in tl.OFFICIAL_MODEL_NAMES]
    assert len(shared) > 80
    assert all(name.startswith(OURS_ALONE) for name in alone), alone
    theirs = loading.make_model_alias_map()
    for alias, official in theirs.items():
        if official in shared:
            assert repository_of(alias) == official
