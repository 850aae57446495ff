"""Rotary parameters: transformers' own frequencies for every kind that is accepted."""

import copy

import pytest
import torch

from fastlens.components.rotary_tables import rotary_tables
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.families.llama import heads_and_rotary
from fastlens.weights.rope import rotary_fields, rotary_fields_of_kinds
from tests.weights.checkpoints import hf_model


def fields(**rope) -> dict:
    return rotary_fields({"rope_parameters": rope}, d_head=8, n_ctx=64)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"attention_factor": 1.25},
        {"mscale": 0.7, "mscale_all_dim": 0.5},
        {"truncate": False},
        {"beta_fast": 4.0, "beta_slow": 2.0},
    ],
)
def test_yarn_tables_are_transformers(extra):
    config = copy.deepcopy(hf_model("llama_yarn").config)
    config.rope_parameters = {**config.rope_parameters, **extra}
    rotary = type(hf_model("llama_yarn").model.rotary_emb)(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(64)[None])
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=32, n_ctx=64, d_vocab=3, device="cpu",
        **heads_and_rotary(config.to_dict()),
    )  # fmt: skip
    our_sin, our_cos = rotary_tables(cfg, 64, torch.float32)
    torch.testing.assert_close(our_cos, cos[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(our_sin, sin[0], atol=1e-5, rtol=0)


def test_old_and_new_keys_agree():
    new = fields(rope_type="linear", factor=2, rope_theta=500)
    old = rotary_fields(
        {"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 2}}, d_head=8, n_ctx=64
    )
    assert new == old and new["rotary_scaling_factor"] == 2.0


def test_nothing_said_is_the_default():
    assert rotary_fields({}, 8, 64) == {
        "positional_embedding_type": "rotary",
        "rotary_base": 10000.0,
        "rotary_dim": 8,
        "rotary_adjacent_pairs": False,
    }
    assert rotary_fields({"rope_scaling": None, "rope_theta": 7.0}, 8, 64)["rotary_base"] == 7.0


def test_partial_rotation():
    assert rotary_fields({}, 8, 64, fraction=0.25)["rotary_dim"] == 2
    stated = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}
    assert rotary_fields(stated, 8, 64, fraction=0.25)["rotary_dim"] == 4
    with pytest.raises(ConfigError, match="rotates whole heads"):
        rotary_fields(stated, 8, 64)
    assert fields(rope_type="default", partial_rotary_factor=1.0)["rotary_dim"] == 8


def test_lengths_default_to_the_models():
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert fields(rope_type="llama3", **rope)["NTK_original_ctx_len"] == 64
    assert fields(rope_type="yarn", factor=2)["yarn_original_max_position_embeddings"] == 64
    stated = fields(rope_type="yarn", original_max_position_embeddings=16)
    assert stated["yarn_factor"] == 4.0


@pytest.mark.parametrize("kind", ["dynamic", "su", "proportional"])
def test_other_kinds_are_refused(kind):
    with pytest.raises(ConfigError, match=f"asks for rope_type='{kind}'. fastlens computes def"):
        fields(rope_type=kind, factor=2.0)


def test_incomplete_scaling_is_refused():
    with pytest.raises(ConfigError, match="'linear' needs factor"):
        fields(rope_type="linear")
    with pytest.raises(ConfigError, match="needs low_freq_factor, high_freq_factor"):
        fields(rope_type="llama3", factor=8.0)


def test_unknown_parameters_are_refused():
    with pytest.raises(ConfigError, match="not accounted for: finetuned, short_factor"):
        fields(rope_type="linear", factor=2, short_factor=[1], finetuned=True)
    with pytest.raises(ConfigError, match="full_attention"):
        fields(full_attention={"rope_type": "yarn"}, sliding_attention={})


KINDS = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize(
    "rope",
    [
        {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0},
         "sliding_attention": {"rope_type": "default", "rope_theta": 90.0}},
        {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}},
        {"full_attention": YARN, "sliding_attention": YARN},
        {"full_attention": {"rope_type": "default"}},
    ],
)  # fmt: skip
def test_tables_of_each_kind_of_layer_are_transformers(rope):
    import transformers
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    config = transformers.Gemma3TextConfig(
        layer_types=KINDS, head_dim=8, hidden_size=32, num_attention_heads=4,
        num_hidden_layers=2, max_position_embeddings=64, rope_parameters=copy.deepcopy(rope),
    )  # fmt: skip
    ours = rotary_fields_of_kinds(
        {"rope_parameters": rope}, 8, 64, KINDS, theta=1e6, local_theta=1e4
    )
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=32, d_head=8, n_ctx=64, d_vocab=3, device="cpu", **ours
    )
    for kind in KINDS:
        cos, sin = Gemma3RotaryEmbedding(config)(torch.zeros(1), torch.arange(64)[None], kind)
        is_local = kind == "sliding_attention"
        our_sin, our_cos = rotary_tables(cfg, 64, torch.float32, is_local=is_local)
        torch.testing.assert_close(our_cos, cos[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(our_sin, sin[0], atol=1e-5, rtol=0)


def test_one_base_where_windowed_layers_have_none():
    scaling = {key: value for key, value in YARN.items() if key != "rope_theta"}
    stated = {"rope_theta": 700.0, "rope_scaling": scaling}
    fields = rotary_fields_of_kinds(stated, 8, 64, KINDS, theta=5e5)
    assert fields["rotary_base"] == 700.0 and fields["yarn_global_attn_only"]
    assert "rotary_base_local" not in fields
    assert "yarn_global_attn_only" not in rotary_fields_of_kinds(
        stated, 8, 64, KINDS[1:], theta=5e5
    )


@pytest.mark.parametrize("kind", ["llama3", "longrope"])
def test_scalings_of_global_layers_alone_that_are_not_computed_are_refused(kind):
    full = {"rope_type": kind, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        full = {"rope_type": kind, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(ConfigError, match=f"rope_type='{kind}' was asked for global layers"):
        rotary_fields_of_kinds(
            {"rope_parameters": {"full_attention": full}}, 8, 64, KINDS, theta=1e4
        )
