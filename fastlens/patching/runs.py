"""The runs of a sweep: which site, layer and slice each one patches. No torch here."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fastlens.errors import SweepError
from fastlens.patching.sites import Site

Selection: TypeAlias = int | slice | Sequence[int] | None
# Along one axis of an activation: all of it, one entry, or several.
AxisIndex: TypeAlias = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Run:
    """One patched run: the entries of one activation that are replaced, and where its score goes.

    Attributes:
        cell: Index into the scores.
        site, layer: The activation.
        index: For each of ``site.axes``, what is replaced.
    """

    cell: tuple[int, ...]
    site: Site
    layer: int
    index: tuple[AxisIndex, ...]

    @property
    def hook_name(self) -> str:
        """The hook point that is patched."""
        return self.site.hook_name(self.layer)


def chosen(selection: Selection, size: int, axis: str) -> list[int]:
    """Indices along an axis of length ``size``: negative ones count from the end, None is all.

    Raises: SweepError if one is out of range, repeated, or none is left.
    """
    if selection is None:
        return list(range(size))
    if isinstance(selection, slice):
        found = list(range(size))[selection]
    else:
        found = [selection] if isinstance(selection, int) else [int(i) for i in selection]
        for index in found:
            if not -size <= index < size:
                raise SweepError(f"{axis} {index} is out of range: there are {size}.")
        found = [index % size for index in found]
    if not found or len(set(found)) < len(found):
        raise SweepError(f"{axis} selection {selection!r} is empty or names an index twice.")
    return found


def runs_of(
    site: Site,
    by: Sequence[str],
    indices: Mapping[str, Sequence[int]],
    restricted: Mapping[str, Sequence[int]],
    cell_start: tuple[int, ...] = (),
) -> list[Run]:
    """One run for each combination of the indices along ``by``, in the order of ``by``.

    Args:
        indices: For every axis of ``by``, the indices that are swept.
        restricted: For axes outside ``by``, the entries a patch covers; an axis in neither is
            covered whole.
        cell_start: Put in front of every run's cell.
    """
    runs = []
    rest = {axis: tuple(restricted[axis]) for axis in site.axes if axis in restricted}
    for cell in itertools.product(*(range(len(indices[axis])) for axis in by)):
        at = {axis: indices[axis][i] for axis, i in zip(by, cell, strict=True)}
        where: dict[str, AxisIndex] = {**rest, **at}
        runs.append(
            Run(
                cell=(*cell_start, *cell),
                site=site,
                layer=at["layer"],
                index=tuple(where.get(axis) for axis in site.axes),
            )
        )
    return runs
