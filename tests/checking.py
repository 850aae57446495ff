"""How calls into fastlens are checked in tests: all of them, at a cost the tests can bear.

jaxtyping's option decorates every function, nested ones at each definition, with a wrapper that
costs tens of microseconds a call and about two milliseconds a definition: most of the time of the
tests. It is needed only where an array's axes are named.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_CHECKED = BeartypeConf(violation_type=jaxtyping.TypeCheckError)


def _names_axes(hint: Any) -> bool:
    if getattr(hint, "__module__", "") == "jaxtyping":
        return True
    parts = typing.get_args(hint) or (hint if isinstance(hint, list | tuple) else ())
    return any(_names_axes(part) for part in parts)


def selective(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """jaxtyping's decorator where axes are named, plain beartype elsewhere, nothing on closures."""

    def choose(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
        full = jaxtyped(typechecker=typechecker)

        def decorate(function: Any) -> Any:
            if not inspect.isfunction(function):
                return full(function)
            if "<locals>" in function.__qualname__:
                return function
            try:
                hints = typing.get_type_hints(function)
            except (NameError, TypeError):  # a name that does not exist yet: jaxtyping knows how
                return full(function)
            named = any(_names_axes(hint) for hint in hints.values())
            return full(function) if named else beartype(conf=_CHECKED)(function)

        return decorate

    return choose


def install() -> None:
    """Put `selective` in the place that jaxtyping's import hook names."""
    jaxtyping.jaxtyped = selective(jaxtyping.jaxtyped)
