"""One block of T5's encoder or decoder, with every hook."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from fastlens.components.block import ReadingBlock, check_supported
from fastlens.components.kv_cache import TransformerLensKeyValueCacheEntry
from fastlens.components.mlp import make_mlp
from fastlens.components.norms import RMSNorm
from fastlens.components.t5_attention import T5Attention
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, ShapeError
from fastlens.hooks.point import HookPoint


class T5Block(ReadingBlock):
    """``resid_pre -> attention -> resid_mid -> MLP -> resid_post``; a decoder's block reads the
    encoder's output in between: ``resid_mid -> cross-attention -> resid_mid_cross -> MLP``.

    RMS norms stand before each: ``ln1``, ``ln2`` and, in a decoder, ``ln3`` before the MLP.
    """

    AXES = {
        "hook_q_input": "batch pos head d_model",
        "hook_k_input": "batch pos head d_model",
        "hook_v_input": "batch pos head d_model",
        "hook_attn_in": "batch pos head d_model",
        "hook_attn_out": "batch pos d_model",
        "hook_cross_attn_in": "batch pos d_model",
        "hook_cross_attn_out": "batch pos d_model",
        "hook_resid_mid_cross": "batch pos d_model",
        "hook_mlp_in": "batch pos d_model",
        "hook_mlp_out": "batch pos d_model",
        "hook_resid_pre": "batch pos d_model",
        "hook_resid_mid": "batch pos d_model",
        "hook_resid_post": "batch pos d_model",
    }

    hook_attn_out: HookPoint
    hook_cross_attn_in: HookPoint
    hook_cross_attn_out: HookPoint
    hook_resid_mid_cross: HookPoint
    hook_mlp_out: HookPoint
    hook_resid_pre: HookPoint
    hook_resid_mid: HookPoint
    hook_resid_post: HookPoint

    def __init__(
        self, cfg: HookedTransformerConfig | dict[str, Any], block_index: int, is_decoder: bool
    ):
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        check_supported(cfg, is_t5=True)
        if cfg.n_key_value_heads not in (None, cfg.n_heads):
            raise ConfigError("T5's heads have keys and values of their own: no n_key_value_heads.")
        self.is_decoder = is_decoder
        self.ln1 = RMSNorm(cfg)
        self.attn = T5Attention(
            cfg, has_relative_attention_bias=block_index == 0, is_decoder=is_decoder
        )
        self.ln2 = RMSNorm(cfg)
        if is_decoder:
            self.cross_attn = T5Attention(cfg)
            # Whatever the encoder does: its positions and the decoder's are not in one order.
            self.cross_attn.is_causal = False
            self.ln3 = RMSNorm(cfg)
        self.mlp = make_mlp(cfg)
        for name, axes in self.AXES.items():
            if is_decoder or "cross" not in name:
                setattr(self, name, HookPoint(axes))

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        additive_attention_mask: Float[Tensor, "batch 1 1 all_pos"] | None = None,
        encoder_additive_attention_mask: Float[Tensor, "batch 1 1 encoder_pos"] | None = None,
        position_bias: Float[Tensor, "1 head pos all_pos"] | None = None,
        encoder_hidden_states: Float[Tensor, "batch encoder_pos d_model"] | None = None,
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
        cross_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block.

        Args:
            additive_attention_mask, encoder_additive_attention_mask: Added to the scores of this
                sequence and of the encoder's: a large negative number for padding.
            position_bias: The stack's `T5Attention.compute_relative_attention_bias`.
            encoder_hidden_states: The encoder's output after its final norm; decoders need it.
            past_kv_cache_entry: This layer's earlier keys and values.
            cross_kv_cache_entry: Keys and values of the encoder's output: filled if it is empty,
                else read.

        Raises: ShapeError for a decoder without ``encoder_hidden_states``.
        """
        resid_pre = self.hook_resid_pre(resid_pre)
        query_input, key_input, value_input = self._attention_inputs(resid_pre, None)
        attn_out = self.attn(
            query_input=query_input,
            key_input=key_input,
            value_input=value_input,
            past_kv_cache_entry=past_kv_cache_entry,
            additive_attention_mask=additive_attention_mask,
            position_bias=position_bias,
        )
        resid_mid = self.hook_resid_mid(resid_pre + self.hook_attn_out(attn_out))
        if not self.is_decoder:
            mlp_out = self.mlp(self.ln2(self._mlp_input(resid_mid)))
            return self.hook_resid_post(resid_mid + self.hook_mlp_out(mlp_out))
        if encoder_hidden_states is None:
            raise ShapeError(
                "a decoder's block reads the encoder's output. Pass encoder_hidden_states, "
                "[batch, encoder_pos, d_model]."
            )
        cross_in = resid_mid
        if self.cfg.use_attn_in:
            cross_in = self.hook_cross_attn_in(resid_mid.clone())
        if cross_kv_cache_entry is not None and cross_kv_cache_entry.past_keys.size(1):
            # All of them are in the cache: no position is left to be added.
            encoder_hidden_states = encoder_hidden_states[:, :0]
        cross_out = self.cross_attn(
            query_input=self.ln2(cross_in),
            key_input=encoder_hidden_states,
            value_input=encoder_hidden_states,
            past_kv_cache_entry=cross_kv_cache_entry,
            additive_attention_mask=encoder_additive_attention_mask,
        )
        resid = self.hook_resid_mid_cross(resid_mid + self.hook_cross_attn_out(cross_out))
        mlp_out = self.mlp(self.ln3(self._mlp_input(resid)))
        return self.hook_resid_post(resid + self.hook_mlp_out(mlp_out))
