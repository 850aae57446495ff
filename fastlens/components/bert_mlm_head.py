"""`BertMLMHead`: the last layer before BERT's unembedding."""

from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from fastlens.components.layout import linear, linear_parameter
from fastlens.components.norms import LayerNorm
from fastlens.config import EncoderConfig, HookedTransformerConfig
from fastlens.ops.activations import activation


class BertMLMHead(nn.Module):
    """``LN(act(x @ W + b))``, which the unembedding turns into logits of masked tokens.

    ``act`` is ``cfg.act_fn``, as in Hugging Face's BERT (TransformerLens: always GELU), or what
    ``cfg.encoder`` names. The result is as wide as the embeddings.
    """

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        encoder = cfg.encoder or EncoderConfig()
        width = encoder.d_embed or cfg.d_model
        self.W = linear_parameter(cfg.d_model, width, cfg.dtype)
        self.b = nn.Parameter(torch.zeros(width, dtype=cfg.dtype))
        self.act_fn = activation(encoder.head_act_fn or cfg.act_fn)
        self.ln = LayerNorm(cfg, width)

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_embed"]:
        """What the unembedding reads."""
        return self.ln(self.act_fn(linear(resid, self.W.t(), self.b)))
