"""The runs of a sweep: what each one patches. No torch here."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from fastlens.errors import SweepError
from fastlens.patching.sites import PER_FEATURE, SITES, Site

Selection: TypeAlias = int | slice | Sequence[int] | None
# Along one axis of an activation: all of it, or these entries.
Index: TypeAlias = tuple[int, ...] | None

FIELD_OF_AXIS = {
    "pos": "pos",
    "query_pos": "pos",
    "key_pos": "keys",
    "head": "columns",
    "neuron": "columns",
    "feature": "columns",
}


class PlannedPatch(NamedTuple):
    """One patch as the planner reads it: integers and names only.

    Attributes:
        site, layer: The activation; ``site`` is a key of `fastlens.patching.sites.SITES`.
        pos: Positions that are patched (query positions of a pattern); None is all.
        columns: Heads, neurons or features that are patched; None is all.
        keys: Key positions of a pattern that are patched; None is all.
        value: Where the new value comes from: an index into the sweep's list of sources.
        mode: ``"replace"``, ``"add"`` or ``"scale"``.
        codes: Of an autoencoder's codes there, its number in the sweep's list of them; None is the
            activation itself.
    """

    site: str
    layer: int
    pos: Index = None
    columns: Index = None
    keys: Index = None
    value: int = 0
    mode: str = "replace"
    codes: int | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """What is patched is indexed by these, after the batch axis."""
        return SITES[self.site].axes if self.codes is None else PER_FEATURE

    @property
    def hook_name(self) -> str:
        """The hook point that is patched."""
        return SITES[self.site].hook_name(self.layer)

    def indices(self) -> tuple[Index, ...]:
        """What is patched along each of `axes`."""
        return tuple(getattr(self, FIELD_OF_AXIS[axis]) for axis in self.axes)


class Run(NamedTuple):
    """One patched run: what is patched, all at once, and where its score goes.

    Attributes:
        cell: Index into the scores.
        patches: In the order given; the forward's order decides, then this one.
    """

    cell: tuple[int, ...]
    patches: tuple[PlannedPatch, ...]


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
    *,
    n_layers: int,
    cell_start: tuple[int, ...] = (),
    window: int = 1,
    value: int = 0,
    mode: str = "replace",
    codes: Mapping[int, int] | None = None,
) -> list[Run]:
    """One run for each combination of the indices along ``by``, in the order of ``by``.

    Args:
        indices: For every axis of ``by``, the indices that are swept.
        restricted: For axes outside ``by``, the entries a patch covers; an axis in neither is
            covered whole.
        n_layers: Of the model: where windows are cut off.
        cell_start: Put in front of every run's cell.
        window: Layers patched together around the swept one, as many below as above, the odd one
            below (Meng et al. 2202.05262); cut off at the ends.
        value, mode: Of every patch.
        codes: Number of each layer's autoencoder, for a site of codes.
    """
    rest = {
        FIELD_OF_AXIS[axis]: tuple(restricted[axis]) for axis in site.axes if axis in restricted
    }
    others = [axis for axis in by if axis != "layer"]
    fields = [FIELD_OF_AXIS[axis] for axis in others]
    numbered = [list(enumerate(indices[axis])) for axis in others]
    # The same few places come back in every layer: made once, shared by all runs.
    places = []
    for entries in itertools.product(*numbered):
        at: dict[str, Index] = {f: (index,) for f, (_, index) in zip(fields, entries, strict=True)}
        where = {**rest, **at}
        place = where.get("pos"), where.get("columns"), where.get("keys")
        places.append((tuple(cell for cell, _ in entries), place))
    at_layer = list(by).index("layer")
    found = []
    for layer_cell, layer in enumerate(indices["layer"]):
        layers = range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))
        numbers = [(one, None if codes is None else codes[one]) for one in layers]
        for cells, (pos, columns, keys) in places:
            patches = tuple(
                PlannedPatch(site.name, one, pos, columns, keys, value, mode, number)
                for one, number in numbers
            )
            cell = (*cells[:at_layer], layer_cell, *cells[at_layer:])
            found.append(Run(cell_start + cell, patches))
    found.sort(key=lambda run: run.cell)
    return found
