"""Which parts a block has, and what it refuses."""

import pytest
import torch
import torch.nn as nn

from fastlens.components.attention import Attention, GroupedQueryAttention
from fastlens.components.block import TransformerBlock, check_supported, spread_over_heads
from fastlens.components.norms import LayerNormPre, RMSNorm
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from tests.configs import tiny


def build(name, index=0, **changes):
    return TransformerBlock(HookedTransformerConfig(**tiny(name, **changes)), index)


def test_parts_follow_the_config():
    assert type(build("gpt2").attn) is Attention
    assert type(build("llama").attn) is GroupedQueryAttention
    assert not hasattr(build("neox"), "hook_resid_mid")
    bare = build("attn_only")
    assert not hasattr(bare, "mlp") and not hasattr(bare, "ln2")
    assert [build("local", n).attn.attn_type for n in (0, 1)] == ["global", "local"]
    assert isinstance(build("no_norm").ln1, nn.Identity)


def test_norms_after_a_sublayer_keep_their_gain_when_folded():
    block = build("post_norm", normalization_type="RMSPre")
    assert type(block.ln1_post) is RMSNorm and type(block.ln2_post) is RMSNorm
    assert type(build("gpt2", normalization_type="LNPre").ln1) is LayerNormPre


def test_a_spread_stream_is_copied_only_under_a_hook():
    block, resid = build("gpt2", use_split_qkv_input=True), torch.randn(1, 3, 32)
    spread = spread_over_heads(resid, 4, block.hook_q_input)
    assert spread.shape == (1, 3, 4, 32) and spread.data_ptr() == resid.data_ptr()
    block.hook_q_input.add_hook(lambda a, hook: a.zero_())
    spread_over_heads(resid, 4, block.hook_q_input)
    assert resid.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load_in_4bit": True}, "4-bit"),
        ({"positional_embedding_type": "relative_positional_bias"}, "T5"),
        ({"norm_after_sublayer": True}, "norms on what sublayers write"),
        ({"use_normalization_before_and_after": True}, "norms on what sublayers write"),
        ({"use_attention_sinks": True, "attn_scores_soft_cap": 5.0}, "sinks with a soft-cap"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        check_supported(HookedTransformerConfig(**tiny("gpt2", **changes)))


def test_norms_stand_in_one_place():
    with pytest.raises(ConfigError, match="norm_after_sublayer together with"):
        build("gpt2", norm_after_sublayer=True, use_normalization_before_and_after=True)
