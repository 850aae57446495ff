"""`OfHeads`: a hook that sees and edits a few heads, so that the others need not be made for it."""

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fastlens.errors import ShapeError
from fastlens.hooks.point import HookFunction, HookPoint, is_live
from fastlens.slices import whole_numbers


class OfHeads:
    """A hook for some heads of an activation with a head axis.

    >>> def copy_first_row(pattern, hook):          # [batch, 1, query_pos, key_pos]
    ...     return pattern[:, :, :1].expand_as(pattern)
    >>> hook = OfHeads(copy_first_row, [5])
    >>> logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_pattern", hook)])

    The function receives only those heads, in the order given, and what it returns (or writes in
    place) replaces them. On ``hook_attn_scores`` and ``hook_pattern`` the other heads stay fused:
    only the patterns of these are ever in memory, and only their outputs are computed from them.

    Args:
        hook: ``fn(activation, hook) -> activation or None``.
        heads: Indices from 0, each once. For keys and values under grouped attention they count KV
            heads, which is what those places hold.

    Raises: ShapeError for heads that are no indices or repeat; when called, for a place without a
        head axis, a head that is not there, or an answer of another shape.
    """

    def __init__(self, hook: HookFunction, heads: Sequence[int]):
        if not callable(hook):
            raise ShapeError(f"OfHeads takes a hook, then its heads; got {hook!r} first.")
        self.hook = hook
        self.heads = tuple(whole_numbers(heads, "heads"))
        if not self.heads or min(self.heads) < 0 or len(set(self.heads)) < len(self.heads):
            raise ShapeError(
                f"heads={list(heads)} must be indices from 0, at least one, and each only once."
            )

    def __call__(self, activation: Tensor, hook: Any) -> Tensor | None:
        axis = head_axis(hook, activation.ndim)
        if axis is None:
            raise ShapeError(
                f"{hook.name!r} has no head axis ({hook.axes}), so OfHeads cannot act."
            )
        held = hook.held_heads
        if held is None:
            held = tuple(range(activation.shape[axis]))
        missing = sorted(set(self.heads) - set(held))
        if missing:
            raise ShapeError(
                f"{hook.name!r} has {activation.shape[axis]} heads, counted from 0; OfHeads was "
                f"given {missing[0]}."
            )
        if held == self.heads:
            return self._checked(self.hook(activation, hook=hook), activation, hook)
        index = activation.new_tensor([held.index(head) for head in self.heads]).long()
        part = activation.index_select(axis, index)
        # Writes to inference tensors leave no trace.
        version = None if part.is_inference() else part._version
        answer = self._checked(self.hook(part, hook=hook), part, hook)
        if answer is None and version is not None and part._version == version:
            return None
        answer = part if answer is None else answer
        return activation.index_copy(axis, index, answer.to(activation.dtype))

    @staticmethod
    def _checked(answer: Any, like: Tensor, hook: Any) -> Any:
        if answer is not None and getattr(answer, "shape", None) != like.shape:
            found = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ShapeError(
                f"a hook on {hook.name!r} was given {list(like.shape)} and returned {found}: what "
                f"it returns replaces what it got, so it must be a tensor of that shape, or None."
            )
        return answer

    def __repr__(self) -> str:
        return f"OfHeads({self.hook!r}, {list(self.heads)})"


def head_axis(point: HookPoint, ndim: int) -> int | None:
    """Where the heads, or KV heads, of an activation at that point are; None if it has none."""
    axis = point.axis("head", ndim)
    return point.axis("kv_head", ndim) if axis is None else axis


def heads_looked_at(point: nn.Module) -> tuple[int, ...] | None:
    """The heads that hooks on this point see: none of them as ``()``, and None where one may see
    all."""
    if not is_live(point):
        return ()
    if type(point) is not HookPoint or point.hook_conversion is not None or _is_entered(point):
        return None
    hooks = [handle.user_hook for handle in point.fwd_hooks]
    # Fewer of ours than there are: a hook of torch's own.
    if not hooks or len(hooks) != len(point._forward_hooks):
        return None
    seen: set[int] = set()
    for hook in hooks:
        if type(hook) is not OfHeads:
            return None
        seen |= set(hook.heads)
    return tuple(sorted(seen))


def _is_entered(point: HookPoint) -> bool:
    """Whether anything but forward hooks acts there."""
    state = point.__dict__
    others = ("_backward_hooks", "_forward_pre_hooks", "_backward_pre_hooks", "bwd_hooks")
    entered = "forward" in state or any(state[name] for name in others)
    return entered or bool(_has_any_global_hook())
