"""`BertEmbed`: tokens, positions and token types, summed and normalised."""

from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.embed import Embed, PosEmbed
from fastlens.components.norms import LayerNorm
from fastlens.components.token_typed_embed import TokenTypeEmbed
from fastlens.config import HookedTransformerConfig
from fastlens.hooks.point import HookPoint, is_live


class BertEmbed(nn.Module):
    """``LN(W_E[token] + W_pos[position] + W_token_type[type])`` (Devlin et al. 1810.04805).

    Positions count from the first column of the batch, padding included, as in BERT.
    """

    AXES = dict.fromkeys(
        ("hook_embed", "hook_pos_embed", "hook_token_type_embed"), "batch pos d_model"
    )

    hook_embed: HookPoint
    hook_pos_embed: HookPoint
    hook_token_type_embed: HookPoint

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        self.embed = Embed(cfg)
        self.pos_embed = PosEmbed(cfg)
        self.token_type_embed = TokenTypeEmbed(cfg)
        self.ln = LayerNorm(cfg)
        for name, axes in self.AXES.items():
            setattr(self, name, HookPoint(axes))

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"],
        token_type_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What enters the first block.

        Args:
            token_type_ids: 0 for the first text, 1 for the second; by default all 0.

        Raises: IndexError if there are more than ``n_ctx`` positions.
        """
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        embed = self.hook_embed(self.embed(input_ids))
        positions = self.pos_embed(input_ids)
        if is_live(self.hook_pos_embed):
            # Rows of W_pos itself: a hook that writes in place must not write to the weights.
            positions = self.hook_pos_embed(positions.clone())
        types = self.hook_token_type_embed(self.token_type_embed(token_type_ids))
        return self.ln(embed + positions + types)
