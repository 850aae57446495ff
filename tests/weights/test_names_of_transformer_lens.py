"""Every name of the installed TransformerLens leads to a family, and its config values agree."""

import contextlib
import logging
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ModelNameError
from fastlens.weights.family import FAMILIES, Family
from fastlens.weights.names import AUDIO, NOT_ON_THE_HUB, known_names, repository_of
from tests.weights.published_configs import ANY, DIFFERENT, PUBLISHED, published

pytestmark = pytest.mark.tl

supported = pytest.importorskip("transformer_lens.supported_models")
OFFICIAL: list[str] = list(supported.OFFICIAL_MODEL_NAMES)
ALIASES: dict[str, list[str]] = dict(supported.MODEL_ALIASES)


def family_of_name(official: str) -> Family:
    return next(family for family in FAMILIES if official in family.hub_names())


def test_there_are_as_many_as_there_were():
    assert len(OFFICIAL) >= 247 and sum(map(len, ALIASES.values())) >= 416


def test_every_name_and_alias_leads_to_a_family():
    hub = {name for family in FAMILIES for name in family.hub_names()}
    missing = []
    for official in OFFICIAL:
        for name in (official, *ALIASES.get(official, ())):
            if name in AUDIO:
                with pytest.raises(ModelNameError, match="encodes speech"):
                    repository_of(name)
            elif name.lower() not in {known.lower() for known in known_names()}:
                missing.append(name)
            elif repository_of(name) != official or official not in hub:
                missing.append(f"{name} -> {repository_of(name)}, not {official}")
    assert not missing, (len(missing), missing)


def test_speech_names_are_all_of_them():
    names = {n for o in OFFICIAL for n in (o, *ALIASES.get(o, ())) if "hubert" in o or "wav2" in o}
    assert names == set(AUDIO)


def test_what_is_not_on_the_hub():
    loading = pytest.importorskip("transformer_lens.loading_from_pretrained")
    assert list(NOT_ON_THE_HUB) == loading.NON_HF_HOSTED_MODEL_NAMES


# -- config values --------------------------------------------------------------------------------

# Attributes of their files that TransformerLens reads, and transformers 5 keeps elsewhere.
IN_FILES = {
    "GPT2LMHeadModel": {"n_ctx": 1024},
    "T5ForConditionalGeneration": {"n_positions": 512, "decoder_start_token_id": 0},
    "PhiForCausalLM": {"partial_rotary_factor": 0.5},
}


def transformers_config(official: str, family: Family) -> Any:
    """The config of a name as transformers reads it: published values, defaults for the rest."""
    import transformers

    stated = dict(published(official))
    config = getattr(transformers, family.config_class)(**stated)
    architecture = family.architectures[0]
    config.architectures = [architecture]
    for name, value in IN_FILES.get(architecture, {}).items():
        object.__setattr__(config, name, value)
    return config


@contextlib.contextmanager
def without_a_hub(config: Any):
    """TransformerLens' converter reads this config instead of asking the hub."""
    from transformer_lens import loading_from_pretrained as loading

    logging.disable(logging.WARNING)
    offline = SimpleNamespace(from_pretrained=lambda *_, **__: config)
    try:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(loading, "AutoConfig", offline)
            yield loading
    finally:
        logging.disable(logging.NOTSET)


def explained(official: str, architecture: str, field: str) -> bool:
    return any(
        field == of and (who in (ANY, architecture) or official.startswith(who))
        for who, of in DIFFERENT
    )


def by_transformers() -> list[str]:
    """Names whose config is transformers', one a published config and one more an architecture."""
    chosen: dict[Any, str] = {}
    for official in OFFICIAL:
        prefix = next((prefix for prefix in PUBLISHED if official.startswith(prefix)), None)
        family = next((f for f in FAMILIES if official in f.hub_names()), None)
        if official in AUDIO or (family and family.config_class == "PretrainedConfig"):
            continue  # No config of transformers; theirs are compared in the families' tests.
        chosen.setdefault(prefix or (family.name if family else official), official)
    return list(chosen.values())


@pytest.mark.parametrize("official", by_transformers())
def test_config_values(official):
    family = family_of_name(official)
    config = transformers_config(official, family)
    with without_a_hub(config) as loading:
        stated = loading.convert_hf_model_config(official)
        stated.setdefault("default_prepend_bos", True)
        theirs = loading.HookedTransformerConfig.from_dict({**stated, "device": "cpu"})
    ours = HookedTransformerConfig(
        **family.config_fields(config.to_dict()), device="cpu", dtype=torch.float32
    )
    different = {
        field: (getattr(ours, field), getattr(theirs, field))
        for field in stated
        if hasattr(ours, field)
        and field != "original_architecture"
        and getattr(ours, field) != getattr(theirs, field)
        and not explained(official, family.architectures[0], field)
    }
    if not theirs.use_local_attn:
        # A list that nothing reads, of global layers only.
        assert set(different.pop("attn_types", (None, ["global"]))[1]) == {"global"}
    if "n_ctx" in different:
        # Ours is the model's own; TransformerLens cuts it to keep its masks small.
        own, cut = different.pop("n_ctx")
        assert own > cut and own == config.get_text_config().max_position_embeddings
    assert not different, different


def test_default_bos_of_every_name():
    """Whose text starts with BOS by default; padding is on the tokenizer's own side in both."""
    different = {}
    for official in OFFICIAL:
        family = next((one for one in FAMILIES if official in one.hub_names()), None)
        if family is None or family.config_class == "PretrainedConfig":
            continue
        with without_a_hub(transformers_config(official, family)) as loading:
            theirs = loading.convert_hf_model_config(official).get("default_prepend_bos", True)
        explained_one = explained(official, family.architectures[0], "default_prepend_bos")
        if theirs != family.default_prepend_bos and not explained_one:
            different[official] = theirs
    assert not different, different
