"""`BertEmbed`: tokens, positions and token types, summed and normalised."""

import copy
from typing import Any, TypeVar

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.counted_pos_embed import CountedPosEmbed
from fastlens.components.embed import Embed, PosEmbed, Unembed
from fastlens.components.layout import linear, linear_parameter
from fastlens.components.norms import LayerNorm
from fastlens.components.token_typed_embed import TokenTypeEmbed
from fastlens.config import EncoderConfig, HookedTransformerConfig
from fastlens.hooks.point import HookPoint, is_live

M = TypeVar("M", Embed, PosEmbed, CountedPosEmbed, TokenTypeEmbed, Unembed)

# Of all tokens, the share that was masked while ESM-2 was trained.
MASKED_IN_TRAINING = 0.15 * 0.8


class BertEmbed(nn.Module):
    """``LN(W_E[token] + W_pos[position] + W_token_type[type])`` (Devlin et al. 1810.04805).

    Positions count from the first column of the batch, padding included, as in BERT. Other
    encoders lack a summand or the norm, count positions in another way, or project the result to
    ``d_model`` by ``W_proj`` and ``b_proj``: see `EncoderConfig`. ``hook_embed`` is what is summed,
    so zeros for ESM-2's masked tokens.
    """

    AXES = dict.fromkeys(
        ("hook_embed", "hook_pos_embed", "hook_token_type_embed"), "batch pos d_embed"
    )

    hook_embed: HookPoint
    hook_pos_embed: HookPoint
    hook_token_type_embed: HookPoint

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        encoder = self.encoder
        self.embed = of_width(Embed, cfg)
        places = ["hook_embed"]
        if self.has_positions:
            counts = encoder.padding_id is not None
            self.pos_embed = of_width(CountedPosEmbed, cfg) if counts else of_width(PosEmbed, cfg)
            places.append("hook_pos_embed")
        if encoder.n_token_types:
            self.token_type_embed = of_width(TokenTypeEmbed, cfg)
            places.append("hook_token_type_embed")
        width = encoder.d_embed or cfg.d_model
        if encoder.embedding_norm:
            self.ln = LayerNorm(cfg, width)
        if encoder.d_embed is not None:
            self.W_proj = linear_parameter(width, cfg.d_model, cfg.dtype)
            self.b_proj = nn.Parameter(torch.zeros(cfg.d_model, dtype=cfg.dtype))
        axes = "batch pos d_model" if encoder.d_embed is None else "batch pos d_embed"
        for name in places:
            setattr(self, name, HookPoint(axes))

    @property
    def encoder(self) -> EncoderConfig:
        """How the encoder differs from BERT."""
        return self.cfg.encoder or EncoderConfig()

    @property
    def has_positions(self) -> bool:
        """Whether positions are summands here, and not rotations of queries and keys."""
        return self.cfg.positional_embedding_type == "standard"

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"],
        token_type_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What enters the first block.

        Args:
            token_type_ids: 0 for the first text, 1 for the second; by default all 0.
            attention_mask: 0 for padding; ESM-2 alone looks at it here.

        Raises: IndexError if there are more than ``n_ctx`` positions.
        """
        encoder = self.encoder
        summed = self.embed(input_ids)
        if encoder.dropped_token is not None:
            summed = self._dropped(summed, input_ids, attention_mask)
        summed = self.hook_embed(summed)
        if self.has_positions:
            positions = self.pos_embed(input_ids)
            if is_live(self.hook_pos_embed):
                # Rows of W_pos itself: a hook that writes in place must not write to the weights.
                positions = self.hook_pos_embed(positions.clone())
            summed = summed + positions
        if encoder.n_token_types:
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(input_ids)
            types = self.hook_token_type_embed(self.token_type_embed(token_type_ids))
            summed = summed + types
        if encoder.embedding_norm:
            summed = self.ln(summed)
        if encoder.zeroes_padding and attention_mask is not None:
            summed = summed.masked_fill(attention_mask[..., None] == 0, 0.0)
        if encoder.d_embed is not None:
            summed = linear(summed, self.W_proj.t(), self.b_proj)
        return summed

    def _dropped(self, embed: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Masked tokens as zeros, and all others scaled to make up for the share of them."""
        masked = tokens == self.encoder.dropped_token
        n_real = tokens.shape[1] if mask is None else mask.sum(-1)
        precise = torch.promote_types(torch.float32, embed.dtype)
        observed = masked.sum(-1).to(precise) / n_real
        kept = embed.masked_fill(masked[..., None], 0.0) * (1 - MASKED_IN_TRAINING)
        return (kept / (1 - observed)[:, None, None]).to(embed.dtype)


def of_width(kind: type[M], cfg: HookedTransformerConfig) -> M:
    """An embedding or unembedding whose vectors have ``d_embed`` channels, where there is one."""
    width = None if cfg.encoder is None else cfg.encoder.d_embed
    if width is None:
        return kind(cfg)
    narrow = copy.copy(cfg)
    narrow.d_model = width
    module = kind(narrow)
    # The model's own, which follows its dtype.
    module.cfg = cfg
    return module
