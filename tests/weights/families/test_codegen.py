"""CodeGen: GPT-J with a fused projection in four slices, against transformers."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.codegen import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import edit_config
from tests.weights.families.generated import FamilyTests

TINY = {
    "vocab_size": 60, "n_positions": 64, "n_ctx": 64, "n_embd": 32, "n_layer": 3, "n_head": 4,
    "rotary_dim": 4,
}  # fmt: skip


class TestCodeGen(FamilyTests):
    family = FAMILY
    cases = {
        "plain": TINY,
        "two_heads_a_slice": {**TINY, "n_layer": 2, "n_head": 8, "n_inner": 40},
        "tied": {**TINY, "n_layer": 2, "tie_word_embeddings": True},
    }


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"n_head": 2}, "n_head=2 was found; .* multiple of 4"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_codegen.X"}}, "as CodeGen 2 does"),
    ],
)
def test_other_layouts_are_refused(changes, complaint, tmp_path):
    TestCodeGen.transformers_model("plain").save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=complaint):
        open_source(tmp_path)
