"""Which of the exact ways to run a sweep a model allows, best first, and why not a better one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn as nn

from fastlens.components.rows import foreign_part
from fastlens.model.hooked_transformer import HookedTransformer
from fastlens.patching.codes import PlacedCodes
from fastlens.patching.model import PatchableModel, modules_with_hooks, walk

WAVE = "wave"
LAYER_SKIP = "layer skip"
STACKED = "stacked forwards"
ALONE = "one forward per run"
# Methods that say what the model computes; a subclass or an instance may have replaced one.
_METHODS = ("__call__", "forward", "input_to_embed", "get_residual")
_OURS = {method: vars(HookedTransformer).get(method) for method in _METHODS}


@dataclass(frozen=True)
class Strategy:
    """How runs are made.

    Attributes:
        name: ``"wave"``: one pass over the layers for all runs, rows before a run's first patched
            position shared with the base run. ``"layer skip"``: the same pass, but every row of a
            run is its own from its first attention on. ``"stacked forwards"``: runs stacked in the
            batch of hooked forwards, from their first layer on. ``"one forward per run"``.
        because: Why not a better one; empty for the wave.
    """

    name: str
    because: str = ""

    @property
    def is_wave(self) -> bool:
        """Whether the wave runs it, with or without shared prefixes."""
        return self.name in (WAVE, LAYER_SKIP)


def strategy_of(
    model: PatchableModel, *, needs_gradients: bool = False, codes: Sequence[PlacedCodes] = ()
) -> Strategy:
    """The best exact way for this model as it is now."""
    if needs_gradients:
        return Strategy(ALONE, "gradients were asked for")
    assert isinstance(model, nn.Module)
    hooked = modules_with_hooks(model)
    if hooked:
        return Strategy(ALONE, f"hooks are on {len(hooked)} modules, first {hooked[0]}")
    for one in codes:
        hooked = modules_with_hooks(one.sae) if isinstance(one.sae, nn.Module) else []
        if hooked:
            return Strategy(ALONE, f"hooks are on {hooked[0]} of the autoencoder at {one.hook}")
    odd = _odd_tree(model)
    if odd is not None:
        return Strategy(ALONE, odd)
    foreign = _foreign(model)
    if foreign is not None:
        return Strategy(STACKED, f"{foreign}, and what it computes is not known")
    if getattr(model, "placement", None) is not None:
        return Strategy(STACKED, "its layers lie on several devices, and the wave runs on one")
    if model.cfg.attention_dir != "causal":
        return Strategy(LAYER_SKIP, "attention is bidirectional: a patch reaches every position")
    return Strategy(WAVE)


def _odd_tree(model: PatchableModel) -> str | None:
    """What makes a hook's name and its place in the forward two things."""
    seen: dict[int, str] = {}
    for name, module in walk(model):  # type: ignore[arg-type]
        first = seen.setdefault(id(module), name)
        if first != name:
            return f"{first} and {name} are one module"
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.ModuleList) and len(blocks) != model.cfg.n_layers:
        return f"the model has {len(blocks)} blocks, and its configuration {model.cfg.n_layers}"
    return None


def _foreign(model: nn.Module) -> str | None:
    if not isinstance(model, HookedTransformer):
        return f"the model is a {type(model).__name__} of another library"
    for method in _METHODS:
        is_ours = getattr(type(model), method) is getattr(HookedTransformer, method)
        # On our own class, too, someone may have put another.
        is_ours = is_ours and vars(HookedTransformer).get(method) is _OURS[method]
        if not is_ours or method in vars(model):
            return f"{type(model).__name__}.{method} was replaced"
    odd = foreign_part(model)
    if odd is not None:
        return odd
    for name, module in walk(model):
        for leaf_name, leaf in module._parameters.items():
            if leaf is not None and leaf.dtype != model.cfg.dtype:
                return f"{name}.{leaf_name} is {leaf.dtype} in a {model.cfg.dtype} model"
    return None
