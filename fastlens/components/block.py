"""One transformer block: attention and MLP around the residual stream, with every hook."""

from typing import Any

import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.attention import AbstractAttention, Attention, GroupedQueryAttention
from fastlens.components.kv_cache import TransformerLensKeyValueCacheEntry
from fastlens.components.latent_attention import LatentAttention
from fastlens.components.mlp import make_mlp
from fastlens.components.norms import make_norm, norm_before, norm_behind
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.hooks.point import HookPoint, is_live

_NOT_YET = {
    "load_in_4bit": "bitsandbytes 4-bit weights",
}


def check_supported(
    cfg: HookedTransformerConfig, is_t5: bool = False, places_norms: bool = False
) -> None:
    """Refuse what a config can say and this version cannot compute exactly.

    Args:
        is_t5: Whether a `T5Block` asks, which alone knows T5's relative position bias.
        places_norms: Whether the block that asks puts norms where the config says.
    """
    wanted = [meaning for field, meaning in _NOT_YET.items() if getattr(cfg, field)]
    if cfg.positional_embedding_type == "relative_positional_bias" and not is_t5:
        wanted.append("relative position bias (T5) in this class: use HookedEncoderDecoder")
    n_places = cfg.norm_after_sublayer + cfg.use_normalization_before_and_after
    if n_places > (1 if places_norms else 0):
        wanted.append(
            "norm_after_sublayer together with use_normalization_before_and_after"
            if places_norms
            else "norms on what sublayers write (norm_after_sublayer, "
            "use_normalization_before_and_after) in this class"
        )
    if cfg.use_attention_sinks and (cfg.attn_scores_soft_cap > 0 or is_t5):
        wanted.append("attention sinks with a soft-cap, or in T5")
    if wanted:
        raise ConfigError(f"this version of fastlens does not compute {', '.join(wanted)}.")


def attention_class(cfg: HookedTransformerConfig) -> type[AbstractAttention]:
    """The attention that the config asks for."""
    if cfg.d_kv_latent is not None:
        return LatentAttention
    return Attention if cfg.n_key_value_heads is None else GroupedQueryAttention


