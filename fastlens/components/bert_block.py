"""`BertBlock`: attention and MLP, each normalised together with the stream it is added to."""

from typing import Any

import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.attention import Attention
from fastlens.components.block import check_supported, spread_over_heads
from fastlens.components.mlp import make_mlp
from fastlens.components.norms import LayerNorm
from fastlens.config import HookedTransformerConfig
from fastlens.hooks.point import HookPoint


class BertBlock(nn.Module):
    """``m = LN1(x + attention(x))``, then ``LN2(m + MLP(m))``: norms stand behind the sums.

    So ``hook_resid_mid`` and ``hook_resid_post`` are sums before their norms, and what the next
    block reads is ``hook_normalized_resid_post``.
    """

    AXES = {
        "hook_q_input": "batch pos head d_model",
        "hook_k_input": "batch pos head d_model",
        "hook_v_input": "batch pos head d_model",
        "hook_attn_out": "batch pos d_model",
        "hook_mlp_in": "batch pos d_model",
        "hook_mlp_out": "batch pos d_model",
        "hook_resid_pre": "batch pos d_model",
        "hook_resid_mid": "batch pos d_model",
        "hook_resid_post": "batch pos d_model",
        "hook_normalized_resid_post": "batch pos d_model",
    }

    hook_q_input: HookPoint
    hook_k_input: HookPoint
    hook_v_input: HookPoint
    hook_attn_out: HookPoint
    hook_mlp_in: HookPoint
    hook_mlp_out: HookPoint
    hook_resid_pre: HookPoint
    hook_resid_mid: HookPoint
    hook_resid_post: HookPoint
    hook_normalized_resid_post: HookPoint

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        check_supported(cfg)
        self.attn = Attention(cfg)
        self.ln1 = LayerNorm(cfg)
        self.mlp = make_mlp(cfg)
        self.ln2 = LayerNorm(cfg)
        for name, axes in self.AXES.items():
            setattr(self, name, HookPoint(axes))

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        additive_attention_mask: Float[Tensor, "batch 1 1 pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The normalised stream after this block.

        Args:
            additive_attention_mask: Added to the scores (minus infinity for padding).
            attention_mask: 0 for padding.
        """
        resid_pre = self.hook_resid_pre(resid_pre)
        query_input = key_input = value_input = resid_pre
        if self.cfg.use_split_qkv_input:
            heads = self.cfg.n_heads
            query_input = spread_over_heads(resid_pre, heads, self.hook_q_input)
            key_input = spread_over_heads(resid_pre, heads, self.hook_k_input)
            value_input = spread_over_heads(resid_pre, heads, self.hook_v_input)
        attn_out = self.attn(
            query_input,
            key_input,
            value_input,
            additive_attention_mask=additive_attention_mask,
            attention_mask=attention_mask,
        )
        resid_mid = self.hook_resid_mid(resid_pre + self.hook_attn_out(attn_out))
        if self.cfg.use_hook_mlp_in:
            # A clone: a hook that edits it in place must not edit what is cached as resid_mid.
            resid_mid = self.hook_mlp_in(resid_mid.clone())
        normalized = self.ln1(resid_mid)
        mlp_out = self.hook_mlp_out(self.mlp(normalized))
        resid_post = self.hook_resid_post(normalized + mlp_out)
        return self.hook_normalized_resid_post(self.ln2(resid_post))
