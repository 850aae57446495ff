"""`install`: `import transformer_lens` gives fastlens, by the tables in `fastlens.compat.names`."""

import importlib
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution
from pathlib import Path
from types import ModuleType
from typing import Any

from fastlens.compat.missing import reason_for
from fastlens.compat.names import MODULES, names_of
from fastlens.errors import did_you_mean

ROOT = "transformer_lens"
# The version whose interface this is, for code that checks.
VERSION = "3.9.0"
# "transformer_lens.loading" is an attribute there, under another name than the module's own.
_SAME_MODULE = {"loading": "loading_from_pretrained"}
# ``import *`` gives these in no version: scripts have variables of these names.
_NO_STAR = {"cache", "config"}


def _below(name: str) -> str:
    """The path below the package: "" for the package itself."""
    return name.removeprefix(ROOT).removeprefix(".")


def _is_theirs(name: str) -> bool:
    return name == ROOT or name.startswith(ROOT + ".")


class AliasModule(ModuleType):
    """One of TransformerLens' modules: its names are read from fastlens when first asked for.

    Assigning to a name (as `unittest.mock.patch` does) assigns it in the module of fastlens that
    the name stands for, so that the library itself sees it.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        path = _below(self.__name__)
        names = names_of(path)
        if name in names:
            module, attribute = names[name]
            value = getattr(importlib.import_module(module), attribute)
            self.__dict__[name] = value
            return value
        child = f"{path}.{name}".lstrip(".")
        child = _SAME_MODULE.get(child, child)
        if child in MODULES:
            return importlib.import_module(f"{ROOT}.{child}")
        raise AttributeError(_no_such(self.__name__, name))

    def __setattr__(self, name: str, value: Any) -> None:
        names = names_of(_below(self.__name__))
        if name in names:
            if isinstance(value, AliasModule):
                # The import system stores a module in its parent, where TransformerLens keeps the
                # class or function of that name.
                return
            module, attribute = names[name]
            setattr(importlib.import_module(module), attribute, value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        names = names_of(_below(self.__name__))
        if name in names:
            module, attribute = names[name]
            delattr(importlib.import_module(module), attribute)
        self.__dict__.pop(name, None)

    def __dir__(self) -> list[str]:
        return sorted(
            {*self.__dict__, *self.__dict__["__all__"], *_children(_below(self.__name__))}
        )


def _children(path: str) -> list[str]:
    """The submodules of a module."""
    prefix = path + "." if path else ""
    found = {name[len(prefix) :].partition(".")[0] for name in MODULES if name.startswith(prefix)}
    return sorted(found - {""})


def _no_such(module: str, name: str) -> str:
    path = f"{_below(module)}.{name}".lstrip(".")
    reason = reason_for(path)
    if reason is not None:
        return f"fastlens has no {ROOT}.{path}: {reason}."
    known = [*names_of(_below(module)), *_children(_below(module))]
    return f"fastlens has no {name!r} in {module}.{did_you_mean(name, known)}"


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return AliasModule(spec.name, f"TransformerLens' module {spec.name}, given by fastlens.")

    def exec_module(self, module: ModuleType) -> None:
        path = _below(module.__name__)
        names = list(names_of(path))
        fields: dict[str, Any] = {"__all__": names}
        if path == "":
            fields["__all__"] = [*names, *sorted({*_children(path), *_SAME_MODULE} - _NO_STAR)]
            fields["__version__"] = VERSION
            fields["__file__"] = str(Path(__file__).with_name("__init__.py"))
        module.__dict__.update(fields)


class _Distribution(Distribution):
    """What `importlib.metadata.version("transformer-lens")` reads."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: transformer-lens\nVersion: {VERSION}\n"

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


class Finder(MetaPathFinder):
    """Finds `transformer_lens` and what is below it, before any installed package is looked at."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of one of TransformerLens' modules; None for any other module.

        Raises: ModuleNotFoundError with the reason for a module that fastlens has not.
        """
        if not _is_theirs(fullname):
            return None
        if _below(fullname) not in MODULES:
            parent, _, name = fullname.rpartition(".")
            raise ModuleNotFoundError(_no_such(parent, name), name=fullname)
        spec = ModuleSpec(fullname, _Loader(), origin="fastlens.compat", is_package=True)
        spec.submodule_search_locations = []
        return spec

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        """TransformerLens' metadata, when it is asked for by name."""
        name = getattr(context, "name", None) or ""
        return [_Distribution()] if name.lower().replace("_", "-") == "transformer-lens" else []


_FINDER = Finder()
# The real package's modules, put aside while fastlens stands in for them.
_aside: dict[str, ModuleType] = {}


class Installation:
    """What `install` returns: leaving it as a context manager undoes the call."""

    def __init__(self, was_new: bool):
        self.was_new = was_new

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, *error: object) -> None:
        if self.was_new:
            uninstall()


def _take_out() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if _is_theirs(name)}


def is_installed() -> bool:
    """Whether `import transformer_lens` gives fastlens now."""
    return _FINDER in sys.meta_path


def install() -> Installation:
    """Make `import transformer_lens`, and every submodule path of it, resolve to fastlens.

    Whether or not the real package is installed; if it has been imported, its modules are put aside
    until `uninstall`. What imported it before keeps what it has: call this first. A second call
    does nothing. ``with install(): ...`` undoes itself, unless it was on already.

    `importlib.metadata.version("transformer-lens")` and `transformer_lens.__version__` say
    "3.9.0", the version whose interface this is.
    """
    if is_installed():
        return Installation(was_new=False)
    _aside.update(_take_out())
    sys.meta_path.insert(0, _FINDER)
    importlib.invalidate_caches()
    return Installation(was_new=True)


def uninstall() -> None:
    """Put everything back as it was before `install`: the same module objects, or none."""
    if not is_installed():
        return
    sys.meta_path.remove(_FINDER)
    _take_out()
    sys.modules.update(_aside)
    _aside.clear()
    importlib.invalidate_caches()
