"""Where values enter and leave the modules of any tree: the hook points of `HookedModule`.

A `Place` is a hook point, a `Tap` torch's hooks on one module, which take the tensors it gets and
gives past their places. Only modules that somebody looks at, and those around them, are tapped.
"""

import contextlib
import copy
import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastlens.errors import HookNameError, ShapeError
from fastlens.hooks.capture import cast_to, fill, packed
from fastlens.hooks.derived import CacheDict, Stored
from fastlens.hooks.point import HookFunction, HookPoint

ENDS = ("hook_in", "hook_out")


class Place(HookPoint):
    """A hook point of a `HookedModule`: a value that enters or leaves a submodule.

    Attributes:
        module_name: The submodule, ``""`` for the whole.
        rest: ``hook_in`` or ``hook_out``, and the part of it.
        only: The one call of the module in a run that passes here; None for all of them.
        call: Which call is passing now.
    """

    def __init__(
        self, places: "Places", name: str, module_name: str, rest: str, only: int | None = None
    ):
        super().__init__()
        self.places = places
        self.name = name
        self.module_name = module_name
        self.rest = rest
        self.only = only
        self.call = 0

    def has_any(self) -> bool:
        """Whether any hook is here, torch's own included."""
        state = self.__dict__
        torch_hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return any(state[name] for name in torch_hooks)

    def numbered(self, call: int) -> str:
        """The name of this place in one call of its module."""
        if self.only is not None:
            return self.name or ""
        return f"{self.module_name}@{call}.{self.rest}"

    def layer(self) -> int:
        """The first number among the module's names: 3 for ``transformer.h.3.mlp.hook_out``."""
        for part in self.module_name.split("."):
            if part.isdigit():
                return int(part)
        raise ValueError(f"hook point {self.name!r} belongs to no numbered module.")

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As torch's; the module is watched from now on."""
        self.places.tap(self.module_name)
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As torch's; the module is watched from now on."""
        self.places.tap(self.module_name)
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As torch's; the module is watched from now on."""
        self.places.tap(self.module_name)
        return super().register_full_backward_hook(*args, **kwargs)

    def remove_hooks(
        self,
        dir: str = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take hooks off; see `HookPoint.remove_hooks`."""
        had = self.has_any()
        super().remove_hooks(dir, including_permanent, level)
        if had and not self.has_any():
            self.places.remove_idle_taps()


class Watch:
    """What happened while somebody waited for it: runs, modules called, tensors that passed."""

    def __init__(self) -> None:
        self.runs = 0
        self.called: set[str] = set()
        self.passed: set[str] = set()


class Rule:
    """A hook for every place whose name a predicate likes, those seen later included."""

    def __init__(
        self,
        predicate: Callable[[str], bool],
        hook: HookFunction,
        dir: str,
        is_permanent: bool,
        level: int | None,
        prepend: bool,
    ):
        self.predicate = predicate
        self.hook = hook
        self.dir = dir
        self.is_permanent = is_permanent
        self.level = level
        self.prepend = prepend
        self.decided: set[tuple[str, str]] = set()


class Places:
    """The hook points of a module tree, and torch's hooks on the modules that somebody looks at.

    Attributes:
        points: Hook points by name. Those of parts and calls are added once named or seen.
        modules: Every submodule by name, ``""`` for the whole; one may have several names.
        rules: Hooks for all places that a predicate likes.
        watches: Whoever waits to hear what passed.
        active: The tapped modules that are running, innermost last, and the number of the call.
        calls: How often each tapped module was called in this run.
    """

    def __init__(self) -> None:
        self.points: dict[str, HookPoint] = {}
        self.modules: dict[str, nn.Module] = {}
        self.aliases: dict[int, list[str]] = {}
        self.taps: dict[int, Tap] = {}
        self.rules: list[Rule] = []
        self.watches: list[Watch] = []
        self.active: list[tuple[int, int]] = []
        self.calls: dict[int, int] = {}

    def list_modules(self, module: nn.Module) -> None:
        """Make the two places of every submodule; what is still there keeps its hooks."""
        for tap in self.taps.values():
            tap.remove()
        self.taps.clear()
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.aliases = {}
        for name, submodule in self.modules.items():
            self.aliases.setdefault(id(submodule), []).append(name)
        known, self.points = self.points, {}
        for name in self.modules:
            for end in ENDS:
                plain = f"{name}.{end}" if name else end
                self.points[plain] = known.get(plain) or Place(self, plain, name, end)
        for name, place in known.items():
            if isinstance(place, Place) and place.module_name in self.modules:
                self.points.setdefault(name, place)
                if place.has_any():
                    self.tap(place.module_name)
        if self.rules:
            self.tap_everything()

    def find(self, name: str) -> Place | None:
        """The hook point of that name, made if a module has the name's first part; else None."""
        found = self.points.get(name)
        if isinstance(found, Place):
            return found
        for match in re.finditer(r"(?:^|\.)(hook_(?:in|out))(?=\.|$)", name):
            module_name, _, call = name[: match.start()].partition("@")
            if module_name in self.modules and (not call or call.isdigit()):
                number = int(call) if call else None
                place = Place(self, name, module_name, name[match.start(1) :], number)
                self.points[name] = place
                return place
        return None

    def add_rule(self, rule: Rule) -> None:
        """Put a predicate's hook on every place there is, and on those to come."""
        self.rules.append(rule)
        self.tap_everything()
        for names in self.aliases.values():
            for end in ENDS:
                self.spread(rule, names, end)

    def spread(self, rule: Rule, names: list[str], rest: str) -> None:
        """Put a predicate's hook on one place, once for all names of its module."""
        if (names[0], rest) in rule.decided:
            return
        rule.decided.add((names[0], rest))
        for name in names:
            plain = f"{name}.{rest}" if name else rest
            if rule.predicate(plain):
                place = self.find(plain)
                assert place is not None
                place.add_hook(rule.hook, rule.dir, rule.is_permanent, rule.level, rule.prepend)
                return

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watch]:
        """What happens inside the block."""
        watch = Watch()
        self.watches.append(watch)
        try:
            yield watch
        finally:
            self.watches = [one for one in self.watches if one is not watch]

    def why_not_passed(self, name: str, watch: Watch) -> str:
        """A sentence for a place that nothing passed, with what was there."""
        place = self.find(name)
        assert place is not None
        what = repr(place.module_name) if place.module_name else "the module"
        if place.module_name not in watch.called:
            return (
                f"{name!r} was not passed: {what} was not called in this run. Another module may "
                f"read its weights directly, or the run went another way."
            )
        end = place.rest.split(".", 1)[0]
        at = rf"{re.escape(place.module_name)}(@\d+)?\.?{end}(\.|$)"
        there = sorted(passed for passed in watch.passed if re.match(at, passed))
        if not any("@1." in passed for passed in there):
            there = [passed for passed in there if "@0." not in passed]
        found = f"there were {', '.join(map(repr, there))}" if there else "there were none"
        return f"{name!r} was not passed: of the tensors at {what}'s {end}, {found}."

    def tap(self, module_name: str) -> None:
        """Watch a module, and those around it, which tell where a run begins."""
        parts = module_name.split(".") if module_name else []
        for n in range(len(parts) + 1):
            module = self.modules[".".join(parts[:n])]
            if id(module) not in self.taps:
                self.taps[id(module)] = Tap(self, module, self.aliases[id(module)])

    def tap_everything(self) -> None:
        """Watch all modules: a predicate may like any place."""
        for name in self.modules:
            self.tap(name)

    def remove_idle_taps(self) -> None:
        """Leave the modules as they were, where nobody looks any more."""
        if self.rules or not self.taps:
            return
        wanted = {
            place.module_name
            for place in self.points.values()
            if isinstance(place, Place) and place.has_any()
        }
        for tap in self.taps.values():
            tap.remove()
        self.taps.clear()
        for name in wanted:
            self.tap(name)
        if not wanted:
            # Nobody is left to hear that the modules that are running are done.
            self.active.clear()


