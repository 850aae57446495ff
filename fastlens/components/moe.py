"""Mixtures of experts: a router chooses a few gated MLPs for every token."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.layout import linear, neighbours, rejoin, side_by_side
from fastlens.components.mlp import CanBeUsedAsMLP
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.hooks.point import HookPoint, is_live
from fastlens.ops.activations import activation

See = Callable[[Tensor], Tensor]
# Hidden activations that an expert of a sweep holds at a time, bytes.
HIDDEN_BYTES = 32 * 2**20


class ExpertWeight(nn.Linear):
    """An ``nn.Linear`` around a weight that is there already: drawn from no random numbers."""

    weight: nn.Parameter

    def __init__(self, weight: Float[Tensor, "out in"], has_bias: bool = False):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight)
        bias = nn.Parameter(weight.new_zeros(weight.shape[0])) if has_bias else None
        self.register_parameter("bias", bias)


def _is_bare(layer: nn.Module) -> bool:
    """Whether a linear layer is ours, and nobody listens to it."""
    state = layer.__dict__
    return (
        type(layer) is ExpertWeight
        and "forward" not in state
        and not (state["_forward_hooks"] or state["_forward_pre_hooks"])
        and not (state["_backward_hooks"] or state["_backward_pre_hooks"])
    )


class MoEGatedMLP(nn.Module):
    """One expert: ``W_out(act(W_gate(x)) * W_in(x))`` for the rows that were sent to it.

    With ``cfg.expert_glu_limit`` it is ``W_out((up + 1) * gate * sigmoid(alpha * gate))``, gate
    clamped from above and up on both sides (GPT-OSS). ``hook_gate`` is before the activation (and
    the clamp), ``hook_pre`` the other factor, ``hook_post`` the product. Gate and in are stored
    side by side, so that without gradients one product gives both.
    """

    AXES = {
        "hook_gate": "row d_expert",
        "hook_pre": "row d_expert",
        "hook_post": "row d_expert",
    }

    def __init__(self, cfg: HookedTransformerConfig, width: int | None = None):
        super().__init__()
        self.cfg = cfg
        self.d_mlp: int = width or cfg.d_mlp or 0
        w_gate, w_in = side_by_side([self.d_mlp, self.d_mlp], cfg.d_model, cfg.dtype)
        w_out = torch.empty(cfg.d_model, self.d_mlp, dtype=cfg.dtype)
        weights = {"W_in": w_in, "W_out": w_out, "W_gate": w_gate}
        if cfg.expert_biases:
            # GPT-OSS' order of parameters, which seeds follow.
            weights = {"W_gate": w_gate, "W_in": w_in, "W_out": w_out}
        for name, weight in weights.items():
            setattr(self, name, ExpertWeight(weight, cfg.expert_biases))
        for name, axes in self.AXES.items():
            setattr(self, name, HookPoint(axes))
        self.act_fn = activation(cfg.act_fn)
        if self.W_gate.weight.is_meta:
            # Built without memory, each layer's alone: they shall share theirs there too.
            self._join()

    W_in: ExpertWeight
    W_out: ExpertWeight
    W_gate: ExpertWeight
    hook_gate: HookPoint
    hook_pre: HookPoint
    hook_post: HookPoint

    def forward(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the expert writes for each row."""
        joint = None
        if not self.is_looked_at and _is_bare(self.W_gate) and _is_bare(self.W_in):
            joint = self._factors(x)
        if joint is None:
            joint = self.hook_gate(self.W_gate(x)), self.hook_pre(self.W_in(x))
        return self.W_out(self.hook_post(self._product(*joint)))

    def unhooked(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """`forward` past all hooks."""
        joint = self._factors(x)
        if joint is None:
            gate, up = self.W_gate, self.W_in
            joint = linear(x, gate.weight, gate.bias), linear(x, up.weight, up.bias)
        return linear(self._product(*joint), self.W_out.weight, self.W_out.bias)

    @property
    def is_looked_at(self) -> bool:
        """Whether a hook is on what comes before the activation."""
        return is_live(self.hook_gate) or is_live(self.hook_pre)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Gate and in by one product, where they lie side by side."""
        gate, up = self.W_gate, self.W_in
        joint = neighbours([gate.weight, up.weight])
        if joint is None:
            return None
        bias = torch.cat([gate.bias, up.bias]) if gate.bias is not None else None
        both = linear(x, joint, bias)
        return both[..., : self.d_mlp], both[..., self.d_mlp :]

    def _product(self, gate: Tensor, up: Tensor) -> Tensor:
        limit = self.cfg.expert_glu_limit
        if limit is None:
            return self.act_fn(gate) * up
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.cfg.expert_glu_alpha))

    def _join(self) -> None:
        shape = (self.d_mlp, self.cfg.d_model)
        rejoin([self.W_gate.weight, self.W_in.weight], [shape, shape])

    def _apply(self, fn: Any, recurse: bool = True) -> "MoEGatedMLP":
        before = self.W_in.weight.dtype, self.W_in.weight.device
        super()._apply(fn, recurse)
        after = self.W_in.weight.dtype, self.W_in.weight.device
        # Replaced by hand, they need not be of these shapes.
        ours = _is_bare(self.W_gate) and _is_bare(self.W_in)
        if after != before and after[1].type != "meta" and ours:
            self._join()
        return self


_EXPERT_HOOKS = tuple(MoEGatedMLP.AXES)


class MoE(CanBeUsedAsMLP):
    """``sum over a token's experts of weight * expert(x)``, the experts chosen by a router.

    The router's softmax is over all experts, of which the ``experts_per_token`` largest are taken
    (Mixtral; ``norm_topk_prob`` makes them sum to one), or over those that are taken
    (``softmax_after_top_k``, GPT-OSS). A shared expert (``d_shared_expert``) sees every token.

    ``hook_expert_weights`` sees the router's weights of all experts, batch and position merged:
    before the choice, so that edits change it, or after it where the softmax is. It is followed by
    ``hook_expert_indices``, the chosen experts of each row, largest weight first. The hooks of an
    expert see the rows that were sent to it, maybe none; with ``softmax_after_top_k`` those of an
    expert without rows do not fire, as in TransformerLens.

    Cost: the rows of each expert are one product; the device is waited for once, to count them.
    """

    AXES = {
        "hook_expert_weights": "row expert",
        "hook_expert_indices": "row choice",
        "hook_shared_gate": "row one",
    }

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__(cfg)
        cfg = self.cfg
        if not cfg.num_experts or not cfg.experts_per_token:
            raise ConfigError("num_experts and experts_per_token must be set to build a MoE.")
        if cfg.act_fn in ("xielu", "solu_ln"):
            raise ConfigError(
                f"act_fn={cfg.act_fn!r} was asked of a mixture of experts. It has weights of its "
                f"own, which experts here do not have."
            )
        self.num_experts: int = cfg.num_experts
        self.experts_per_token: int = cfg.experts_per_token
        self.experts = nn.ModuleList(MoEGatedMLP(cfg) for _ in range(self.num_experts))
        router = torch.empty(self.num_experts, cfg.d_model, dtype=cfg.dtype)
        self.W_gate = ExpertWeight(router, cfg.expert_biases)
        self.shared_expert: MoEGatedMLP | None = None
        self.W_shared_gate: ExpertWeight | None = None
        if cfg.d_shared_expert:
            self.shared_expert = MoEGatedMLP(cfg, cfg.d_shared_expert)
        if cfg.d_shared_expert and cfg.gates_shared_expert:
            self.W_shared_gate = ExpertWeight(torch.empty(1, cfg.d_model, dtype=cfg.dtype))
            self.hook_shared_gate = HookPoint(self.AXES["hook_shared_gate"])
        self.hook_expert_weights = HookPoint(self.AXES["hook_expert_weights"])
        self.hook_expert_indices = HookPoint(self.AXES["hook_expert_indices"])

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the layer adds to the residual stream."""
        rows = x.reshape(-1, x.shape[-1])
        chosen = self.routed(self.W_gate(rows), self.hook_expert_weights, self.hook_expert_indices)
        out = torch.zeros_like(rows)
        for expert, some, weight in self._sent(*chosen, rows.dtype):
            if len(some) or self._is_called_idle(expert):
                found = expert(rows.index_select(0, some)) * weight
                out.index_add_(0, some, found.to(rows.dtype))
        if self.shared_expert is not None:
            shared = self.shared_expert(rows)
            if self.W_shared_gate is not None:
                shared = self.hook_shared_gate(self.W_shared_gate(rows)).sigmoid() * shared
            out = out + shared
        return out.view(x.shape)

    def unhooked(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """`forward` of packed rows past all hooks, with little memory beside them."""
        chosen = self.routed(linear(x, self.W_gate.weight, self.W_gate.bias))
        out = torch.zeros_like(x)
        for expert, some, weight in self._sent(*chosen, x.dtype):
            size = _rows_at_a_time(expert)
            for part, factor in zip(some.split(size), weight.split(size), strict=True):
                if len(part):
                    found = expert.unhooked(x.index_select(0, part))
                    out.index_add_(0, part, found * factor)
        if self.shared_expert is not None:
            size = _rows_at_a_time(self.shared_expert)
            for start in range(0, len(x), size):
                rows = x[start : start + size]
                shared = self.shared_expert.unhooked(rows)
                if self.W_shared_gate is not None:
                    shared = shared * linear(rows, self.W_shared_gate.weight).sigmoid()
                out[start : start + size] += shared
        return out

    def routed(
        self,
        logits: Float[Tensor, "row expert"],
        see_weights: See | None = None,
        see_indices: See | None = None,
    ) -> tuple[Float[Tensor, "row choice"], Int[Tensor, "row choice"]]:
        """The chosen experts' weights (in float32 or wider) and their numbers.

        Args:
            logits: What the router gives.
            see_weights, see_indices: The hooks.
        """
        cfg, k = self.cfg, self.experts_per_token
        wide = torch.promote_types(logits.dtype, torch.float32)
        see_weights, see_indices = see_weights or _as_it_is, see_indices or _as_it_is
        if cfg.softmax_after_top_k:
            top, indices = logits.topk(k, -1)
            weights = torch.zeros_like(logits, dtype=wide)
            weights = see_weights(weights.scatter(1, indices, top.softmax(-1, dtype=wide)))
            indices = see_indices(indices)
            return weights.gather(1, indices), indices
        weights, indices = see_weights(logits.softmax(-1, dtype=wide)).topk(k, -1)
        if cfg.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, see_indices(indices)

    def margins(self, logits: Float[Tensor, "row expert"]) -> Float[Tensor, " row"]:
        """How far the last expert that a row takes is ahead of the first that it does not."""
        k = self.experts_per_token
        best = logits.topk(k + 1, -1).values
        return best[:, k - 1] - best[:, k]

    def _is_called_idle(self, expert: nn.Module) -> bool:
        """Whether an expert without rows is called, for its hooks: in GPT-OSS they do not fire."""
        if self.cfg.softmax_after_top_k:
            return False
        return any(is_live(getattr(expert, name, expert)) for name in _EXPERT_HOOKS)

    def _sent(
        self, weights: Tensor, indices: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Each expert, the rows that are sent to it and its weights there, ``[row, 1]``.

        The rows come choice by choice, in TransformerLens' order.
        """
        expert, order = indices.t().flatten().sort(stable=True)
        counts: Sequence[int] = torch.bincount(expert, minlength=self.num_experts).tolist()
        rows = order % len(indices) if len(indices) else order
        share = weights.to(dtype).t().flatten()[order, None]
        yield from zip(self.experts, rows.split(counts), share.split(counts), strict=True)


def _rows_at_a_time(expert: Any) -> int:
    """Rows whose hidden activations take `HIDDEN_BYTES`."""
    return max(256, HIDDEN_BYTES // (4 * expert.d_mlp * expert.W_in.weight.element_size()))


def _as_it_is(x: Tensor) -> Tensor:
    return x
