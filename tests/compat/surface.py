"""The public interface of a package, read off the installed package by introspection."""

import ast
import dataclasses
import functools
import importlib
import inspect
import types
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastlens.compat.finder import ROOT
from fastlens.compat.missing import reason_for

# Of no use to a caller.
NOT_PUBLIC = {"T", "logger"}


def theirs(path: str) -> Any:
    """One of the real TransformerLens' modules, by its path below the package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{ROOT}.{path}".rstrip("."))


def module_paths() -> list[str]:
    """Every module file of the installed package, below the package; packages without
    ``__init__.py`` count."""
    folder = Path(theirs("").__file__).parent
    found = []
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        found.append(".".join(part for part in parts if part != "__init__"))
    return found


def looked_at() -> list[str]:
    """The modules that are not missing as a whole."""
    return [path for path in module_paths() if path == "" or reason_for(path) is None]


@functools.cache
def _assigned(path: str) -> frozenset[str]:
    """Names that the statements of one of the real modules assign."""
    names: set[str] = set()
    file = Path(str(theirs(path).__file__))
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return frozenset(name for name in names - NOT_PUBLIC if not name.startswith("_"))


@functools.cache
def _constants() -> set[str]:
    """Names of constants of any of the modules, which others pass on."""
    return set().union(*(_assigned(path) for path in looked_at()))


@functools.cache
def public_names(path: str) -> dict[str, Any]:
    """What can be imported from one of the real modules and is the package's own.

    Classes and functions of the package, also those that the module only passes on, and constants.
    """
    module, found = theirs(path), {}
    for name, value in vars(module).items():
        if name.startswith("_") or name in NOT_PUBLIC or isinstance(value, types.ModuleType):
            continue
        is_own = str(getattr(value, "__module__", "")).startswith(ROOT)
        is_thing = inspect.isclass(value) or inspect.isroutine(value)
        if (is_thing and is_own) or name in _constants():
            found[name] = value
    return found


def home(value: Any) -> str | None:
    """Where a class or function is defined, below the package; None for constants."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return None
    return f"{value.__module__}.{value.__qualname__}".removeprefix(ROOT + ".")


def members(klass: type) -> dict[str, Any]:
    """Public methods and properties that the package itself gives a class, `__init__` included."""
    found: dict[str, Any] = {}
    for base in klass.__mro__:
        if not base.__module__.startswith(ROOT):
            continue
        for name, value in vars(base).items():
            is_public = not name.startswith("_") or (name == "__init__" and not _generated(base))
            is_code = inspect.isroutine(value) or isinstance(
                value, property | functools.cached_property | classmethod | staticmethod
            )
            if is_public and is_code:
                found.setdefault(name, value)
    return found


def _generated(klass: type) -> bool:
    return dataclasses.is_dataclass(klass) or issubclass(klass, tuple)


def things() -> Iterator[tuple[str, Any]]:
    """(name below the package, value) of everything: each class, function and member at its home,
    and each constant where it is defined."""
    for path in looked_at():
        for name, value in public_names(path).items():
            full = f"{path}.{name}".lstrip(".")
            where = home(value)
            if where is None:
                if name in _assigned(path):
                    yield full, value
                continue
            if where != full:
                continue
            yield full, value
            if inspect.isclass(value):
                yield from ((f"{full}.{name}", member) for name, member in members(value).items())


def signature(value: Any) -> inspect.Signature | None:
    """The arguments of a function, method, property or class, or None where there are none."""
    if isinstance(value, property | functools.cached_property):
        return None
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    if isinstance(value, functools.partial) or callable(value):
        try:
            return inspect.signature(value)
        except (TypeError, ValueError):
            return None
    return None


def same_default(a: Any, b: Any) -> bool:
    """Whether two default values mean the same."""
    if a is b or repr(a) == repr(b):
        return True
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    if inspect.isroutine(a) or inspect.isclass(a):
        return getattr(a, "__name__", a) == getattr(b, "__name__", b)
    try:
        return bool(a == b) and type(a) is type(b)
    except (TypeError, ValueError, RuntimeError):
        return False


