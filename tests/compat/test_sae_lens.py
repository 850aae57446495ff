"""SAELens, unchanged, with fastlens for its TransformerLens."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fastlens import HookedTransformer
from tests.compat.test_programs import differences, printed

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.tl,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("sae_lens") is None, reason="needs sae-lens (the peers extra)"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The toy model's tokenizer."""
    place = tmp_path_factory.mktemp("sae_lens")
    model = HookedTransformer.from_pretrained("toy-induction", verbose=False)
    model.tokenizer.save_pretrained(place)
    return place


def named(lines: list[Any]) -> dict[str, Any]:
    """What a program reports; other lines are SAELens' own."""
    return {line["name"]: line["value"] for line in lines if isinstance(line, dict)}


def test_a_program_of_sae_lens_finds_the_same(folder):
    ours = named(
        printed("-m", "fastlens.compat", HERE / "sae_lens_program.py", folder),
    )
    theirs = named(printed(HERE / "sae_lens_program.py", folder))
    assert list(ours) == list(theirs) and len(ours) > 50
    assert ours["kind"] == ["HookedSAETransformer", "HookedTransformer", "HookedRootModule"]
    assert not differences(ours, theirs, "sae_lens")
    # With the error term a spliced autoencoder changes no logit.
    unchanged = {name: value for name, value in ours.items() if name.endswith("change nothing")}
    unchanged |= {name: value for name, value in ours.items() if name.endswith("changes nothing")}
    assert len(unchanged) == 7 and all(unchanged.values())
    assert "blocks.1.hook_resid_pre.hook_sae_acts_post" in ours["blocks.1.hook_resid_pre places"]
    assert ours["attached at the end"] == [] and ours["as before"]


@pytest.mark.full
def test_feature_patching_is_sae_lens_own_hooked_forward():
    found = named(printed("-m", "fastlens.compat", HERE / "sae_lens_codes_program.py"))
    refused = {name: found.pop(name) for name in ("batch top-k", "transcoder", "normalized")}
    assert len(found) == 10
    for name, one in found.items():
        assert one["difference"] < 1e-9 and one["certified"] < 1e-9, (name, one)
        assert one["spread"] > 1e-3, name
        is_matrix = "norm" not in name
        assert ("by one matrix" in one["said"]) == is_matrix, (name, one["said"])
    assert "other codes beside other rows" in refused["batch top-k"]
    assert "a transcoder" in refused["transcoder"]
    assert "ln2.hook_normalized" in refused["normalized"]
