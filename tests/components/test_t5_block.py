"""T5's block: places of encoder and decoder, flags, and the cache of cross-attention."""

import pytest
import torch

from fastlens.components.kv_cache import TransformerLensKeyValueCacheEntry
from fastlens.components.t5_block import T5Block
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, ShapeError
from fastlens.hooks.point import HookPoint
from tests.close import assert_close_to
from tests.t5 import CONFIG, randomise

COMPARED = ["transformer_lens.components.t5_block.T5Block.forward"]


def build(is_decoder=True, block_index=1, **changes):
    block = T5Block(HookedTransformerConfig(**{**CONFIG, **changes}), block_index, is_decoder)
    randomise(block)
    return block


def test_only_a_decoder_has_the_places_between():
    encoder, decoder = build(is_decoder=False), build()
    points = [
        {name for name, child in block.named_children() if isinstance(child, HookPoint)}
        for block in (encoder, decoder)
    ]
    assert points[1] - points[0] == {
        "hook_cross_attn_in", "hook_cross_attn_out", "hook_resid_mid_cross",
    }  # fmt: skip
    assert not points[0] - points[1]
    assert hasattr(decoder, "ln3") and not hasattr(encoder, "ln3")


def test_only_the_first_layer_holds_a_bias():
    assert hasattr(build(block_index=0).attn, "rel_pos_bias")
    assert not hasattr(build(block_index=1).attn, "rel_pos_bias")
    assert not hasattr(build(block_index=0).cross_attn, "rel_pos_bias")


def test_a_decoder_needs_the_encoder():
    with pytest.raises(ShapeError, match="encoder_hidden_states"):
        build()(torch.randn(1, 3, 16))


def test_cross_attention_sees_all_of_the_encoder_whatever_the_direction():
    block, x = build(attention_dir="causal"), torch.randn(1, 3, 16)
    encoded = torch.randn(1, 3, 16)
    changed = encoded.clone()
    changed[:, -1] += 1.0
    first = [block(x, encoder_hidden_states=e)[:, 0] for e in (encoded, changed)]
    assert (first[0] - first[1]).abs().max() > 1e-3


def test_cached_keys_and_values_of_the_encoder():
    block, x, encoded = build(), torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    mask = torch.zeros(2, 1, 1, 6)
    mask[0, ..., 4:] = torch.finfo(torch.float32).min
    past, cross = (
        TransformerLensKeyValueCacheEntry.init_cache_entry(block.cfg, "cpu", 2) for _ in range(2)
    )
    options = {"encoder_hidden_states": encoded, "encoder_additive_attention_mask": mask}
    with torch.no_grad():
        whole = block(x, **options)
        steps = [
            block(x[:, n : n + 1], past_kv_cache_entry=past, cross_kv_cache_entry=cross, **options)
            for n in range(5)
        ]
    assert cross.past_keys.shape[1] == 6 and past.past_keys.shape[1] == 5
    assert_close_to(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("flag", ["use_attn_in", "use_split_qkv_input", "use_hook_mlp_in",
                                  "use_attn_result"])  # fmt: skip
@pytest.mark.parametrize("is_decoder", [False, True])
def test_flags_change_no_number(flag, is_decoder):
    block, x, encoded = build(is_decoder), torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    before = block(x, encoder_hidden_states=encoded)
    setattr(block.cfg, flag, True)
    assert_close_to(block(x, encoder_hidden_states=encoded), before)


def test_the_mlps_input_is_not_the_stream():
    """An edit there changes what the MLP reads and nothing else."""
    block, x, encoded = build(use_hook_mlp_in=True), torch.randn(1, 3, 16), torch.randn(1, 4, 16)
    seen = {}
    for name in ("hook_resid_mid_cross", "hook_mlp_out"):
        point = getattr(block, name)
        point.add_hook(lambda x, hook, name=name: seen.update({name: x}))
    block.hook_mlp_in.add_hook(lambda x, hook: x.mul_(0))
    out = block(x, encoder_hidden_states=encoded)
    assert_close_to(out, seen["hook_resid_mid_cross"] + seen["hook_mlp_out"])


def test_what_it_cannot_compute_is_refused():
    with pytest.raises(ConfigError, match="n_key_value_heads"):
        build(n_key_value_heads=2)


@pytest.mark.tl
@pytest.mark.parametrize("is_decoder", [False, True])
def test_numbers_are_transformer_lens(is_decoder):
    tl = pytest.importorskip("transformer_lens")
    block = build(is_decoder)
    theirs = tl.components.T5Block(tl.HookedTransformerConfig(**CONFIG), 1, is_decoder)
    theirs.load_state_dict(block.state_dict())
    x, encoded = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    mask = torch.zeros(2, 1, 1, 6 if is_decoder else 5)
    mask[0, ..., 3:] = torch.finfo(torch.float32).min
    name = "encoder_additive_attention_mask" if is_decoder else "additive_attention_mask"
    options = {"encoder_hidden_states": encoded, name: mask}
    assert_close_to(block(x, **options), theirs(x, **options))
