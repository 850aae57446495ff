"""Find things by walking a package: one module, one entry, no list to edit."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Generic, TypeVar

from fastlens.errors import FastlensError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries named by the modules of a package that define ``attribute``.

    >>> families = Registry("fastlens.weights.families", "FAMILY")
    >>> "gpt2" in families.names()
    True

    The package is walked at the first look-up. A module without the attribute is an error, so a
    half-written entry cannot go unnoticed; names that start with an underscore are passed over.
    """

    def __init__(self, package: str, attribute: str):
        self.package = package
        self.attribute = attribute
        self._entries: dict[str, T] | None = None

    @property
    def entries(self) -> dict[str, T]:
        """Module name -> entry, in alphabetical order."""
        if self._entries is None:
            package = importlib.import_module(self.package)
            names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
            self._entries = {
                name: getattr(importlib.import_module(f"{self.package}.{name}"), self.attribute)
                for name in names
                if not name.startswith("_")
            }
        return self._entries

    def names(self) -> list[str]:
        """Names of all entries, sorted."""
        return list(self.entries)

    def get(self, name: str) -> T:
        """The entry of that name, or an error with near names."""
        try:
            return self.entries[name]
        except KeyError:
            raise FastlensError(
                f"no {self.attribute} named {name!r} in {self.package}, which has "
                f"{', '.join(self.entries)}.{did_you_mean(name, self.entries)}"
            ) from None

    def __iter__(self) -> Iterator[T]:
        return iter(self.entries.values())
