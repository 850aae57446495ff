"""How near routers are to choosing other experts: rounding may turn such a choice over."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from fastlens.components.moe import MoE

# How many units of the last place logits may differ by that are computed in another order.
_MANY_ROUNDINGS = 64


class RouterGap(NamedTuple):
    """The nearest call of all routers in some forward.

    Attributes:
        gap: Between the logit of the last expert that was chosen and the first that was not.
        layer: Whose router.
        rounding: A gap that another order of operations could turn over, in the logits' dtype.
    """

    gap: float
    layer: int
    rounding: float


def router_gap(model: Any, forward: Callable[[], Any]) -> RouterGap | None:
    """The nearest call while ``forward()`` runs; None for a model without mixtures of experts.

    The routers' own linear layers are listened to, so ``forward`` must run modules.
    """
    found: list[RouterGap] = []
    handles = []
    for layer, block in enumerate(getattr(model, "blocks", ())):
        mlp = getattr(block, "mlp", None)
        if isinstance(mlp, MoE) and mlp.experts_per_token < mlp.num_experts:
            look = _look(found, layer, mlp)
            handles.append(mlp.W_gate.register_forward_hook(look))
    try:
        if handles:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return min(found, default=None)


def _look(found: list[RouterGap], layer: int, mlp: MoE) -> Callable[[nn.Module, Any, Tensor], None]:
    def look(router: nn.Module, inputs: Any, logits: Tensor) -> None:
        logits = logits.detach()
        gaps = mlp.margins(logits.double())
        at = int(torch.argmin(gaps))
        scale = max(1.0, float(logits[at].abs().max()))
        rounding = _MANY_ROUNDINGS * torch.finfo(logits.dtype).eps * scale
        found.append(RouterGap(float(gaps[at]), layer, rounding))

    return look
