"""The config: TransformerLens' fields, defaults and derived values; contradictions refused."""

import dataclasses

import pytest
import torch

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from tests.configs import TINY_CONFIGS, tiny


@pytest.mark.tl
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_fields_defaults_and_derived_values_are_transformer_lens(name):
    tl = pytest.importorskip("transformer_lens")
    ours = HookedTransformerConfig(**tiny(name)).to_dict()
    theirs = tl.HookedTransformerConfig(**tiny(name)).to_dict()
    missing = set(theirs) - set(ours)
    assert not missing, missing
    for field, value in theirs.items():
        if field == "attn_scale" and not ours["use_attn_scale"]:
            continue  # unused there
        if field == "use_qk_norm" and ours["qk_norm_kind"] == "joined":
            continue  # TransformerLens knows this norm by the architecture's name
        if field == "use_qk_norm" and ours["qk_norm_kind"] == "joined":
            continue  # TransformerLens goes by the architecture's name alone
        assert ours[field] == pytest.approx(value), field


@pytest.mark.tl
def test_no_field_is_missing():
    tl = pytest.importorskip("transformer_lens")
    ours = {f.name for f in dataclasses.fields(HookedTransformerConfig)}
    assert {f.name for f in dataclasses.fields(tl.HookedTransformerConfig)} <= ours


def test_unwrap_from_dict_and_live_dict():
    cfg = HookedTransformerConfig.unwrap(tiny("gpt2"))
    assert HookedTransformerConfig.unwrap(cfg) is cfg
    cfg.to_dict()["use_attn_result"] = True
    assert cfg.use_attn_result
    assert "d_model" in repr(cfg) and not cfg.is_layer_norm_activation()


def test_a_seed_seeds_everything():
    HookedTransformerConfig(**tiny("gpt2", seed=5))
    first = torch.rand(1)
    HookedTransformerConfig(**tiny("gpt2", seed=5))
    assert torch.equal(torch.rand(1), first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_heads": -1, "d_head": 7}, "not a multiple"),
        ({"act_fn": "gelu_nwe"}, "Nearest: 'gelu_new'"),
        ({"normalization_type": "LayerNorm"}, "must be one of"),
        ({"positional_embedding_type": "rotray"}, "Nearest: 'rotary'"),
        ({"init_mode": "gpt3"}, "gpt2"),
        ({"attention_dir": "forward"}, "causal"),
        ({"n_key_value_heads": 3}, "n_key_value_heads=3"),
        ({"use_local_attn": True}, "window_size and attn_types"),
        ({"use_local_attn": True, "window_size": 4, "attn_types": ["local"]}, "1 entries for 3"),
        ({"num_experts": 2}, "go together"),
        ({"n_devices": 2}, "there are 0"),
        ({"n_devices": 0}, "at least 1"),
    ],
)
def test_contradictions_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        HookedTransformerConfig(**tiny("gpt2", **changes))


def test_an_unknown_field_has_near_names():
    with pytest.raises(ConfigError, match="no config field 'n_layer'.*'n_layers'"):
        HookedTransformerConfig.from_dict({**tiny("gpt2"), "n_layer": 3})
