"""`BertMLMHead`: the last layer before BERT's unembedding."""

from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from fastlens.components.layout import linear, linear_parameter
from fastlens.components.norms import LayerNorm
from fastlens.config import HookedTransformerConfig
from fastlens.ops.activations import activation


class BertMLMHead(nn.Module):
    """``LN(act(x @ W + b))``, which the unembedding turns into logits of masked tokens.

    ``act`` is ``cfg.act_fn``, as in Hugging Face's BERT (TransformerLens: always GELU).
    """

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        self.W = linear_parameter(cfg.d_model, cfg.d_model, cfg.dtype)
        self.b = nn.Parameter(torch.zeros(cfg.d_model, dtype=cfg.dtype))
        self.act_fn = activation(cfg.act_fn)
        self.ln = LayerNorm(cfg)

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the unembedding reads."""
        return self.ln(self.act_fn(linear(resid, self.W.t(), self.b)))
