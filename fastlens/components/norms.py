"""LayerNorm and RMSNorm, and their folded forms without gain and bias."""

from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from fastlens.config import NORM_AFTER, HookedTransformerConfig
from fastlens.hooks.point import HookPoint, is_live
from fastlens.ops.norm import layer_norm, rms_norm

HALF = (torch.float16, torch.bfloat16)


class _Norm(nn.Module):
    """Shared by the four norms: the hooked order, and the fused op when nobody looks."""

    AXES = {"hook_scale": "batch pos ... one", "hook_normalized": "batch pos ... d_model"}
    centres = False

    def __init__(self, cfg: HookedTransformerConfig | dict, length: int | None = None):
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.eps = self.cfg.eps
        self.length = self.cfg.d_model if length is None else length
        self._add_gain()
        self.hook_scale = HookPoint(self.AXES["hook_scale"])
        self.hook_normalized = HookPoint(self.AXES["hook_normalized"])

    def _add_gain(self) -> None:
        """Register gain and bias; the folded forms have none."""

    def forward(self, x: Float[Tensor, "... length"]) -> Float[Tensor, "... length"]:
        """Normalise over the last axis; statistics in float32 for 16-bit models."""
        w, b = self._leaves(x)
        dtype = self.cfg.dtype
        looked_at = is_live(self.hook_scale) or is_live(self.hook_normalized)
        if not looked_at and x.dtype == dtype and (w is None or w.dtype == dtype):
            return self._fused(x, w, b)
        x = _centred(x, self.centres, dtype)
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        x = self.hook_normalized(x / scale).to(dtype)
        x = x if w is None else x * w
        return x if b is None else x + b

    def unhooked(self, x: Float[Tensor, "... length"]) -> Float[Tensor, "... length"]:
        """As `forward` where nobody looks: rows of any layout, which no HookPoint sees."""
        return self._fused(x, *self._leaves(x))

    def _leaves(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gain and bias for such an input."""
        return getattr(self, "w", None), getattr(self, "b", None)

    def _fused(self, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        if self.centres:
            return layer_norm(x, w, b, self.eps)
        return rms_norm(x, w, self.eps)


def _centred(x: Tensor, centres: bool, dtype: torch.dtype) -> Tensor:
    if dtype in HALF:
        x = x.to(torch.float32)
    return x - x.mean(-1, keepdim=True) if centres else x


def normalized_by(
    x: Float[Tensor, "... length"],
    scale: Float[Tensor, "... one"],
    *,
    centres: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "... length"]:
    """What a norm's ``hook_normalized`` sees, from its input and its ``hook_scale``.

    Args:
        dtype: Of the model: 16-bit ones normalise in float32.
    """
    return _centred(x, centres, dtype) / scale


class LayerNorm(_Norm):
    """``(x - mean) / scale * w + b``; ``hook_normalized`` is before gain and bias, as in TL."""

    centres = True

    def _add_gain(self) -> None:
        self.w = nn.Parameter(torch.ones(self.length, dtype=self.cfg.dtype))
        self.b = nn.Parameter(torch.zeros(self.length, dtype=self.cfg.dtype))


class LayerNormPre(_Norm):
    """``(x - mean) / scale``: a LayerNorm whose gain and bias are folded into the next layer."""

    centres = True


class RMSNorm(_Norm):
    """``x / scale * w``; ``hook_normalized`` is before the gain, as in TL."""

    def _add_gain(self) -> None:
        self.w = nn.Parameter(torch.ones(self.length, dtype=self.cfg.dtype))


class RMSNormPre(_Norm):
    """``x / scale``: an RMSNorm whose gain is folded into the next layer."""


_NORMS = {"LN": LayerNorm, "LNPre": LayerNormPre, "RMS": RMSNorm, "RMSPre": RMSNormPre}


def make_norm(
    cfg: HookedTransformerConfig, normalization_type: str | None, length: int | None = None
) -> nn.Module:
    """The norm of that type; an ``nn.Identity`` for None."""
    if normalization_type is None:
        return nn.Identity()
    return _NORMS[normalization_type](cfg, length)


def norm_before(cfg: Any, name: str) -> str | None:
    """The norm between the stream and attention ("ln1") or MLP ("ln2"); None if there is none."""
    return None if cfg.normalization_type is None or _stands_behind(cfg) else name


def norm_behind(cfg: Any, name: str) -> str | None:
    """The norm on what attention ("ln1") or MLP ("ln2") writes; None if there is none.

    ``ln1_post`` in blocks that normalise before and after (Gemma-2), ``ln1`` itself where norms
    stand behind the sublayers (OLMo-2).
    """
    if cfg.normalization_type is None:
        return None
    if getattr(cfg, "use_normalization_before_and_after", False):
        return f"{name}_post"
    return name if _stands_behind(cfg) else None


def _stands_behind(cfg: Any) -> bool:
    # TransformerLens' config knows it by the architecture's name.
    is_known = getattr(cfg, "original_architecture", None) in NORM_AFTER
    return getattr(cfg, "norm_after_sublayer", is_known)


def final_norm(cfg: HookedTransformerConfig) -> nn.Module | None:
    """``ln_final``: RMS where ``cfg.final_rms`` says so, None where the model has no norms."""
    kind = cfg.normalization_type
    if kind is None:
        return None
    if cfg.final_rms:
        kind = kind.replace("LN", "RMS")
    return make_norm(cfg, kind)
