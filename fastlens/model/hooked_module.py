"""`HookedModule`: hooks, cache and patching on every submodule of any PyTorch module, by name."""

import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastlens.cache.activations import Activations
from fastlens.errors import HookNameError, ShapeError
from fastlens.hooks.capture import CapturePlan, CaptureSpec
from fastlens.hooks.derived import CacheDict
from fastlens.hooks.places import Capture, Place, Places, Rule, Watch, anything, replace
from fastlens.hooks.point import HookFunction
from fastlens.hooks.root import HookedRootModule, HookList, HookName, NamesFilter, uncompiled
from fastlens.model.any_architecture import transformers_model
from fastlens.slices import Slice, SliceInput


class HookedModule(HookedRootModule):
    """Any ``nn.Module``, with hook points where values enter and leave each of its submodules.

    >>> model = HookedModule(transformers.GPT2LMHeadModel(config))
    >>> output, cache = model.run_with_cache(tokens)
    >>> mlp_out = cache["transformer.h.3.mlp.hook_out"]
    >>> patched = model.run_with_patches(other, patches={"transformer.h.3.mlp.hook_out": mlp_out})

    The module is used as it is, nothing is converted or copied. It stays a ``model.wrapped`` whose
    outputs, weights and state dict are its own; every other attribute is looked up there. Without
    hooks a call costs nothing more. With hooks, they run however the module is called
    (``model.generate(...)``, ``model.encoder(x)``); a part that `torch.compile` compiled, called by
    itself, sees those of ``hooks()`` but none of ``add_hook``.

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
        self._places = Places()
        # Names given to `add_hook`, to warn of those that are not passed.
        self._asked: set[str] = set()
        self.setup()

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | Path,
        *,
        model_class: str | None = None,
        verbose: bool = True,
        **options: Any,
    ) -> "HookedModule":
        """A model that transformers loads, whatever its architecture, with hook points.

        Args:
            model_name: A hub name, an alias that `fastlens models` lists, or a folder.
            model_class: The transformers class, by name; by default the one the checkpoint names.
            verbose: Say in one line what it has, and what it lacks beside a `HookedTransformer`.
            options: For that class' ``from_pretrained``: ``dtype=``, ``revision=``, ...

        Raises: ConfigError for an architecture that transformers does not know; SourceError or
            ModelNameError for a name that leads nowhere.
        """
        module, line = transformers_model(model_name, model_class, options)
        if verbose:
            print(line)  # noqa: T201
        return cls(module)

    def setup(self) -> None:
        """List the places again; hooks on places that are still there stay on."""
        self._places.list_modules(self.wrapped)
        self.mod_dict = {name: module for name, module in self._places.modules.items() if name}
        self.hook_dict = self._places.points

    # -- the wrapped module ------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module itself returns."""
        if not self._places.taps:
            return self.wrapped(*args, **kwargs)
        if "torch._dynamo" in sys.modules and "uncompiled" not in _RUN:
            # A compiler must not look into it. It is not loaded for this.
            _RUN["uncompiled"] = torch.compiler.disable(HookedModule._tapped)
        run = _RUN.get("uncompiled", HookedModule._tapped)
        return run(self, args, kwargs)

    def _tapped(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = self._places
        depth = len(places.active)
        with places.watched() as watch:
            try:
                with uncompiled():
                    output = self.wrapped(*args, **kwargs)
            finally:
                del places.active[depth:]
        for one in places.watches:
            one.runs += 1
        self._asked = {name for name in self._asked if self.hook_dict[name].has_hooks()}
        for name in sorted(self._asked - watch.passed):
            why = places.why_not_passed(name, watch)
            warnings.warn(f"a hook is on, but {why}", stacklevel=3)
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
            self._places.add_rule(Rule(name, hook, dir, is_permanent, level, prepend))
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
        self._places.rules = [
            rule
            for rule in self._places.rules
            if (direction not in ("both", rule.dir))
            or (level is not None and rule.level != level)
            or (rule.is_permanent and not including_permanent)
        ]
        super().remove_all_hook_fns(direction, including_permanent, level)
        self._places.remove_idle_taps()

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
        depth = len(self._places.active)
        try:
            # Compiled parts may be called in the block by themselves.
            with self._places.watched() as watch, uncompiled():
                for name, hook, direction in every:
                    self.add_hook(name, hook, direction, level=level)
                yield self
                if watch.runs:
                    self._check_passed([name for name, _, _ in every], watch)
        finally:
            # torch tells nobody that a module is done if it was a KeyboardInterrupt.
            del self._places.active[depth:]
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
        hooks = [(name, partial(replace, value=value)) for name, value in patches.items()]
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
            several places unchanged is copied once and shared by their entries; work in place that
            torch does not count (on ``x.data``, in NumPy) goes for unchanged.

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

    def capture_plan(
        self,
        names_filter: NamesFilter,
        spec: CaptureSpec,
        incl_bwd: bool = False,
        lazy: bool = False,
        stays: bool = False,
        into: CacheDict | None = None,
    ) -> CapturePlan:
        """Copies of everything; see `HookedRootModule.capture_plan`."""
        if spec.dtype is None:
            return super().capture_plan(names_filter, spec, incl_bwd, lazy, stays, into)
        if spec.heads is not None:
            raise ShapeError(
                "heads was given, but which axis of a module's value is its heads is not known "
                "here. Cache the whole, and slice it."
            )
        cache = spec.new_cache() if into is None else into
        cache, hooks, _ = self.get_caching_hooks(
            names_filter, incl_bwd, spec.device, cache=cache, pos_slice=spec.pos_slice
        )
        capture = Capture(cache, spec.device, incl_bwd, spec.dtype)
        return CapturePlan(cache, [(name, capture) for name, _ in hooks], [])

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
        capture = Capture({} if cache is None else cache, device, incl_bwd)
        names: list[Any]
        if names_filter is None or callable(names_filter):
            names = [anything if names_filter is None else names_filter]
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

    def _place(self, name: str) -> Place:
        """The hook point of that name; made if a module has the name's first part."""
        place = self._places.find(name)
        if place is not None:
            return place
        if name in self.mod_dict:
            raise HookNameError(f"{name!r} is a module: name {name}.hook_in or {name}.hook_out.")
        raise self.no_such_hook(name)

    def _check_passed(self, asked: list[HookName], watch: Watch) -> None:
        for name in asked:
            if isinstance(name, str):
                if name not in watch.passed:
                    raise HookNameError(self._places.why_not_passed(name, watch))
            elif not any(name(passed) for passed in watch.passed):
                warnings.warn(
                    f"the predicate {name!r} matches none of the {len(watch.passed)} places that "
                    f"were passed.",
                    stacklevel=4,
                )


_RUN: dict[str, Callable[..., Any]] = {}