class Tap:
    """torch's hooks on one module, which take the tensors it gets and gives past their places."""

    def __init__(self, places: "Places", module: nn.Module, names: list[str]):
        self.places = places
        self.names = names
        self.parameters = parameter_names(module)
        self.key = id(module)
        self.handles = [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self.pass_output),
            module.register_forward_hook(self.leave, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the module."""
        for handle in self.handles:
            handle.remove()

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the module runs: count the call, show the arguments."""
        places = self.places
        if not places.active:
            places.calls.clear()
        call = places.calls.get(self.key, 0)
        places.calls[self.key] = call + 1
        places.active.append((self.key, call))
        for watch in places.watches:
            watch.called.update(self.names)
        show = partial(self._show, call)
        new_args = tuple(mapped(value, self._label(i, value), show) for i, value in enumerate(args))
        new_kwargs = {
            key: mapped(value, self._label(key, value), show) for key, value in kwargs.items()
        }
        return new_args, new_kwargs

    def pass_output(self, module: Any, args: Any, output: Any) -> Any:
        """After the module ran: show what it returns."""
        # None if the watching began while the module was running.
        call = next((call for key, call in reversed(self.places.active) if key == self.key), 0)
        return mapped(output, "hook_out", partial(self._show, call))

    def leave(self, module: Any, args: Any, output: Any) -> None:
        """The call is over, also if it failed."""
        active = self.places.active
        if any(key == self.key for key, _ in active):
            while active.pop()[0] != self.key:
                pass

    def _label(self, where: int | str, value: Any) -> str:
        """``hook_in`` for a tensor that is the first argument, else with the parameter's name."""
        names, rest = self.parameters
        if isinstance(where, int):
            name = names[where] if where < len(names) else f"{rest}.{where - len(names)}"
            is_first = where == 0
        else:
            name, is_first = where, names[:1] == [where]
        return "hook_in" if is_first and isinstance(value, Tensor) else f"hook_in.{name}"

    def _show(self, call: int, rest: str, value: Tensor) -> Tensor:
        places = self.places
        for rule in places.rules:
            places.spread(rule, self.names, rest)
        for name in self.names:
            plain = f"{name}.{rest}" if name else rest
            one_call = f"{name}@{call}.{rest}"
            for watch in places.watches:
                watch.passed.update((plain, one_call))
            for point in (places.points.get(plain), places.points.get(one_call)):
                if isinstance(point, Place) and point.has_any():
                    point.call = call
                    value = _passed(point, value)
        return value


def _passed(point: Place, value: Tensor) -> Tensor:
    """The value after the place's hooks: a copy if they gave another tensor, which is theirs."""
    new = nn.Module.__call__(point, value)
    if new is value:
        return value
    if not isinstance(new, Tensor):
        raise TypeError(
            f"a hook at {point.name!r} returned {type(new).__name__}. Return a tensor to replace "
            f"the value, or None to keep it."
        )
    return new.clone()


def parameter_names(module: nn.Module) -> tuple[list[str], str]:
    """Names of the positional parameters of ``forward``, and of the one that takes the rest."""
    names, rest = [], "args"
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # compiled or scripted: positions only
        return names, rest
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            rest = parameter.name
    return names, rest


def mapped(value: Any, name: str, show: Callable[[str, Tensor], Tensor]) -> Any:
    """The value with every tensor inside shown; the very same object if none was replaced."""
    if isinstance(value, Tensor):
        return show(name, value)
    parts: dict[Any, Any]
    if isinstance(value, Mapping):
        parts = dict(value.items())
    elif isinstance(value, tuple | list):
        parts = dict(enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in fields(value) if hasattr(value, f.name)}
    else:
        return value
    new = {key: mapped(part, f"{name}.{key}", show) for key, part in parts.items()}
    if all(new[key] is part for key, part in parts.items()):
        return value
    if isinstance(value, tuple | list):
        is_named = isinstance(value, tuple) and hasattr(value, "_fields")
        return type(value)(*new.values()) if is_named else type(value)(new.values())
    edited = copy.copy(value)
    for key, part in new.items():
        if part is not parts[key]:
            if isinstance(edited, Mapping):
                edited[key] = part  # type: ignore[index]
            else:
                object.__setattr__(edited, key, part)
    return edited


def anything(name: str) -> bool:
    """The predicate that likes every name."""
    return True


def replace(activation: Tensor, hook: Place, value: Tensor) -> Tensor:
    """A hook that gives ``value`` instead, if it fits and the place is passed once."""
    if hook.only is None and hook.call > 0:
        raise HookNameError(
            f"{hook.name!r} is passed more than once in this run. Name the call to patch: "
            f"{hook.numbered(0)!r} or {hook.numbered(1)!r}."
        )
    if value.shape != activation.shape:
        raise ShapeError(
            f"a patch of shape {list(value.shape)} was given for {hook.name!r}, whose value has "
            f"shape {list(activation.shape)}."
        )
    return value.to(activation)


class Capture:
    """A hook that keeps copies of what passes, and of their gradients, by place and call."""

    def __init__(
        self,
        cache: dict[str, Tensor],
        device: Any,
        incl_bwd: bool,
        dtype: torch.dtype | None = None,
    ):
        self.cache = cache
        self.dtype = dtype
        self.device = device
        self.incl_bwd = incl_bwd
        self.calls: dict[str, int] = {}
        self.copies: dict[int, tuple[Any, int, Stored]] = {}

    def __call__(self, activation: Tensor, hook: Place) -> Tensor | None:
        plain = hook.name or ""
        if hook.only is None:
            if hook.call == 0:
                for call in range(self.calls.get(plain, 0)):
                    self.cache.pop(hook.numbered(call), None)
            elif plain in self.cache:
                self._rename(plain, hook.numbered(0))
            self.calls[plain] = hook.call + 1
        fill(self.cache, self._name(hook, hook.call), self._copy(activation))
        if not (self.incl_bwd and activation.requires_grad and torch.is_grad_enabled()):
            return None
        # What is used from here on, apart from other uses of the same tensor.
        used = activation.clone()
        used.register_hook(partial(self._keep_gradient, hook, hook.call))
        return used

    def _name(self, hook: Place, call: int) -> str:
        is_one_of_several = hook.only is None and self.calls[hook.name or ""] > 1
        return hook.numbered(call) if is_one_of_several else hook.name or ""

    def _rename(self, old: str, new: str) -> None:
        kept: Any = self.cache.entry(old) if isinstance(self.cache, CacheDict) else self.cache[old]
        del self.cache[old]
        fill(self.cache, new, kept)

    def _keep_gradient(self, hook: Place, call: int, gradient: Tensor) -> None:
        fill(self.cache, f"{self._name(hook, call)}_grad", self._copy(gradient))

    def _copy(self, value: Tensor) -> Stored:
        if value.is_inference():  # no count of its edits
            return self._copied(value.detach())
        source, version, kept = self.copies.get(id(value), (None, -1, value))
        if source is not None and source() is value and version == value._version:
            return kept
        kept = self._copied(value.detach())
        self.copies[id(value)] = weakref.ref(value), value._version, kept
        return kept

    def _copied(self, value: Tensor) -> Stored:
        device = self.device or value.device
        if self.dtype == torch.int8:
            small = packed(value)
            if not isinstance(small, Tensor):
                return small.to(device)
        made = value if self.dtype is None else cast_to(value, self.dtype)
        return made.to(device, copy=made is value)
