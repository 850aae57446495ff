"""Falcon: its table against transformers."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.falcon import FAMILY
from tests.weights.families.generated import FamilyTests

TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64}  # fmt: skip
NEW = {**TINY, "new_decoder_architecture": True}


class TestFalcon(FamilyTests):
    family = FAMILY
    cases = {
        "7b": TINY,
        "40b": {**NEW, "num_kv_heads": 2},
        "falcon2": {**NEW, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 48,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 500042.0}},
        "every_head": {**TINY, "multi_query": False, "bias": True, "tie_word_embeddings": False},
    }  # fmt: skip


def test_names_of_the_first_release():
    fields = FAMILY.config_fields({"n_head": 71, "n_layer": 32, "n_embed": 4544, "alibi": False})
    assert (fields["n_heads"], fields["n_layers"], fields["d_head"]) == (71, 32, 64)
    assert (fields["n_key_value_heads"], fields["parallel_attn_mlp"]) == (1, True)


def test_alibi_and_sequential_blocks_are_refused():
    with pytest.raises(ConfigError, match=r"alibi=True \(Falcon-RW\).*bfloat16"):
        FAMILY.config_fields({"alibi": True, "parallel_attn": False})
    with pytest.raises(ConfigError, match="parallel_attn=False"):
        FAMILY.config_fields({"parallel_attn": False})
