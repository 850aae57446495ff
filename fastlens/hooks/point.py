"""`HookPoint`: the identity module at a named place, where users' functions see activations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from fastlens.errors import ShapeError

HookFunction = Callable[..., Any]


@dataclass
class LensHandle:
    """One hook that sits on a HookPoint, and how to take it off again."""

    hook: RemovableHandle
    is_permanent: bool = False
    context_level: int | None = None
    user_hook: HookFunction | None = None


@runtime_checkable
class Conversion(Protocol):
    """Two functions between an activation's own shape and the one that hooks should see."""

    def convert(self, input_value: Any) -> Any:
        """What a hook receives."""
        ...

    def revert(self, input_value: Any) -> Any:
        """What a hook returned, in the activation's own shape."""
        ...


class Alias:
    """A HookPoint under another name: what a hook receives that was added with ``alias_names``."""

    def __init__(self, name: str, point: "HookPoint"):
        self.name = name
        self._point = point

    def layer(self) -> int:
        """The layer in the alias; see `HookPoint.layer`."""
        return layer_of(self.name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling ask before there is a point
            raise AttributeError(name)
        return getattr(self._point, name)


class _Forward:
    """A user's hook in torch's form for forward hooks. A class, so that models pickle and copy."""

    def __init__(self, hook: HookFunction, point: "HookPoint", names: list[str] | None = None):
        self.hook = hook
        self.point = point
        self.names = names
        # repr of a partial prints its arguments, which for a caching hook are whole activations.
        is_partial = isinstance(hook, partial)
        self.__name__ = f"partial({hook.func!r}, ...)" if is_partial else repr(hook)

    def __call__(self, module: Any, inputs: Any, output: Any) -> Any:
        return self._called(output)

    def _called(self, value: Any) -> Any:
        point, conversion = self.point, self.point.hook_conversion
        if conversion is None and self.names is None:
            return self.hook(value, hook=point)
        value = value if conversion is None else conversion.convert(value)
        result = None
        for seen_as in [point] if self.names is None else [Alias(n, point) for n in self.names]:
            answer = self.hook(value, hook=seen_as)
            if answer is not None:
                value = result = answer
        return result if result is None or conversion is None else conversion.revert(result)


class _Backward(_Forward):
    """A user's hook in torch's form for full backward hooks."""

    def __call__(self, module: Any, grad_input: Any, grad_output: Any) -> Any:
        grad = grad_output[0]
        if self.point.backward_scale != 1.0:
            grad = grad * self.point.backward_scale
        result = self._called(grad)
        return (result,) if isinstance(result, Tensor) else result


class HookPoint(nn.Module):
    """An identity module. Hooks on it read or replace the activation that passes.

    >>> point = HookPoint("batch pos d_model")
    >>> point.add_hook(lambda activation, hook: activation * 2)
    >>> point(torch.ones(1, 2, 3)).sum().item()
    12.0

    A hook is ``fn(activation, hook=point)``; what it returns replaces the activation, ``None``
    keeps it. ``axes`` names the activation's axes from the left, so that slicing by position or
    head never guesses; ``...`` stands for axes that are there only under some flags. A bare
    ``HookPoint()`` (TransformerLens') put in a known place takes that place's axes at ``setup()``.

    Hooks are ordinary torch module hooks (``register_forward_hook``,
    ``register_full_backward_hook``), so a point without any is free and torch's own tools see them.
    """

    def __init__(self, axes: str | None = None):
        super().__init__()
        self.axes = axes
        self.fwd_hooks: list[LensHandle] = []
        self.bwd_hooks: list[LensHandle] = []
        self.ctx: dict[Any, Any] = {}
        self.name: str | None = None
        self.hook_conversion: Conversion | None = None
        # What the gradients that hooks see are multiplied by.
        self.backward_scale = 1.0
        # Which heads the passing activation holds, where that is not all of them.
        self.held_heads: tuple[int, ...] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        # Most points are never looked at: skip torch's machinery for calling modules.
        return super().__call__(x) if is_live(self) else x

    def forward(self, x: Tensor) -> Tensor:
        """The activation, unchanged."""
        return x

    def add_hook(
        self,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: list[str] | None = None,
    ) -> None:
        """Call ``hook(activation, hook=self)`` whenever the point is passed.

        Args:
            hook: For ``dir="bwd"`` it receives the gradient with respect to the activation.
            dir: ``"fwd"`` or ``"bwd"``.
            is_permanent: Survives ``reset_hooks`` unless that includes permanent hooks.
            level: The ``hooks()`` context that owns it, for removal at its end.
            prepend: Run before the hooks already there.
            alias_names: Call the hook once for each of these names, with this point under that
                name; each call sees what the one before returned.
        """
        if dir == "fwd":
            wrapped = _Forward(hook, self, alias_names)
            handle = self.register_forward_hook(wrapped, prepend=prepend)
        elif dir == "bwd":
            # On an identity the gradients of input and output are one and the same.
            wrapped = _Backward(hook, self, alias_names)
            handle = self.register_full_backward_hook(wrapped, prepend=prepend)
        else:
            raise ValueError(f"dir={dir!r} is not a direction. Give 'fwd' or 'bwd'.")
        handles = self.fwd_hooks if dir == "fwd" else self.bwd_hooks
        handles.insert(
            0 if prepend else len(handles), LensHandle(handle, is_permanent, level, hook)
        )

    def add_perma_hook(self, hook: HookFunction, dir: str = "fwd") -> None:
        """`add_hook` with ``is_permanent=True``."""
        self.add_hook(hook, dir=dir, is_permanent=True)

    def remove_hooks(
        self,
        dir: str = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take hooks off: those of one ``hooks()`` level, or all (``level=None``)."""
        _check_direction(dir)
        # Walked for every point at the end of every hooked run: most have nothing to take off.
        if dir != "bwd" and self.fwd_hooks:
            self.fwd_hooks = _without(self.fwd_hooks, including_permanent, level)
        if dir != "fwd" and self.bwd_hooks:
            self.bwd_hooks = _without(self.bwd_hooks, including_permanent, level)

    def has_hooks(
        self,
        dir: str = "both",
        including_permanent: bool = True,
        level: int | None = None,
    ) -> bool:
        """Whether any hook of that direction, permanence and level is here."""
        _check_direction(dir)
        handles = (self.fwd_hooks if dir != "bwd" else []) + (
            self.bwd_hooks if dir != "fwd" else []
        )
        return any(
            (including_permanent or not handle.is_permanent)
            and (level is None or handle.context_level == level)
            for handle in handles
        )

    def clear_context(self) -> None:
        """Empty ``ctx``, the dict where hooks keep state between calls."""
        self.ctx = {}

    def enable_reshape(self, hook_conversion: Conversion | None = None) -> None:
        """Let hooks see ``hook_conversion.convert(activation)``, and ``revert`` what they return.

        None lets them see the activation itself again. TransformerLens' name; gradients are
        converted too.
        """
        self.hook_conversion = hook_conversion

    def layer(self) -> int:
        """The block this point belongs to: 3 for ``blocks.3.attn.hook_q``."""
        return layer_of(self.name)

    def axis(self, name: str, ndim: int) -> int | None:
        """Index from the left of axis ``name`` in an activation of ``ndim`` axes; None if absent.

        Raises: ShapeError if this point does not know its axes.
        """
        if self.axes is None:
            raise ShapeError(
                f"hook point {self.name!r} does not name its axes, so {name!r} cannot be sliced. "
                f"Make it HookPoint('batch pos ...')."
            )
        names = self.axes.split()
        if name not in names:
            return None
        index = names.index(name)
        after_gap = "..." in names[:index]
        return index + ndim - len(names) if after_gap else index

    def extra_repr(self) -> str:
        """Axes and how many hooks are on."""
        parts = [repr(self.axes)] if self.axes else []
        parts += [f"{len(self.fwd_hooks)} fwd"] if self.fwd_hooks else []
        parts += [f"{len(self.bwd_hooks)} bwd"] if self.bwd_hooks else []
        return ", ".join(parts)


def is_live(point: nn.Module) -> bool:
    """Whether passing ``point`` could do more than return its input.

    True for a HookPoint that carries any hook (ours or a native torch one) or an overridden
    ``forward``, for any module that is not exactly a `HookPoint`, and while a global module hook
    is registered with torch.
    """
    if type(point) is not HookPoint:
        return True
    state = point.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_backward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        # Compiled code is guarded by these lists (run again through the compiler when one
        # changes), and not by torch's own hooks.
        or state["fwd_hooks"]
        or state["bwd_hooks"]
        or _has_any_global_hook()
    )


def layer_of(name: str | None) -> int:
    """The number that is the second part of a hook name.

    Raises: ValueError if there is none.
    """
    parts = (name or "").split(".")
    if len(parts) < 2 or not parts[1].isdigit():
        raise ValueError(f"hook point {name!r} belongs to no block, so it has no layer.")
    return int(parts[1])


def _check_direction(dir: str) -> None:
    if dir not in ("fwd", "bwd", "both"):
        raise ValueError(f"dir={dir!r} is not a direction. Give 'fwd', 'bwd' or 'both'.")


def _without(
    handles: list[LensHandle], including_permanent: bool, level: int | None
) -> list[LensHandle]:
    """The handles that stay, the others taken off."""
    kept = []
    for handle in handles:
        ours = level is None or handle.context_level == level
        if ours and (including_permanent or not handle.is_permanent):
            handle.hook.remove()
        else:
            kept.append(handle)
    return kept
