"""`TokenTypeEmbed`: which of two texts a token belongs to."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.config import EncoderConfig, HookedTransformerConfig


class TokenTypeEmbed(nn.Module):
    """``W_token_type[token_type]``: 0 for the first text of a pair, 1 for the second (BERT)."""

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        n_types = (self.cfg.encoder or EncoderConfig()).n_token_types
        shape = n_types, self.cfg.d_model
        self.W_token_type = nn.Parameter(torch.empty(shape, dtype=self.cfg.dtype))

    def forward(
        self, token_type_ids: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Rows of W_token_type."""
        return F.embedding(token_type_ids, self.W_token_type)
