"""`HookedModule`: hooks, cache and patching on every submodule of any PyTorch module, by name."""

import contextlib
import copy
import inspect
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastlens.cache.activations import Activations
from fastlens.errors import HookNameError, ShapeError
from fastlens.hooks.point import HookFunction, HookPoint
from fastlens.hooks.root import HookedRootModule, HookList, HookName, NamesFilter, uncompiled
from fastlens.slices import Slice, SliceInput

_ENDS = ("hook_in", "hook_out")


class HookedModule(HookedRootModule):
    """Any ``nn.Module``, with hook points where values enter and leave each of its submodules.

    >>> model = HookedModule(transformers.GPT2LMHeadModel(config))
    >>> output, cache = model.run_with_cache(tokens)
    >>> mlp_out = cache["transformer.h.3.mlp.hook_out"]
    >>> patched = model.run_with_patches(other, patches={"transformer.h.3.mlp.hook_out": mlp_out})

    The module is used as it is, nothing is converted or copied. It stays a ``model.wrapped`` whose
    outputs, weights and state dict are its own; every other attribute is looked up there. Without
    hooks a call costs nothing more. With hooks, they run however the module is called
    (``model.generate(...)``, ``model.encoder(x)``).

    **Names.** For the submodule ``h.0.mlp``:

    * ``h.0.mlp.hook_out``: what it returns, if that is a tensor. Parts of anything else have their
      index or key behind it: ``hook_out.0``, ``hook_out.last_hidden_state``, ``hook_out.1.0``.
    * ``h.0.mlp.hook_in``: its first argument, if that is a tensor, given by position or by name.
      Other arguments go by their parameter's name: ``hook_in.attention_mask``, ``hook_in.args.1``.
    * ``hook_in`` and ``hook_out`` alone are the whole module's.
    * A module that is called several times in one run (a shared activation function): a hook on
      ``relu.hook_out`` runs at each call, ``relu@1.hook_out`` is the second call's alone. A cache
      has ``relu.hook_out`` if there was one call, else ``relu@0.hook_out``, ``relu@1.hook_out``.
    * A module that has two names has both; predicates and whole caches see the first.

    ``hook_dict`` lists the places that every module has. Those of parts and calls are known once
    they are named or seen.

    **Never silent.** A name that is not passed in a run is an error after it, that says what was
    there; a predicate that matches nothing warns. Cached values are copies, so what later works in
    place (``ReLU(inplace=True)``) does not change them; so is what a hook returns.

    Which position, batch and head mean is not known here, so ``pos_slice`` is refused and
    `fastlens.patching.sweep` needs a `HookedTransformer`: patch with `run_with_patches`.
    """

    def __init__(self, module: nn.Module):
        """Hook points for ``module``, which is used as it is, not copied.

        Call ``setup()`` after replacing submodules.
        """
        if not isinstance(module, nn.Module) or isinstance(module, HookedModule):
            raise TypeError(
                f"HookedModule takes a plain torch.nn.Module, found {type(module).__name__}."
            )
        super().__init__()
        self.__dict__["wrapped"] = module
        # The same dicts, so that parameters, buffers and submodules have the names they have there.
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = module.__dict__[name]
        self._aliases: dict[int, list[str]] = {}
        self._taps: dict[int, _Tap] = {}
        self._rules: list[_Rule] = []
        self._active: list[tuple[int, int]] = []
        self._calls: dict[int, int] = {}
        self._watches: list[_Watch] = []
        self._asked: set[str] = set()
        self.setup()

    def setup(self) -> None:
        """List the places again; hooks on places that are still there stay on."""
        for tap in self._taps.values():
            tap.remove()
        self._taps.clear()
        every = dict(self.wrapped.named_modules(remove_duplicate=False))
        self._aliases = {}
        for name, module in every.items():
            self._aliases.setdefault(id(module), []).append(name)
        known = self.hook_dict
        self.mod_dict = {name: module for name, module in every.items() if name}
        self.hook_dict = {}
        for name in every:
            for end in _ENDS:
                plain = f"{name}.{end}" if name else end
                self.hook_dict[plain] = known.get(plain) or Place(self, plain, name, end)
        for name, place in known.items():
            if isinstance(place, Place) and place.module_name in every:
                self.hook_dict.setdefault(name, place)
                if place.has_any():
                    self._tap(place.module_name)
        if self._rules:
            self._tap_everything()

    # -- the wrapped module ------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module itself returns."""
        if not self._taps:
            return self.wrapped(*args, **kwargs)
        return _RUN["tapped"](self, args, kwargs)

    def _tapped(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        depth = len(self._active)
        watch = _Watch()
        self._watches.append(watch)
        try:
            with uncompiled():
                output = self.wrapped(*args, **kwargs)
        finally:
            del self._active[depth:]
            self._watches = [one for one in self._watches if one is not watch]
        for one in self._watches:
            one.runs += 1
        self._asked = {name for name in self._asked if self.hook_dict[name].has_hooks()}
        for name in sorted(self._asked - watch.passed):
            warnings.warn(f"a hook is on, but {self._why_not_passed(name, watch)}", stacklevel=3)
        return output

    @property
    def training(self) -> bool:
        """Whether the wrapped module is in training mode."""
        return self.wrapped.training

    @training.setter
    def training(self, mode: bool) -> None:
        # torch sets it before there is a module.
        if "wrapped" in self.__dict__:
            self.wrapped.training = mode

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "wrapped" not in self.__dict__:
            return super().__getattr__(name)
        return getattr(self.__dict__["wrapped"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        wrapped = self.__dict__.get("wrapped")
        own = wrapped is None or name in self.__dict__ or hasattr(type(self), name)
        if own or not hasattr(wrapped, name):
            object.__setattr__(self, name, value)
        else:
            setattr(wrapped, name, value)

    def __repr__(self) -> str:
        return f"HookedModule({self.wrapped!r})"

    def train(self, mode: bool = True) -> "HookedModule":
        """Training mode of the wrapped module."""
        self.wrapped.train(mode)
        return self

    def to(self, *args: Any, **kwargs: Any) -> "HookedModule":
        """Move or cast the wrapped module."""
        self.wrapped.to(*args, **kwargs)
        return self

    def apply(self, fn: Callable[[nn.Module], Any]) -> "HookedModule":
        """``fn`` on the wrapped module and its submodules."""
        self.wrapped.apply(fn)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "HookedModule":
        self.wrapped._apply(fn, recurse)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's."""
        return self.wrapped.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's."""
        return self.wrapped.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.wrapped._load_from_state_dict(*args, **kwargs)

    # -- hooks -------------------------------------------------------------------------------

    def add_hook(
        self,
        name: HookName,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a hook that stays until ``reset_hooks``; see `HookedRootModule.add_hook`.

        Warns at each run in which the place is not passed.
        """
        if callable(name):
            rule = _Rule(name, hook, dir, is_permanent, level, prepend)
            self._rules.append(rule)
            self._tap_everything()
            for names in self._aliases.values():
                for end in _ENDS:
                    self._spread(rule, names, end)
            return
        place = self._place(name)
        self.check_and_add_hook(place, name, hook, dir, is_permanent, level, prepend)
        if level is None:
            self._asked.add(name)

    def remove_all_hook_fns(
        self,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take hooks off; see `HookedRootModule.remove_all_hook_fns`."""
        self._rules = [
            rule
            for rule in self._rules
            if (direction not in ("both", rule.dir))
            or (level is not None and rule.level != level)
            or (rule.is_permanent and not including_permanent)
        ]
        super().remove_all_hook_fns(direction, including_permanent, level)
        self._remove_idle_taps()

    @contextlib.contextmanager
    def hooks(
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["HookedModule"]:
        """Add hooks for the length of a ``with`` block; see `HookedRootModule.hooks`.

        Raises: HookNameError at once for a name that no module has; at the end of the block for one
            that was not passed although the module ran.
        """
        every = [(n, f, "fwd") for n, f in fwd_hooks] + [(n, f, "bwd") for n, f in bwd_hooks]
        for name, _, _ in every:
            if isinstance(name, str):
                self._place(name)
        self.context_level += 1
        level = self.context_level
        watch = _Watch()
        self._watches.append(watch)
        try:
            for name, hook, direction in every:
                self.add_hook(name, hook, direction, level=level)
            yield self
            if watch.runs:
                self._check_passed([name for name, _, _ in every], watch)
        finally:
            self._watches = [one for one in self._watches if one is not watch]
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, including_permanent=False, level=level)
            self.context_level -= 1

    def run_with_patches(
        self, *model_args: Any, patches: Mapping[str, Tensor], **model_kwargs: Any
    ) -> Any:
        """One forward in which the named values are replaced: activation patching.

        Args:
            patches: Place -> what is there instead, such as ``{name: cache[name]}`` of another
                run. Its shape must be the value's own; it is taken to that dtype and device.
            model_args, model_kwargs: As for the module.

        Raises: ShapeError for another shape; HookNameError for a place that is not passed, or
            passed more than once (name one call: ``relu@0.hook_out``).
        """
        hooks = [(name, partial(_replace, value=value)) for name, value in patches.items()]
        return self.run_with_hooks(*model_args, fwd_hooks=hooks, **model_kwargs)

    # -- caches ------------------------------------------------------------------------------

    def run_with_cache(  # type: ignore[override]
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        remove_batch_dim: bool = False,
        return_cache_object: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, Activations | dict[str, Tensor]]:
        """One forward and the values that passed; see `HookedRootModule.run_with_cache`.

        Args:
            incl_bwd: Also call ``backward()`` on the output, which must then be a scalar tensor,
                and keep gradients under ``name + "_grad"``: with respect to the value as it is used
                from there on.
            remove_batch_dim: Drop first axes of length one; see `Activations.remove_batch_dim`.
            return_cache_object: False gives a plain dict.

        Returns: the output, and `Activations` by name: copies, detached. A value that passes
            several places unchanged is copied once and shared by their entries.

        Cost: one copy of what is cached.
        Raises: HookNameError for a named place that is not passed, or gets no gradient.
        """
        output, found = super().run_with_cache(
            *model_args, names_filter=names_filter, incl_bwd=incl_bwd, **kwargs
        )
        if incl_bwd and not (names_filter is None or callable(names_filter)):
            for name in self._names_matching(names_filter):
                place = self._place(name)
                pattern = rf"{re.escape(place.module_name)}(@\d+)?\.?{re.escape(place.rest)}_grad"
                if not any(re.fullmatch(pattern, key) for key in [*found, name]):
                    raise HookNameError(
                        f"no gradient reached {name!r}: it does not lead to the output, or was "
                        f"computed without gradients (torch.no_grad, detach, integers)."
                    )
        cache = Activations(found, self)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return output, cache if return_cache_object else cache.cache_dict

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Slice | SliceInput = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """The hooks that would fill a cache, not put on yet: (cache, fwd_hooks, bwd_hooks).

        The forward hooks also keep the gradients, where those are asked for: ``bwd_hooks`` is
        empty.
        """
        if Slice.unwrap(pos_slice).mode != "identity":
            raise ShapeError(
                "pos_slice was given, but which axis of a module's value is its positions is not "
                "known here. Cache the whole, and slice it."
            )
        self.is_caching = True
        capture = _Capture({} if cache is None else cache, device, incl_bwd)
        names: list[Any]
        if names_filter is None or callable(names_filter):
            names = [_anything if names_filter is None else names_filter]
        else:
            names = self._names_matching(names_filter)
        return capture.cache, [(name, capture) for name in names], []

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Put caching hooks on the module; the returned dict fills at every later run."""
        cache, hooks, _ = self.get_caching_hooks(names_filter, incl_bwd, device, cache=cache)
        for name, hook in hooks:
            self.add_hook(name, hook)
        return cache

    # -- places ------------------------------------------------------------------------------

    def _names_matching(self, names_filter: NamesFilter) -> list[str]:
        if names_filter is None or callable(names_filter):
            return [name for name in self.hook_dict if names_filter is None or names_filter(name)]
        wanted = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        return [self._place(name).name or "" for name in dict.fromkeys(wanted)]

    def _place(self, name: str) -> "Place":
        """The hook point of that name; made if a module has the name's first part."""
        if name in self.hook_dict:
            place = self.hook_dict[name]
            assert isinstance(place, Place)
            return place
        for match in re.finditer(r"(?:^|\.)(hook_(?:in|out))(?=\.|$)", name):
            module_name, _, call = name[: match.start()].partition("@")
            if (module_name in self.mod_dict or not module_name) and (not call or call.isdigit()):
                number = int(call) if call else None
                place = Place(self, name, module_name, name[match.start(1) :], number)
                self.hook_dict[name] = place
                return place
        error = self.no_such_hook(name)
        if name in self.mod_dict:
            error = HookNameError(f"{name!r} is a module: name {name}.hook_in or {name}.hook_out.")
        raise error

    def _spread(self, rule: "_Rule", names: list[str], rest: str) -> None:
        """Put a predicate's hook on this place, once for all names of its module."""
        if (names[0], rest) in rule.decided:
            return
        rule.decided.add((names[0], rest))
        for name in names:
            plain = f"{name}.{rest}" if name else rest
            if rule.predicate(plain):
                self._place(plain).add_hook(
                    rule.hook, rule.dir, rule.is_permanent, rule.level, rule.prepend
                )
                return

    def _check_passed(self, asked: list[HookName], watch: "_Watch") -> None:
        for name in asked:
            if isinstance(name, str):
                if name not in watch.passed:
                    raise HookNameError(self._why_not_passed(name, watch))
            elif not any(name(passed) for passed in watch.passed):
                warnings.warn(
                    f"the predicate {name!r} matches none of the {len(watch.passed)} places that "
                    f"were passed.",
                    stacklevel=4,
                )

    def _why_not_passed(self, name: str, watch: "_Watch") -> str:
        place = self._place(name)
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

    # -- taps: torch's hooks on the modules that somebody looks at -----------------------------

    def _tap(self, module_name: str) -> None:
        """Watch a module, and those around it, which tell where a run begins."""
        if "torch._dynamo" in sys.modules and _RUN["tapped"] is HookedModule._tapped:
            # A compiler must not look into it. It is not loaded for this.
            _RUN["tapped"] = torch.compiler.disable(HookedModule._tapped)
        parts = module_name.split(".") if module_name else []
        names = [".".join(parts[:n]) for n in range(len(parts) + 1)]
        for name in names:
            module = self.mod_dict[name] if name else self.wrapped
            if id(module) not in self._taps:
                self._taps[id(module)] = _Tap(self, module, self._aliases[id(module)])

    def _tap_everything(self) -> None:
        for names in self._aliases.values():
            for name in names:
                self._tap(name)

    def _remove_idle_taps(self) -> None:
        """Leave the modules as they were, where nobody looks any more."""
        if self._rules or not self._taps:
            return
        wanted = {
            place.module_name
            for place in self.hook_dict.values()
            if isinstance(place, Place) and place.has_any()
        }
        for tap in self._taps.values():
            tap.remove()
        self._taps.clear()
        for name in wanted:
            self._tap(name)


_RUN: dict[str, Callable[..., Any]] = {"tapped": HookedModule._tapped}


class Place(HookPoint):
    """A hook point of a `HookedModule`: a value that enters or leaves a submodule.

    Attributes:
        module_name: The submodule, ``""`` for the whole.
        rest: ``hook_in`` or ``hook_out``, and the part of it.
        call: Which call of the module in a run is passing now.
    """

    _root: HookedModule

    def __init__(
        self, root: HookedModule, name: str, module_name: str, rest: str, only: int | None = None
    ):
        super().__init__()
        # Not as a submodule.
        self.__dict__["_root"] = root
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
        self._root._tap(self.module_name)
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As torch's; the module is watched from now on."""
        self._root._tap(self.module_name)
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As torch's; the module is watched from now on."""
        self._root._tap(self.module_name)
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
            self._root._remove_idle_taps()


@dataclass(eq=False)
class _Watch:
    """What happened while somebody waited for it: runs, modules called, tensors that passed."""

    runs: int = 0
    called: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)


@dataclass(eq=False)
class _Rule:
    """A hook for every place whose name a predicate likes, those seen later included."""

    predicate: Callable[[str], bool]
    hook: HookFunction
    dir: str
    is_permanent: bool
    level: int | None
    prepend: bool
    decided: set[tuple[str, str]] = field(default_factory=set)


class _Tap:
    """torch's hooks on one module, which take the tensors it gets and gives past their places."""

    def __init__(self, root: HookedModule, module: nn.Module, names: list[str]):
        self.root = root
        self.names = names
        self.parameters = _parameter_names(module)
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
        root = self.root
        if not root._active:
            root._calls.clear()
        call = root._calls.get(self.key, 0)
        root._calls[self.key] = call + 1
        root._active.append((self.key, call))
        for watch in root._watches:
            watch.called.update(self.names)
        show = partial(self._show, call)
        new_args = tuple(
            _mapped(value, self._label(i, value), show) for i, value in enumerate(args)
        )
        new_kwargs = {
            key: _mapped(value, self._label(key, value), show) for key, value in kwargs.items()
        }
        return new_args, new_kwargs

    def pass_output(self, module: Any, args: Any, output: Any) -> Any:
        """After the module ran: show what it returns."""
        # None if the watching began while the module was running.
        call = next((call for key, call in reversed(self.root._active) if key == self.key), 0)
        return _mapped(output, "hook_out", partial(self._show, call))

    def leave(self, module: Any, args: Any, output: Any) -> None:
        """The call is over, also if it failed."""
        active = self.root._active
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
        root = self.root
        for rule in root._rules:
            root._spread(rule, self.names, rest)
        for name in self.names:
            plain = f"{name}.{rest}" if name else rest
            one_call = f"{name}@{call}.{rest}"
            for watch in root._watches:
                watch.passed.update((plain, one_call))
            for point in (root.hook_dict.get(plain), root.hook_dict.get(one_call)):
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


def _parameter_names(module: nn.Module) -> tuple[list[str], str]:
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


def _mapped(value: Any, name: str, show: Callable[[str, Tensor], Tensor]) -> Any:
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
    new = {key: _mapped(part, f"{name}.{key}", show) for key, part in parts.items()}
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


def _anything(name: str) -> bool:
    return True


def _replace(activation: Tensor, hook: Place, value: Tensor) -> Tensor:
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


class _Capture:
    """A hook that keeps copies of what passes, and of their gradients, by place and call."""

    def __init__(self, cache: dict[str, Tensor], device: Any, incl_bwd: bool):
        self.cache = cache
        self.device = device
        self.incl_bwd = incl_bwd
        self.calls: dict[str, int] = {}
        self.copies: dict[int, tuple[Any, int, Tensor]] = {}

    def __call__(self, activation: Tensor, hook: Place) -> Tensor | None:
        plain = hook.name or ""
        if hook.only is None:
            if hook.call == 0:
                for call in range(self.calls.get(plain, 0)):
                    self.cache.pop(hook.numbered(call), None)
            elif plain in self.cache:
                self.cache[hook.numbered(0)] = self.cache.pop(plain)
            self.calls[plain] = hook.call + 1
        self.cache[self._name(hook, hook.call)] = self._copy(activation)
        if not (self.incl_bwd and activation.requires_grad and torch.is_grad_enabled()):
            return None
        # What is used from here on, apart from other uses of the same tensor.
        used = activation.clone()
        used.register_hook(partial(self._keep_gradient, hook, hook.call))
        return used

    def _name(self, hook: Place, call: int) -> str:
        is_one_of_several = hook.only is None and self.calls[hook.name or ""] > 1
        return hook.numbered(call) if is_one_of_several else hook.name or ""

    def _keep_gradient(self, hook: Place, call: int, gradient: Tensor) -> None:
        self.cache[f"{self._name(hook, call)}_grad"] = self._copy(gradient)

    def _copy(self, value: Tensor) -> Tensor:
        if value.is_inference():  # no count of its edits
            return value.detach().to(self.device or value.device, copy=True)
        source, version, kept = self.copies.get(id(value), (None, -1, value))
        if source is not None and source() is value and version == value._version:
            return kept
        kept = value.detach().to(self.device or value.device, copy=True)
        self.copies[id(value)] = weakref.ref(value), value._version, kept
        return kept
