"""`CountedPosEmbed`: positions that count the tokens which are not padding."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError


class CountedPosEmbed(nn.Module):
    """``W_pos[padding_id + n]`` for the n-th token of a row that is not padding (RoBERTa).

    Padding tokens, told by their id and not by a mask, all get row ``padding_id``. So the table has
    ``n_ctx + padding_id + 1`` rows, and padding on the left moves no position.
    """

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        if cfg.encoder is None or cfg.encoder.padding_id is None:
            raise ConfigError("positions that leave out padding need cfg.encoder.padding_id.")
        self.padding_id = cfg.encoder.padding_id
        rows = cfg.n_ctx + self.padding_id + 1
        self.W_pos = nn.Parameter(torch.empty(rows, cfg.d_model, dtype=cfg.dtype))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Position embeddings of these tokens; a fresh tensor.

        Raises: IndexError if a row has more than ``n_ctx`` tokens that are not padding.
        """
        counts = (tokens != self.padding_id).long()
        if tokens.shape[1] > self.cfg.n_ctx and int(counts.sum(1).max()) > self.cfg.n_ctx:
            raise IndexError(
                f"a text of {int(counts.sum(1).max())} tokens was given, but there are "
                f"{self.cfg.n_ctx} positions (n_ctx). Give a shorter one."
            )
        return F.embedding(counts.cumsum(1) * counts + self.padding_id, self.W_pos)
