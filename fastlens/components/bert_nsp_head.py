"""`BertNSPHead`: does the second text follow the first?"""

from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from fastlens.components.layout import linear, linear_parameter
from fastlens.config import HookedTransformerConfig
from fastlens.hooks.point import HookPoint


class BertNSPHead(nn.Module):
    """``x @ W + b``: two logits, the first for "it follows", the second for "it does not"."""

    AXES = {"hook_nsp_out": "batch two"}

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        self.W = linear_parameter(cfg.d_model, 2, cfg.dtype)
        self.b = nn.Parameter(torch.zeros(2, dtype=cfg.dtype))
        self.hook_nsp_out = HookPoint(self.AXES["hook_nsp_out"])

    def forward(self, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch 2"]:
        """Logits of the pooled text."""
        return self.hook_nsp_out(linear(resid, self.W.t(), self.b))
