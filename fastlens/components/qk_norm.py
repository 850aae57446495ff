"""QK-norms: what queries and keys pass through between their hooks and their positions."""

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from fastlens.components.norms import LayerNorm, RMSNorm, _Norm
from fastlens.config import HookedTransformerConfig
from fastlens.ops.norm import layer_norm


class HeadRMSNorm(RMSNorm):
    """Every head for itself, with one gain for all (Qwen-3, Gemma-3).

    As in TransformerLens its hooks see batch, position and head merged into one axis.
    """

    AXES = {"hook_scale": "row one", "hook_normalized": "row d_head"}

    def of_heads(self, x: Float[Tensor, "batch pos h d"]) -> Float[Tensor, "batch pos h d"]:
        """Queries or keys of all heads."""
        return self(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    def of_rows(self, x: Float[Tensor, "row h d"]) -> Float[Tensor, "row h d"]:
        """The same for packed rows, without hooks."""
        return self.unhooked(x)


class JoinedRMSNorm(RMSNorm):
    """The channels of all heads together: one head's edit scales all others (OLMo-2, OLMoE)."""

    AXES = {"hook_scale": "batch pos one", "hook_normalized": "batch pos heads"}

    def _leaves(self, x: Tensor) -> tuple[Tensor, None]:
        if x.shape[-1] == self.length:
            return self.w, None
        # Ungrouped keys: one copy for each query head, of which each has its key head's gain.
        copies = x.shape[-1] // self.length
        return self.w.view(-1, self.cfg.d_head).repeat_interleave(copies, 0).flatten(), None

    def of_heads(self, x: Float[Tensor, "batch pos h d"]) -> Float[Tensor, "batch pos h d"]:
        """Queries or keys of all heads."""
        return self(x.flatten(2)).view(x.shape)

    def of_rows(self, x: Float[Tensor, "row h d"]) -> Float[Tensor, "row h d"]:
        """The same for packed rows, without hooks."""
        return self.unhooked(x.flatten(1)).view(x.shape)


class HeadLayerNorm(_Norm):
    """A LayerNorm of every head, with gains of its own and no bias (Cohere, StableLM)."""

    AXES = {"hook_scale": "batch pos head one", "hook_normalized": "batch pos head d_head"}
    centres = True

    def __init__(self, cfg: HookedTransformerConfig, n_heads: int):
        self.n_heads = n_heads
        self.AXES = _axes_of(type(self), cfg, n_heads)
        super().__init__(cfg, cfg.d_head)

    def _add_gain(self) -> None:
        self.w = nn.Parameter(torch.ones(self.n_heads, self.length, dtype=self.cfg.dtype))

    def _leaves(self, x: Tensor) -> tuple[Tensor, None]:
        # Ungrouped keys: each copy has its key head's gain.
        copies = x.shape[-2] // self.n_heads
        return (self.w if copies == 1 else self.w.repeat_interleave(copies, 0)), None

    def _fused(self, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        assert w is not None
        return layer_norm(x, None, None, self.eps) * w

    def of_heads(self, x: Float[Tensor, "batch pos h d"]) -> Float[Tensor, "batch pos h d"]:
        """Queries or keys of all heads."""
        return self(x)

    def of_rows(self, x: Float[Tensor, "row h d"]) -> Float[Tensor, "row h d"]:
        """The same for packed rows, without hooks."""
        return self.unhooked(x)


class SharedLayerNorm(LayerNorm):
    """A LayerNorm of every head, with one gain and one bias for all (Persimmon)."""

    AXES = {"hook_scale": "batch pos head one", "hook_normalized": "batch pos head d_head"}

    def __init__(self, cfg: HookedTransformerConfig, n_heads: int):
        self.AXES = _axes_of(type(self), cfg, n_heads)
        super().__init__(cfg, cfg.d_head)

    def of_heads(self, x: Float[Tensor, "batch pos h d"]) -> Float[Tensor, "batch pos h d"]:
        """Queries or keys of all heads."""
        return self(x)

    def of_rows(self, x: Float[Tensor, "row h d"]) -> Float[Tensor, "row h d"]:
        """The same for packed rows, without hooks."""
        return self.unhooked(x)


def _axes_of(kind: type[_Norm], cfg: HookedTransformerConfig, n_heads: int) -> dict[str, str]:
    """What the hooks of a norm of ``n_heads`` see: under grouped attention keys have fewer."""
    name = "head" if n_heads == cfg.n_heads else "kv_head"
    return {hook: axes.replace("head", name, 1) for hook, axes in kind.AXES.items()}


QKNorm = HeadRMSNorm | JoinedRMSNorm | HeadLayerNorm | SharedLayerNorm
QK_NORM_CLASSES = (HeadRMSNorm, JoinedRMSNorm, HeadLayerNorm, SharedLayerNorm)


def make_qk_norm(cfg: HookedTransformerConfig, n_heads: int) -> QKNorm | None:
    """The norm of queries (``n_heads``) or keys (as many as hold keys) that the config asks for."""
    if not cfg.use_qk_norm:
        return None
    if cfg.qk_norm_kind == "joined":
        return JoinedRMSNorm(cfg, n_heads * cfg.d_head)
    if cfg.qk_norm_kind == "layer_norm":
        return HeadLayerNorm(cfg, n_heads)
    if cfg.qk_norm_kind == "shared_layer_norm":
        return SharedLayerNorm(cfg, n_heads)
    return HeadRMSNorm(cfg, cfg.d_head)