class ReadingBlock(nn.Module):
    """What a pre-norm block's attention and MLP read: copies per head, where flags ask for them."""

    cfg: HookedTransformerConfig
    ln1: nn.Module
    attn: AbstractAttention
    hook_attn_in: HookPoint
    hook_q_input: HookPoint
    hook_k_input: HookPoint
    hook_v_input: HookPoint
    hook_mlp_in: HookPoint

    def _read(self, name: str, x: Tensor) -> Tensor:
        """Through the norm before a sublayer, if there is one."""
        norm = norm_before(self.cfg, name)
        return x if norm is None else getattr(self, norm)(x)

    def _written(self, name: str, out: Tensor) -> Tensor:
        """Through the norm behind a sublayer, if there is one."""
        norm = norm_behind(self.cfg, name)
        return out if norm is None else getattr(self, norm)(out)

    def _mlp_input(self, resid: Tensor) -> Tensor:
        # A clone: a hook that edits it in place must not edit the residual stream.
        return self.hook_mlp_in(resid.clone()) if self.cfg.use_hook_mlp_in else resid

    def _attention_inputs(
        self, resid_pre: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What queries, keys and values read: one tensor, normalised once, if no flag splits it."""
        cfg = self.cfg
        attn_in = resid_pre
        if cfg.use_attn_in:
            attn_in = spread_over_heads(resid_pre, cfg.n_heads, self.hook_attn_in)
        if cfg.use_split_qkv_input:
            kv_heads = self.attn.n_kv_heads
            if cfg.ungroup_grouped_query_attention:
                kv_heads = cfg.n_heads
            query_in = spread_over_heads(resid_pre, cfg.n_heads, self.hook_q_input)
            key_in = spread_over_heads(resid_pre, kv_heads, self.hook_k_input)
            value_in = spread_over_heads(resid_pre, kv_heads, self.hook_v_input)
            query_in, key_in, value_in = (
                self._read("ln1", x) for x in (query_in, key_in, value_in)
            )
        else:
            query_in = key_in = value_in = self._read("ln1", attn_in)
        if positions is not None:
            positions = positions if query_in.ndim == 3 else positions[:, :, None]
            shared = query_in is key_in
            query_in = query_in + positions
            key_in = query_in if shared else key_in + positions
        return query_in, key_in, value_in


def spread_over_heads(
    resid: Float[Tensor, "batch pos d_model"], n_heads: int, point: nn.Module
) -> Float[Tensor, "batch pos head d_model"]:
    """One copy of the stream per head, after ``point``; a real copy only if a hook might write."""
    spread = resid[:, :, None].expand(-1, -1, n_heads, -1)
    return point(spread.clone()) if is_live(point) else spread


class TransformerBlock(ReadingBlock):
    """``resid_pre -> attention -> resid_mid -> MLP -> resid_post``, or both from resid_pre.

    Sequential by default; ``parallel_attn_mlp`` has no ``resid_mid`` (GPT-J, GPT-NeoX);
    ``attn_only`` has no MLP; ``use_normalization_before_and_after`` also normalises what attention
    and MLP write (Gemma 2), ``norm_after_sublayer`` nothing else (OLMo 2). Both before the hooks of
    what is written.
    """

    AXES = {
        "hook_attn_in": "batch pos head d_model",
        "hook_q_input": "batch pos head d_model",
        "hook_k_input": "batch pos kv_head d_model",
        "hook_v_input": "batch pos kv_head d_model",
        "hook_mlp_in": "batch pos d_model",
        "hook_attn_out": "batch pos d_model",
        "hook_mlp_out": "batch pos d_model",
        "hook_resid_pre": "batch pos d_model",
        "hook_resid_mid": "batch pos d_model",
        "hook_resid_post": "batch pos d_model",
    }

    hook_attn_out: HookPoint
    hook_mlp_out: HookPoint
    hook_resid_pre: HookPoint
    hook_resid_mid: HookPoint
    hook_resid_post: HookPoint

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any], block_index: int):
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        check_supported(cfg, places_norms=True)
        after = cfg.normalization_type and cfg.normalization_type.removesuffix("Pre")
        self.ln1 = make_norm(cfg, cfg.normalization_type)
        if cfg.use_normalization_before_and_after:
            self.ln1_post = make_norm(cfg, after)
        if not cfg.attn_only:
            self.ln2 = make_norm(cfg, cfg.normalization_type)
            if cfg.use_normalization_before_and_after:
                self.ln2_post = make_norm(cfg, after)
        attention = attention_class(cfg)
        kind = cfg.attn_types[block_index] if cfg.use_local_attn and cfg.attn_types else "global"
        self.attn = attention(cfg, kind, block_index)
        if not cfg.attn_only:
            self.mlp = make_mlp(cfg, block_index)
        for name, axes in self.AXES.items():
            if name == "hook_resid_mid" and (cfg.attn_only or cfg.parallel_attn_mlp):
                continue
            setattr(self, name, HookPoint(axes))

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        shortformer_pos_embed: Float[Tensor, "batch pos d_model"] | None = None,
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block.

        Args:
            shortformer_pos_embed: Positions for queries and keys only (Press et al. 2012.15832).
            past_kv_cache_entry: This layer's earlier keys and values.
            attention_mask: 0 for padding, over past and new tokens.
        """
        resid_pre = self.hook_resid_pre(resid_pre)
        query_input, key_input, value_input = self._attention_inputs(
            resid_pre, shortformer_pos_embed
        )
        attn_out = self.attn(
            query_input=query_input,
            key_input=key_input,
            value_input=value_input,
            past_kv_cache_entry=past_kv_cache_entry,
            attention_mask=attention_mask,
        )
        attn_out = self.hook_attn_out(self._written("ln1", attn_out))
        if self.cfg.attn_only:
            return self.hook_resid_post(resid_pre + attn_out)
        if self.cfg.parallel_attn_mlp:
            mlp_out = self.apply_mlp(self._read("ln2", self._mlp_input(resid_pre)))
            return self.hook_resid_post(resid_pre + attn_out + mlp_out)
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_out = self.apply_mlp(self._read("ln2", self._mlp_input(resid_mid)))
        return self.hook_resid_post(resid_mid + mlp_out)

    def apply_mlp(
        self, normalized_resid: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The MLP's contribution to the residual stream, after its hook."""
        return self.hook_mlp_out(self._written("ln2", self.mlp(normalized_resid)))
