"""XGLM: computed positions and scaled embeddings, against transformers."""

from typing import Any

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.errors import ConfigError
from fastlens.weights.families.xglm import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import edit_config
from tests.weights.families.generated import FamilyTests

TINY = {
    "vocab_size": 60, "max_position_embeddings": 64, "d_model": 32, "ffn_dim": 40, "num_layers": 3,
    "attention_heads": 4,
}  # fmt: skip
SHORT = {**TINY, "num_layers": 2}


class TestXglm(FamilyTests):
    family = FAMILY
    cases = {
        "plain": TINY,
        "unscaled": {**SHORT, "scale_embedding": False, "activation_function": "relu"},
        "untied": {**SHORT, "tie_word_embeddings": False},
    }

    @classmethod
    def transformers_model(cls, case: str) -> Any:
        """Its least score is a number of the default dtype, which float64's does not fit into."""
        model = super().transformers_model(case)
        forward = model.forward

        def in_its_own_dtype(*args: Any, **kwargs: Any) -> Any:
            before = torch.get_default_dtype()
            torch.set_default_dtype(model.dtype)
            try:
                return forward(*args, **kwargs)
            finally:
                torch.set_default_dtype(before)

        model.forward = in_its_own_dtype
        return model


def test_positions_are_transformers_table_and_grow():
    theirs = TestXglm.transformers_model("plain")
    table = theirs.model.embed_positions.weights
    ours = HookedTransformer.from_pretrained_no_processing("x", hf_model=theirs, verbose=False)
    assert torch.equal(ours.W_pos, table[2:])
    more = HookedTransformer.from_pretrained_no_processing(
        "x", hf_model=theirs, n_ctx=100, dtype="bfloat16", verbose=False
    )
    assert more.W_pos.shape == (100, 32)
    assert torch.equal(more.W_pos[:64], table[2:].bfloat16())


def test_streamed_memory_counts_the_computed_table():
    source = open_source("x", hf_model=TestXglm.transformers_model("plain"))
    cfg = HookedTransformer.from_pretrained_no_processing(
        "x", hf_model=TestXglm.transformers_model("plain"), verbose=False
    ).cfg
    into = {"embed.W_E": torch.empty(60, 32), "pos_embed.W_pos": torch.empty(64, 32)}
    assert source.beside("embed", cfg, torch.float32, into) == 64 * 32 * 4
    assert source.beside("embed", cfg, torch.float32, into, without=["pos_embed.W_pos"]) == 0


def test_a_padding_id_that_would_blank_a_position_is_refused(tmp_path):
    TestXglm.transformers_model("plain").save_pretrained(tmp_path)
    edit_config(tmp_path, pad_token_id=5)
    with pytest.raises(ConfigError, match="position 3 a row of zeros"):
        open_source(tmp_path)
