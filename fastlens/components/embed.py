"""Token embedding, position embedding, unembedding."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.layout import linear, linear_parameter
from fastlens.components.norms import LayerNorm
from fastlens.config import HookedTransformerConfig
from fastlens.hooks.point import HookPoint
from fastlens.tokens import get_offset_position_ids


class Embed(nn.Module):
    """``W_E[tokens]``, then a LayerNorm where ``cfg.post_embedding_ln``."""

    # Reads single rows where W_E is not in memory; gives None where it is.
    rows: Callable[[Tensor], Tensor | None] | None = None

    def __init__(self, cfg: HookedTransformerConfig | dict):
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.W_E = nn.Parameter(
            torch.empty(self.cfg.d_vocab, self.cfg.d_model, dtype=self.cfg.dtype)
        )
        if self.cfg.post_embedding_ln:
            self.ln = LayerNorm(self.cfg)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Rows of W_E."""
        embedded = None if self.rows is None else self.rows(tokens)
        if embedded is None:
            embedded = F.embedding(tokens, self.W_E)
        return self.ln(embedded) if self.cfg.post_embedding_ln else embedded


class PosEmbed(nn.Module):
    """``W_pos[position]``; left padding shifts positions, and pad tokens get zeros."""

    def __init__(self, cfg: HookedTransformerConfig | dict):
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.W_pos = nn.Parameter(
            torch.empty(self.cfg.n_ctx, self.cfg.d_model, dtype=self.cfg.dtype)
        )

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Position embeddings of these tokens.

        Args:
            past_kv_pos_offset: Tokens already in the KV cache.
            attention_mask: 0 for padding, over cached and new tokens.
        """
        n_new = tokens.shape[-1]
        if attention_mask is None:
            end = past_kv_pos_offset + n_new
            if end > self.W_pos.shape[0]:
                raise IndexError(
                    f"position {end - 1} was asked for, but W_pos has {self.W_pos.shape[0]} "
                    f"positions (n_ctx). Give a shorter prompt."
                )
            return self.W_pos[past_kv_pos_offset:end].expand(tokens.shape[0], -1, -1)
        positions = get_offset_position_ids(past_kv_pos_offset, attention_mask)
        padding = attention_mask[:, past_kv_pos_offset : past_kv_pos_offset + n_new] == 0
        return F.embedding(positions, self.W_pos).masked_fill(padding[:, :, None], 0.0)


class Unembed(nn.Module):
    """``residual @ W_U + b_U``."""

    AXES = {"hook_in": "batch pos d_model", "hook_out": "batch pos d_vocab"}
    # Reads single columns and their biases where W_U is not in memory; gives None where it is.
    columns: Callable[[Tensor], tuple[Tensor, Tensor] | None] | None = None

    def __init__(self, cfg: HookedTransformerConfig | dict):
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.W_U = linear_parameter(self.cfg.d_model, self.cfg.d_vocab_out, self.cfg.dtype)
        self.b_U = nn.Parameter(torch.zeros(self.cfg.d_vocab_out, dtype=self.cfg.dtype))
        self.hook_in = HookPoint(self.AXES["hook_in"])
        self.hook_out = HookPoint(self.AXES["hook_out"])

    def forward(
        self, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab_out"]:
        """Logits, before any soft-cap."""
        return self.hook_out(linear(self.hook_in(residual), self.W_U.t(), self.b_U))
