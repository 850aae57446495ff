"""MLPs, plain and gated."""

import copy
from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from fastlens.components.layout import linear, linear_parameter, neighbours, rejoin, side_by_side
from fastlens.components.norms import LayerNorm, LayerNormPre
from fastlens.components.xielu import XIELU
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.hooks.point import HookPoint, is_live
from fastlens.ops.activations import activation


class CanBeUsedAsMLP(nn.Module):
    """Base of everything that stands where a block's MLP stands."""

    AXES = {
        "hook_pre": "batch pos d_mlp",
        "hook_pre_linear": "batch pos d_mlp",
        "hook_mid": "batch pos d_mlp",
        "hook_post": "batch pos d_mlp",
    }

    hook_mid: HookPoint | None
    ln: nn.Module | None

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        if self.cfg.d_mlp is None:
            raise ConfigError("d_mlp must be set to build an MLP.")
        self.d_mlp: int = self.cfg.d_mlp

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The identity; subclasses compute."""
        return x

    def select_activation_function(self) -> None:
        """Set ``act_fn``, and the LayerNorm that follows it where its name ends in ``_ln``."""
        trained = self.cfg.act_fn == "xielu"
        self.act_fn = XIELU(dtype=self.cfg.dtype) if trained else activation(self.cfg.act_fn)
        if self.cfg.is_layer_norm_activation():
            self.hook_mid = HookPoint(self.AXES["hook_mid"])
            unfolded = self.cfg.normalization_type == "LN"
            self.ln = (LayerNorm if unfolded else LayerNormPre)(self.cfg, self.d_mlp)

    def _after_activation(self, pre: Tensor) -> Tensor:
        """The activation, then its LayerNorm if it has one."""
        if self.cfg.is_layer_norm_activation():
            return self.ln(self.hook_mid(self.act_fn(pre)))  # type: ignore[misc]
        return self.act_fn(pre)


class MLP(CanBeUsedAsMLP):
    """``act(x @ W_in + b_in) @ W_out + b_out``."""

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__(cfg)
        cfg = self.cfg
        self.select_activation_function()
        self.W_in = linear_parameter(cfg.d_model, self.d_mlp, cfg.dtype)
        self.b_in = nn.Parameter(torch.zeros(self.d_mlp, dtype=cfg.dtype))
        self.W_out = linear_parameter(self.d_mlp, cfg.d_model, cfg.dtype)
        self.b_out = nn.Parameter(torch.zeros(cfg.d_model, dtype=cfg.dtype))
        self.hook_pre = HookPoint(self.AXES["hook_pre"])
        self.hook_post = HookPoint(self.AXES["hook_post"])

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the layer adds to the residual stream."""
        pre = self.hook_pre(linear(x, self.W_in.t(), self.b_in))
        post = self.hook_post(self._after_activation(pre))
        return linear(post, self.W_out.t(), self.b_out)


class GatedMLP(CanBeUsedAsMLP):
    """``(act(x @ W_gate) * (x @ W_in) + b_in) @ W_out + b_out``.

    ``hook_pre`` is the gate before its activation, ``hook_pre_linear`` the other factor. As in
    TransformerLens, ``b_in`` is added after the product. Gate and in are stored side by side, so
    that without gradients one product gives both.
    """

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__(cfg)
        cfg = self.cfg
        self.select_activation_function()
        w_gate, w_in = side_by_side([self.d_mlp, self.d_mlp], cfg.d_model, cfg.dtype)
        self.W_in = nn.Parameter(w_in.t())
        self.W_out = linear_parameter(self.d_mlp, cfg.d_model, cfg.dtype)
        self.W_gate = nn.Parameter(w_gate.t())
        self.b_in = nn.Parameter(torch.zeros(self.d_mlp, dtype=cfg.dtype))
        self.b_out = nn.Parameter(torch.zeros(cfg.d_model, dtype=cfg.dtype))
        self.hook_pre = HookPoint(self.AXES["hook_pre"])
        self.hook_pre_linear = HookPoint(self.AXES["hook_pre_linear"])
        self.hook_post = HookPoint(self.AXES["hook_post"])

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the layer adds to the residual stream."""
        joint = None
        if not (is_live(self.hook_pre) or is_live(self.hook_pre_linear)):
            joint = neighbours([self.W_gate.t(), self.W_in.t()])
        if joint is not None:
            gate, up = linear(x, joint).chunk(2, -1)
        else:
            gate = self.hook_pre(linear(x, self.W_gate.t()))
            up = None
        if self.cfg.is_layer_norm_activation():
            # As in TransformerLens: a gate whose activation has a LayerNorm drops the other factor.
            post = self._after_activation(gate)
        else:
            if up is None:
                up = self.hook_pre_linear(linear(x, self.W_in.t()))
            post = torch.addcmul(self.b_in, self.act_fn(gate), up)
        return linear(self.hook_post(post), self.W_out.t(), self.b_out)

    def _apply(self, fn: Any, recurse: bool = True) -> "GatedMLP":
        before = self.W_in.dtype, self.W_in.device
        super()._apply(fn, recurse)
        after = self.W_in.dtype, self.W_in.device
        if after != before and after[1].type != "meta":
            shape = (self.d_mlp, self.cfg.d_model)
            rejoin([self.W_gate, self.W_in], [shape, shape])
        return self


def make_mlp(cfg: HookedTransformerConfig, layer: int | None = None) -> CanBeUsedAsMLP:
    """The MLP the config asks for, in this layer where the first differ."""
    if cfg.num_experts and layer is not None and layer < cfg.n_dense_layers:
        cfg = copy.copy(cfg)
        cfg.num_experts, cfg.d_mlp = None, cfg.d_mlp_dense or cfg.d_mlp
    if cfg.num_experts:
        # Above this module, as they are MLPs too.
        from fastlens.components.grouped_router import GroupedRouterMoE
        from fastlens.components.moe import MoE

        grouped = cfg.router_scores != "softmax" or cfg.expert_groups is not None
        return (GroupedRouterMoE if grouped or cfg.expert_weight_scale != 1 else MoE)(cfg)
    return (GatedMLP if cfg.gated_mlp else MLP)(cfg)
