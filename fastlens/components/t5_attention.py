"""T5's attention: a learned bias for each distance, and queries that read another sequence."""

import math
from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.attention import AbstractAttention
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.hooks.point import HookPoint
from fastlens.kernels.masks import AttentionRule


class T5Attention(AbstractAttention):
    """Attention of a T5 encoder or decoder, or between them (Raffel et al. 1910.10683).

    Scores are not scaled (``cfg.use_attn_scale`` is False); a bias that depends on head and
    distance is added. The first layer of a stack holds the biases and makes them once a forward,
    with `compute_relative_attention_bias`; all layers take them as ``position_bias``. Attention
    across sequences has none.
    """

    AXES = {**AbstractAttention.AXES, "rel_pos_hook": "one head query_pos key_pos"}

    rel_pos_bias: nn.Embedding
    rel_pos_hook: HookPoint

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any],
        has_relative_attention_bias: bool = False,
        attn_type: str = "global",
        layer_id: int | None = None,
        is_decoder: bool = False,
    ):
        """Args beside `AbstractAttention`'s.

        Args:
            has_relative_attention_bias: Whether this layer holds the biases of its stack.
            is_decoder: Whether a token sees only itself and those before it; otherwise
                ``cfg.attention_dir`` says it. Distances fall into other buckets then.
        """
        super().__init__(cfg, attn_type, layer_id)
        cfg = self.cfg
        self.has_relative_attention_bias = has_relative_attention_bias
        self.is_decoder = is_decoder
        self.is_causal = is_decoder or cfg.attention_dir == "causal"
        if not has_relative_attention_bias:
            return
        buckets, distance = cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance
        if buckets is None or distance is None:
            raise ConfigError(
                "a relative position bias needs relative_attention_num_buckets and "
                "relative_attention_max_distance in the config (T5 has 32 and 128)."
            )
        self.relative_attention_num_buckets = buckets
        self.relative_attention_max_distance = distance
        self.rel_pos_bias = nn.Embedding(buckets, cfg.n_heads, dtype=cfg.dtype)
        self.rel_pos_hook = HookPoint(self.AXES["rel_pos_hook"])

    @property
    def rule(self) -> AttentionRule:
        """As for other layers, but causal only in a decoder."""
        return super().rule._replace(causal=self.is_causal)

    @staticmethod
    def _relative_position_bucket(
        relative_position: Int[Tensor, "query_pos key_pos"],
        bidirectional: bool = True,
        num_buckets: int = 32,
        max_distance: int = 128,
    ) -> Int[Tensor, "query_pos key_pos"]:
        """The bucket of ``key - query``: one a distance when near, in logarithmic steps when far.

        Keys after the query have the upper half of the buckets, or (not ``bidirectional``) all
        share the bucket of distance 0.
        """
        first = torch.zeros_like(relative_position)
        if bidirectional:
            num_buckets //= 2
            first = (relative_position > 0).long() * num_buckets
            distance = relative_position.abs()
        else:
            distance = (-relative_position).clamp(min=0)
        n_near = num_buckets // 2
        # In float32, as where the weights were trained: a rounded logarithm decides at the edges.
        ratio = torch.log(distance.clamp(min=1).float() / n_near)
        far = n_near + (ratio / math.log(max_distance / n_near) * (num_buckets - n_near)).long()
        return first + torch.where(distance < n_near, distance, far.clamp(max=num_buckets - 1))

    def compute_relative_attention_bias(
        self,
        query_length: int,
        key_length: int,
        device: torch.device | str | None = None,
        offset: int = 0,
    ) -> Float[Tensor, "1 head query_pos key_pos"]:
        """What this stack adds to its scores, after ``rel_pos_hook``.

        Args:
            offset: Position of the first query: earlier tokens are in a KV cache.
        """
        device = self.rel_pos_bias.weight.device if device is None else device
        queries = torch.arange(offset, offset + query_length, device=device)
        keys = torch.arange(key_length, device=device)
        buckets = self._relative_position_bucket(
            keys[None, :] - queries[:, None],
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        return self.rel_pos_hook(self.rel_pos_bias(buckets).permute(2, 0, 1)[None])
