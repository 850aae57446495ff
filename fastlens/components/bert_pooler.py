"""`BertPooler`: one vector for a whole text."""

from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from fastlens.components.layout import linear, linear_parameter
from fastlens.config import HookedTransformerConfig
from fastlens.hooks.point import HookPoint


class BertPooler(nn.Module):
    """``tanh(x[0] @ W + b)`` of the first token, ``[CLS]``."""

    AXES = {"hook_pooler_out": "batch d_model"}

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        self.W = linear_parameter(cfg.d_model, cfg.d_model, cfg.dtype)
        self.b = nn.Parameter(torch.zeros(cfg.d_model, dtype=cfg.dtype))
        self.activation = nn.Tanh()
        self.hook_pooler_out = HookPoint(self.AXES["hook_pooler_out"])

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch d_model"]:
        """The pooled vector; between -1 and 1."""
        return self.hook_pooler_out(self.activation(linear(resid[:, 0], self.W.t(), self.b)))
