"""Where a run may stop: behind the last place at which anybody looks."""

from typing import Any

import torch.nn as nn
from torch.nn.modules.module import _has_any_global_hook

from fastlens.hooks.point import HookPoint, is_live


def layers_needed(model: Any) -> int | None:
    """How many layers a transformer must run for all that is hooked now; None for the whole.

    Every hook counts: fastlens' and torch's own, on any module, an attention layer's tap, and
    modules that are not fastlens' own, which may do anything.
    """
    if _has_any_global_hook():
        return None
    needed = 0
    for name, module in model.named_modules():
        if not name or not _does_something(module):
            continue
        parts = name.split(".")
        if parts[0] in ("ln_final", "unembed") or name == "blocks":
            return None
        if parts[0] == "blocks":
            needed = max(needed, int(parts[1]) + 1)
    return needed


def _does_something(module: nn.Module) -> bool:
    if isinstance(module, HookPoint):
        return is_live(module)
    state = module.__dict__
    hooked = any(
        state[hooks]
        for hooks in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    )
    ours = type(module).__module__.partition(".")[0] == "fastlens" or type(module) is nn.ModuleList
    return hooked or not ours or "forward" in state or state.get("tap") is not None
