"""Qwen 3 with mixtures of experts."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.qwen3_moe import FAMILY
from fastlens.weights.source import open_source
from tests.weights.families.mixtures import MIXTURE, MixtureTests
from tests.weights.families.tiny import YARN, random_model

QWEN3_MOE = {**MIXTURE, "head_dim": 12, "num_experts": 6, "moe_intermediate_size": 20}


class TestQwen3Moe(MixtureTests):
    family = FAMILY
    cases = {
        "grouped": {**QWEN3_MOE, "norm_topk_prob": True},
        "full": {**QWEN3_MOE, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "single": {**QWEN3_MOE, "num_key_value_heads": 1, "rope_parameters": YARN},
        "windows": {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 4,
                    "attention_bias": True},
    }  # fmt: skip


def test_what_a_short_config_leaves_to_the_defaults():
    fields = FAMILY.config_fields({"architectures": ["Qwen3MoeForCausalLM"]})
    assert (fields["n_key_value_heads"], fields["n_ctx"], fields["d_head"]) == (4, 32768, 64)
    assert (fields["num_experts"], fields["experts_per_token"], fields["d_mlp"]) == (128, 8, 768)


def test_both_names_of_the_number_of_experts_are_read():
    for name in ("num_experts", "num_local_experts"):
        assert FAMILY.config_fields({name: 16})["num_experts"] == 16


@pytest.mark.parametrize(("name", "value"), [("mlp_only_layers", [0]), ("decoder_sparse_step", 2)])
def test_layers_without_a_mixture_are_refused(name, value):
    theirs = random_model(TestQwen3Moe, "grouped")
    setattr(theirs.config, name, value)
    with pytest.raises(ConfigError, match=f"does not account for .*{name}="):
        open_source("x", hf_model=theirs)
