"""TransformerLens' tables of names: ours have all of them but the speech models, and more."""

import pytest

from fastlens.compat.supported_models import (
    DEFAULT_MODEL_ALIASES,
    MODEL_ALIASES,
    OFFICIAL_MODEL_NAMES,
)
from fastlens.weights.family import FAMILIES
from fastlens.weights.names import AUDIO, SMOLLM2, TOY, repository_of


def test_every_name_leads_to_its_model():
    assert len(set(OFFICIAL_MODEL_NAMES)) == len(OFFICIAL_MODEL_NAMES) == len(DEFAULT_MODEL_ALIASES)
    assert set(MODEL_ALIASES) <= set(OFFICIAL_MODEL_NAMES)
    known = set().union(*(family.hub_names() for family in FAMILIES))
    assert known | {TOY, SMOLLM2[0]} == set(OFFICIAL_MODEL_NAMES)
    for official, aliases in MODEL_ALIASES.items():
        assert {repository_of(alias) for alias in aliases} == {official}
    for official, short in zip(OFFICIAL_MODEL_NAMES, DEFAULT_MODEL_ALIASES, strict=True):
        assert repository_of(short) == official


@pytest.mark.tl
def test_they_agree_with_transformerlens():
    tl = pytest.importorskip("transformer_lens.supported_models")
    loading = pytest.importorskip("transformer_lens.loading_from_pretrained")
    assert set(tl.OFFICIAL_MODEL_NAMES) - set(OFFICIAL_MODEL_NAMES) <= set(AUDIO)
    for alias, official in loading.make_model_alias_map().items():
        if official not in AUDIO:
            assert repository_of(alias) == official
    for official, aliases in tl.MODEL_ALIASES.items():
        ours = {alias.lower() for alias in MODEL_ALIASES.get(official, ())} | {official.lower()}
        assert official in AUDIO or {alias.lower() for alias in aliases} <= ours, official
