"""`BertRTDHead`: was this token replaced?"""

from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from fastlens.components.layout import linear, linear_parameter
from fastlens.config import HookedTransformerConfig
from fastlens.hooks.point import HookPoint
from fastlens.ops.activations import activation


class BertRTDHead(nn.Module):
    """``act(x @ W + b) @ W_out + b_out``: one logit a token (ELECTRA, Clark et al. 2003.10555).

    Above zero where the discriminator holds that another model put the token there.
    """

    AXES = {"hook_rtd_out": "batch pos"}

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        self.W = linear_parameter(cfg.d_model, cfg.d_model, cfg.dtype)
        self.b = nn.Parameter(torch.zeros(cfg.d_model, dtype=cfg.dtype))
        self.W_out = linear_parameter(cfg.d_model, 1, cfg.dtype)
        self.b_out = nn.Parameter(torch.zeros(1, dtype=cfg.dtype))
        self.act_fn = activation(cfg.act_fn)
        self.hook_rtd_out = HookPoint(self.AXES["hook_rtd_out"])

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos"]:
        """Logits of "this token was replaced"."""
        inner = self.act_fn(linear(resid, self.W.t(), self.b))
        return self.hook_rtd_out(linear(inner, self.W_out.t(), self.b_out).squeeze(-1))
