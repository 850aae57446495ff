"""Attention's own steps and leaves; its numbers are judged in tests/model."""

import pytest
import torch

from fastlens import TransformerLensKeyValueCache
from fastlens.components.attention import Attention, GroupedQueryAttention
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from tests.close import assert_close_to
from tests.configs import tiny
from tests.models import ours, prompts


def build(name="gpt2", cls=Attention, attn_type="global", layer_id=0, **changes):
    attn = cls(HookedTransformerConfig(**tiny(name, **changes)), attn_type, layer_id)
    for leaf in attn.parameters():
        leaf.data.copy_(torch.randn(leaf.shape) * 0.3)
    return attn


def test_leaves_have_transformer_lens_names_shapes_and_order():
    attn = build()
    assert list(attn._parameters) == ["W_Q", "W_O", "b_Q", "b_O", "W_K", "W_V", "b_K", "b_V"]
    assert attn.W_Q.shape == (4, 32, 8) and attn.W_O.shape == (4, 8, 32)
    grouped = build("llama", GroupedQueryAttention)
    assert list(grouped._parameters) == ["W_Q", "W_O", "b_Q", "b_O", "_W_K", "_W_V", "_b_K", "_b_V"]
    assert grouped._W_K.shape == (2, 32, 8) and grouped.W_K.shape == (4, 32, 8)
    assert torch.equal(grouped.W_K[1], grouped._W_K[0]) and torch.equal(
        grouped.W_V[2], grouped._W_V[1]
    )


def test_assigning_a_grouped_weight_replaces_the_grouped_leaf():
    attn = build("llama", GroupedQueryAttention)
    attn.W_K = torch.nn.Parameter(torch.zeros(2, 32, 8))
    assert not attn._W_K.any() and "W_K" not in attn._parameters


def test_methods_compose_to_the_forward():
    attn, x = build("llama", GroupedQueryAttention), torch.randn(2, 6, 32)
    q, k, v = attn.calculate_qkv_matrices(x, x, x)
    q, k = attn.apply_rotary(q), attn.apply_rotary(k)
    scores = attn.apply_causal_mask(attn.calculate_attention_scores(q, k))
    z = attn.calculate_z_scores(v, scores.softmax(-1))
    out = torch.einsum("bphd,hdm->bpm", z, attn.W_O) + attn.b_O
    assert_close_to(attn(x, x, x), out)


def test_cross_inputs_are_three_products():
    attn = build("gpt2", attention_dir="bidirectional")
    q_in, kv_in = torch.randn(1, 3, 32), torch.randn(1, 5, 32)
    with torch.no_grad():
        assert attn(q_in, kv_in, kv_in).shape == (1, 3, 32)


def test_additive_masks_and_biases_enter_the_scores():
    attn, x, seen = build(), torch.randn(2, 4, 32), []
    attn.hook_attn_scores.add_hook(lambda s, hook: seen.append(s))
    mask = torch.zeros(2, 1, 1, 4)
    mask[0, ..., 1] = -7.0
    bias = torch.randn(1, 4, 4, 4)
    attn(x, x, x)
    attn(x, x, x, additive_attention_mask=mask, position_bias=bias)
    below = torch.ones(4, 4).tril().bool()
    assert_close_to((seen[1] - seen[0])[..., below], (mask + bias)[..., below], atol=1e-5)


def test_fused_only_while_nobody_looks():
    attn = build()
    assert attn.is_fused
    attn.hook_pattern.add_hook(lambda p, hook: None)
    assert not attn.is_fused

    class Mine(Attention):
        def calculate_z_scores(self, v, pattern):
            return super().calculate_z_scores(v, pattern)

    assert not build(cls=Mine).is_fused


def test_old_square_masks_and_other_table_lengths_load():
    attn = build("neox")
    state = attn.state_dict()
    state["mask"] = torch.ones(64, 64, dtype=torch.bool)
    state["rotary_sin"], state["rotary_cos"] = torch.zeros(7, 4), torch.zeros(7, 4)
    before = attn.rotary_cos.clone()
    attn.load_state_dict(state)
    assert torch.equal(attn.rotary_cos, before) and attn.mask.shape == (0, 0)


def test_bad_arguments():
    with pytest.raises(ConfigError, match="'global' or 'local'"):
        build(attn_type="sliding")
    with pytest.raises(ConfigError, match="window_size"):
        build(attn_type="local")
    with pytest.raises(ConfigError, match="layer_id"):
        build("inverse_layer_scale", layer_id=None)


def test_layers_without_rotary_keep_what_hooks_behind_write_to_apart():
    model = ours("llama", rotary_layers=[False, True, True], dtype=torch.float64)
    place = "blocks.0.attn.hook_rot_k"
    found = []
    for halve in (lambda k, hook: k * 0.5, lambda k, hook: k.mul_(0.5).sum() and None):
        past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
        with torch.no_grad(), model.hooks([(place, halve)]):
            _, cache = model.run_with_cache(prompts(2), past_kv_cache=past)
            logits = model(prompts(2, 2, 1), past_kv_cache=past)
        found.append((cache["blocks.0.attn.hook_k"], past[0].past_keys, logits))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_attention_pickled_before_there_were_sinks():
    for changes in ({}, {"use_attention_sinks": True}):
        attn = build(**changes)
        state = dict(attn.__dict__)
        if not changes:
            del state["sinks"]
        again = Attention.__new__(Attention)
        again.__setstate__(state)
        assert again.sinks is attn.sinks