def differences(want: inspect.Signature, got: inspect.Signature) -> list[str]:
    """How a call that the first accepts may fail, or mean something else, with the second."""
    kinds = inspect.Parameter
    positional = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ours = list(got.parameters.values())
    order = [p.name for p in ours if p.kind in positional]
    takes_any = {p.kind for p in ours} & {kinds.VAR_KEYWORD}
    takes_more = {p.kind for p in ours} & {kinds.VAR_POSITIONAL}
    problems = []
    for place, (name, parameter) in enumerate(want.parameters.items()):
        found = got.parameters.get(name)
        if parameter.kind == kinds.VAR_KEYWORD:
            problems += [] if takes_any else [f"**{name} is not taken"]
        elif parameter.kind == kinds.VAR_POSITIONAL:
            problems += [] if takes_more else [f"*{name} is not taken"]
        elif found is None:
            if not (takes_any and takes_more):
                problems.append(f"{name} is missing")
        else:
            by_place = parameter.kind in positional and not (takes_more and name not in order)
            if by_place and (place >= len(order) or order[place] != name):
                problems.append(f"{name} is at another place")
            if parameter.kind != kinds.POSITIONAL_ONLY and found.kind == kinds.POSITIONAL_ONLY:
                problems.append(f"{name} cannot be given by name")
            if not same_default(parameter.default, found.default):
                problems.append(f"{name}={found.default!r}, not {parameter.default!r}")
    problems += [
        f"{p.name} is new and has no default"
        for p in ours
        if p.name not in want.parameters
        and p.default is p.empty
        and p.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
    ]
    return problems


def fields(klass: type) -> dict[str, Any]:
    """The fields of a dataclass or NamedTuple."""
    if dataclasses.is_dataclass(klass):
        return {field.name: field.type for field in dataclasses.fields(klass)}
    return dict.fromkeys(getattr(klass, "_fields", ()))


def is_typing(value: Any) -> bool:
    """Whether a constant is a name for types, which have no value to compare."""
    return (
        typing.get_origin(value) is not None
        or inspect.isclass(value)
        or "jaxtyping" in str(getattr(value, "__module__", ""))
        or isinstance(value, typing.TypeVar)
    )


def function_of(value: Any) -> Any:
    """The function behind a method, property or partial; None for what has no Python code."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.cached_property):
        value = value.func
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    while isinstance(value, functools.partial):
        value = value.func
    return value if inspect.isfunction(value) or inspect.ismethod(value) else None


def canonical(value: Any, name: str) -> str:
    """The name of a function, member or class where it is defined; other things keep theirs."""
    if isinstance(value, functools.partial):
        return name
    defined = value if inspect.isclass(value) else function_of(value)
    if not str(getattr(defined, "__module__", "")).startswith(ROOT):
        return name  # a constant, or inherited from torch
    return home(defined) or name


def find(path: str) -> Any:
    """What a dotted path below the real package names: a module, a class, a member of it.

    None for an attribute that instances of a class set.
    """
    parts = path.split(".")
    for cut in range(len(parts), -1, -1):
        if ".".join(parts[:cut]) in all_paths():
            value = theirs(".".join(parts[:cut]))
            for part in parts[cut:]:
                if inspect.isclass(value) and _sets(value, part):
                    return None
                value = inspect.getattr_static(value, part)
            return value
    raise AttributeError(path)


def _sets(klass: type, name: str) -> bool:
    """Whether only the instances of a class have that attribute."""
    own = [base for base in klass.__mro__ if base.__module__.startswith(ROOT)]
    return not hasattr(klass, name) and any(
        f"self.{name} = " in inspect.getsource(base)
        or name in vars(base).get("__annotations__", {})
        for base in own
    )


@functools.cache
def all_paths() -> frozenset[str]:
    """`module_paths` as a set."""
    return frozenset(module_paths())


def callables() -> dict[str, Any]:
    """Everything that can be called or read, by canonical name: functions, methods, properties,
    and classes."""
    found: dict[str, Any] = {}
    for name, value in things():
        if _is_of_protocol(name):
            continue
        if inspect.isclass(value) or (
            function_of(value) is not None and not name.endswith(".__init__")
        ):
            found.setdefault(canonical(value, name), value)
    return found


def is_protocol(klass: Any) -> bool:
    """Whether a class only says what others must have."""
    return bool(getattr(klass, "_is_protocol", False))


def _is_of_protocol(name: str) -> bool:
    return any(is_protocol(find(part)) for part in (name, name.rpartition(".")[0]))
