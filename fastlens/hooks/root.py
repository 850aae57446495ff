"""`HookedRootModule`: names the hook points of any module tree, and runs it hooked or cached."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastlens.errors import HookNameError, did_you_mean
from fastlens.hooks.capture import (
    CapturePlan,
    CaptureSpec,
    Heads,
    capture_hook,
    chosen_heads,
    kept_dtype,
)
from fastlens.hooks.copies import Copies
from fastlens.hooks.derived import CacheDict
from fastlens.hooks.point import HookFunction, HookPoint, LensHandle
from fastlens.slices import Slice, SliceInput

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
HookName = str | Callable[[str], bool]
HookList = Sequence[tuple[HookName, HookFunction]]


class HookedRootModule(nn.Module):
    """A module whose HookPoints have names, hooks that come off again, and a cache.

    >>> class Double(HookedRootModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.hook_in = HookPoint("batch d_model")
    ...         self.setup()
    ...     def forward(self, x):
    ...         return 2 * self.hook_in(x)
    >>> model = Double()
    >>> model.run_with_hooks(torch.ones(1, 2), fwd_hooks=[("hook_in", lambda x, hook: x + 1)])
    tensor([[4., 4.]])
    >>> out, cache = model.run_with_cache(torch.ones(1, 2))
    >>> list(cache)
    ['hook_in']

    Call ``setup()`` at the end of ``__init__`` and again after replacing submodules.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.is_caching = False
        self.context_level = 0
        self.mod_dict: dict[str, nn.Module] = {}
        self.hook_dict: dict[str, HookPoint] = {}

    def setup(self) -> None:
        """Name every submodule, list the HookPoints, and give bare ones the axes of their place."""
        self.mod_dict = {}
        self.hook_dict = {}
        for name, module in self.named_modules():
            if name:
                module.name = name  # type: ignore[assignment]
                self.mod_dict[name] = module
            if isinstance(module, HookPoint):
                self.hook_dict[name] = module
            else:
                self._fill_axes(module)

    @staticmethod
    def _fill_axes(module: nn.Module) -> None:
        for attribute, axes in getattr(type(module), "AXES", {}).items():
            point = module._modules.get(attribute)
            if isinstance(point, HookPoint) and point.axes is None:
                point.axes = axes

    def hook_points(self) -> Iterable[HookPoint]:
        """All HookPoints, in registration order."""
        return self.hook_dict.values()

    def list_hooks(
        self,
        name_filter: NamesFilter = None,
        dir: str = "both",
        including_permanent: bool = True,
    ) -> dict[str, list[LensHandle]]:
        """The hooks that are on now, by HookPoint name; points without any are left out."""
        found = {}
        for name in self._names_matching(name_filter):
            point = self.hook_dict[name]
            handles = (point.fwd_hooks if dir != "bwd" else []) + (
                point.bwd_hooks if dir != "fwd" else []
            )
            handles = [h for h in handles if including_permanent or not h.is_permanent]
            if handles:
                found[name] = handles
        return found

    # -- adding and removing ---------------------------------------------------------------

    def add_hook(
        self,
        name: HookName,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a hook that stays until ``reset_hooks``.

        Args:
            name: A hook name, or a predicate on hook names.
            hook: ``fn(activation, hook) -> activation or None``.
            dir, is_permanent, level, prepend: See `HookPoint.add_hook`.

        Raises: HookNameError (a KeyError) for an unknown name; FlagError (an AssertionError) for a
            place that a config flag switches off.
        """
        for found in self._points_named(name):
            point = self.hook_dict[found]
            self.check_and_add_hook(point, found, hook, dir, is_permanent, level, prepend)

    def add_perma_hook(self, name: HookName, hook: HookFunction, dir: str = "fwd") -> None:
        """`add_hook` with ``is_permanent=True``."""
        self.add_hook(name, hook, dir=dir, is_permanent=True)

    def check_and_add_hook(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a hook to this point unless `check_hooks_to_add` refuses it."""
        self.check_hooks_to_add(
            hook_point, hook_point_name, hook, dir=dir, is_permanent=is_permanent, prepend=prepend
        )
        hook_point.add_hook(hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def check_hooks_to_add(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Called before ``add_hook`` puts a hook on; raise here to refuse it."""

    def remove_all_hook_fns(
        self,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take hooks off every HookPoint; see `HookPoint.remove_hooks`."""
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent=including_permanent, level=level)

    def clear_contexts(self) -> None:
        """Empty every HookPoint's ``ctx``."""
        for point in self.hook_points():
            point.clear_context()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take off all hooks that are not permanent, and empty the contexts."""
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent, level=level)
        self.is_caching = False

    # -- running ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def hooks(
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["HookedRootModule"]:
        """Add hooks for the length of a ``with`` block; they come off however it ends.

        Args:
            fwd_hooks, bwd_hooks: ``(name or predicate, fn)`` pairs. A place that a config flag
                switches off is switched on for the block when it is named by a string; a predicate
                never flips a flag.
            reset_hooks_end: False leaves the hooks (and flags) on at the end.
            clear_contexts: Also empty the HookPoints' ``ctx`` at the end.

        Raises: HookNameError before anything is changed if a name matches no hook point.
        """
        every = [(n, f, "fwd") for n, f in fwd_hooks] + [(n, f, "bwd") for n, f in bwd_hooks]
        placed = [(self._points_named(name), fn, direction) for name, fn, direction in every]
        self.context_level += 1
        level = self.context_level
        restore: Callable[[], Any] = dict  # nothing to restore yet
        try:
            restore = self._switch_on([name for name, _, _ in every if isinstance(name, str)])
            for names, fn, direction in placed:
                for name in names:
                    self.hook_dict[name].add_hook(fn, dir=direction, level=level)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, including_permanent=False, level=level)
                restore()
            self.context_level -= 1

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """One forward with hooks that come off afterwards, also when a hook raises.

        For backward hooks pass ``reset_hooks_end=False`` (or use `hooks()`), since they must still
        be there when you call ``backward()``.

        Raises: HookNameError if a name matches no hook point.
        """
        if bwd_hooks and reset_hooks_end:
            logging.warning(
                "run_with_hooks takes its hooks off before you can call backward(): pass "
                "reset_hooks_end=False, or use `with model.hooks(bwd_hooks=...)`."
            )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts), uncompiled():
            return self(*model_args, **model_kwargs)

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Slice | SliceInput = None,
        heads: Heads = None,
        lazy: bool = True,
        dtype: torch.dtype | str | None = None,
        into: CacheDict | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """One forward, and the activations that passed the hook points.

        Args:
            names_filter: Which activations: a hook name, a list of names, a predicate, or None for
                all. A string that matches nothing is an error; a predicate that matches nothing
                warns. Named places that a flag switches off are switched on for this run.
            device: Where entries are kept; None leaves them where they are. From a GPU to the
                host the copies go beside the run, into pinned memory (not run on a GPU).
            remove_batch_dim: Drop the batch axis; only for a batch of one.
            incl_bwd: Also call ``backward()`` on the output (which must be a scalar, so use
                ``return_type="loss"``) and keep gradients under ``name + "_grad"``.
            reset_hooks_end, clear_contexts: See `hooks`.
            pos_slice: Positions to keep, along each activation's own position axis. Sliced entries
                are copies, so they keep no larger tensor alive. Activations without a position
                axis (flattened QK-norms, routed experts) are kept whole.
            heads: Query heads to keep, counted from 0: the same in all layers, or a dict of layer
                -> heads (other layers keep all). Of keys and values under grouped attention, those
                that the heads read. Patterns and scores of other heads are not even computed.
            lazy: Let entries that follow exactly from captured ones be computed when first read
                (a `HookedTransformer`'s patterns, scores, norms, activations of neurons). Editing
                a captured tensor in place before that is an error then. False stores everything.
            dtype: What floats are kept as, gradients too: a float dtype or its name (``"bf16"``,
                ``"float16"``), or ``"int8"``: 8 bits a number with the largest channels of each
                row exact (`Int8OutlierRows` states the error), and read again in the activation's
                own dtype; what would not get smaller stays as it is. Each entry is the activation
                rounded once: none is computed from rounded others, so norms, neurons and
                ``resid_mid`` are stored too, and patterns come from queries and keys as they were.
                Whole numbers stay as they are. Entries are copies that keep nothing larger alive.
            into: A `CacheDict` to fill instead of a new one; see `CacheDict.capture`.

        Returns: the output, and a dict of name -> activation (detached; unsliced entries share
            memory with the run, as in TransformerLens, unless there is a ``dtype``).
        """
        spec = CaptureSpec(
            Slice.unwrap(pos_slice),
            device,
            remove_batch_dim,
            chosen_heads(heads, self),
            dtype=kept_dtype(dtype),
            # Hooks that stay on, or write to disk, need each entry at once.
            copies=Copies() if reset_hooks_end and into is None and not incl_bwd else None,
        )
        # A subclass may define capture_plan without it.
        where = {} if into is None else {"into": into}
        self.is_caching = True
        wanted = () if names_filter is None or callable(names_filter) else names_filter
        named = [wanted] if isinstance(wanted, str) else list(wanted)
        # What follows from what depends on the flags that the run will have.
        restore = self._switch_on([name for name in named if name in self.hook_dict])
        try:
            plan = self.capture_plan(
                names_filter, spec, incl_bwd, lazy, stays=not reset_hooks_end, **where
            )
            with self.hooks(plan.fwd, plan.bwd, reset_hooks_end, clear_contexts), plan.tapping():
                with uncompiled():
                    output = self._run_captured(*model_args, **model_kwargs)
                if incl_bwd:
                    output.backward()
        except BaseException:
            restore()
            raise
        finally:
            if spec.copies is not None:
                spec.copies.finish()
        if reset_hooks_end:
            restore()
        return output, plan.cache

    def _run_captured(self, *model_args: Any, **model_kwargs: Any) -> Any:
        """The forward of `run_with_cache`; all hooks are on. A subclass knows when it may stop."""
        return self(*model_args, **model_kwargs)

    def capture_plan(
        self,
        names_filter: NamesFilter,
        spec: CaptureSpec,
        incl_bwd: bool = False,
        lazy: bool = False,
        stays: bool = False,
        into: CacheDict | None = None,
    ) -> CapturePlan:
        """How `run_with_cache` captures; a subclass knows what need not be stored.

        Args:
            stays: The hooks stay on, so they alone must fill the cache at every later forward.
            into: What to fill; None makes a dict.
        """
        if spec.heads is None and spec.dtype is None:
            cache, fwd, bwd = self.get_caching_hooks(
                names_filter,
                incl_bwd,
                spec.device,
                remove_batch_dim=spec.remove_batch_dim,
                pos_slice=spec.pos_slice,
                cache=into,
            )
            return CapturePlan(cache, fwd, bwd)
        names = self._names_matching(names_filter)
        cache = spec.new_cache() if into is None else into
        fwd = [(name, capture_hook(cache, name, spec)) for name in names]
        bwd = [(name, capture_hook(cache, f"{name}_grad", spec)) for name in names]
        return CapturePlan(cache, fwd, bwd if incl_bwd else [])

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Slice | SliceInput = None,
    ) -> tuple[dict[str, Tensor], list[tuple[str, HookFunction]], list[tuple[str, HookFunction]]]:
        """The hooks that would fill a cache, not put on yet: (cache, fwd_hooks, bwd_hooks)."""
        cache = {} if cache is None else cache
        self.is_caching = True
        spec = CaptureSpec(Slice.unwrap(pos_slice), device, remove_batch_dim)
        names = self._names_matching(names_filter)
        fwd = [(name, capture_hook(cache, name, spec)) for name in names]
        bwd = [(name, capture_hook(cache, f"{name}_grad", spec)) for name in names]
        return cache, fwd, bwd if incl_bwd else []

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Put caching hooks on the model; the returned dict fills at every later forward."""
        cache, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim=remove_batch_dim, cache=cache
        )
        for name, hook in fwd:
            self.hook_dict[name].add_hook(hook, "fwd")
        for name, hook in bwd:
            self.hook_dict[name].add_hook(hook, "bwd")
        return cache

    def cache_all(
        self,
        cache: dict[str, Tensor] | None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
    ) -> None:
        """`add_caching_hooks` for every place; ``cache`` fills at every later forward."""
        self.add_caching_hooks(None, incl_bwd, device, remove_batch_dim, cache)

    def cache_some(
        self,
        cache: dict[str, Tensor] | None,
        names: NamesFilter,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
    ) -> None:
        """`add_caching_hooks` for some places; ``cache`` fills at every later forward."""
        self.add_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache)

    # -- names and flags -------------------------------------------------------------------

    def required_flag(self, name: str) -> str | None:
        """The config flag that must be on for ``name`` to fire, or None. A subclass says which."""
        return None

    def is_switched_off(self, name: str) -> bool:
        """Whether a config flag keeps the place ``name`` from firing."""
        return False

    def _switch_on(self, names: list[str]) -> Callable[[], Any]:
        """Turn on the flags these places need; returns a function that puts the old values back."""
        return dict  # a call that does nothing

    def _points_named(self, name: HookName) -> list[str]:
        if callable(name):
            found = [hook_name for hook_name in self.hook_dict if name(hook_name)]
            if not found:
                warnings.warn(
                    f"the predicate {name!r} matches none of the "
                    f"{len(self.hook_dict)} hook points, "
                    f"so the hook will never run.",
                    stacklevel=4,
                )
            return found
        if name not in self.hook_dict:
            raise self.no_such_hook(name)
        return [name]

    def _names_matching(self, names_filter: NamesFilter) -> list[str]:
        if names_filter is None:
            return [name for name in self.hook_dict if not self.is_switched_off(name)]
        if callable(names_filter):
            found = [n for n in self.hook_dict if names_filter(n) and not self.is_switched_off(n)]
            if not found:
                warnings.warn(
                    f"the names_filter {names_filter!r} matches none of the "
                    f"{len(self.hook_dict)} hook points, so the cache will be empty.",
                    stacklevel=4,
                )
            return found
        wanted = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        for name in wanted:
            if name not in self.hook_dict:
                raise self.no_such_hook(name)
        # In the order of the model, whatever the order asked for: as TransformerLens.
        return [name for name in self.hook_dict if name in set(wanted)]

    def no_such_hook(self, name: str) -> HookNameError:
        """The error for a hook name that does not exist, with near names."""
        return HookNameError(
            f"no hook point named {name!r} in this {type(self).__name__} of "
            f"{len(self.hook_dict)} hook points.{did_you_mean(name, self.hook_dict)} "
            f"List them all with model.hook_dict."
        )


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled parts run as they were written: compiled code does not look for later hooks."""
    # The compiler is not loaded for this: without it nothing is compiled.
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
