"""Codes of autoencoders in the wave: encoded row by distinct row, edited, and decoded as a change.

A branch takes part only where its codes change: one that leaves them as they were keeps the base
run's row, to the bit.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlens.errors import SweepError
from fastlens.ops.patch_sites import patch_sites_
from fastlens.patching.codes import PlacedCodes
from fastlens.patching.pack import Pack
from fastlens.patching.sites import PER_FEATURE
from fastlens.patching.sources import applied
from fastlens.patching.uses import Entries

# Codes that are held at once, bytes.
CODES_BYTES = 48 * 2**20


@runtime_checkable
class CodedLayer(Protocol):
    """What is needed of a layer of the wave."""

    wave: Any
    rows: dict[str, Tensor]

    @property
    def pack(self) -> Pack:
        """Which packed row is whose, as of now."""
        ...

    def place(self, entries: Entries) -> tuple[Tensor, Tensor, Tensor | None]:
        """Branch, position and column of each entry."""
        ...

    def own(self, wanted: Tensor) -> None:
        """Give branches rows of their own, copies of what they had."""
        ...


def patch_codes(layer: CodedLayer, name: str, codes: PlacedCodes, steps: Sequence[Entries]) -> None:
    """Patch one autoencoder's codes of the rows that go by ``name``.

    Args:
        steps: What is patched, in order, of branches for which it is this autoencoder's turn.

    Raises: SweepError if the change is not a number.
    """
    edit = _Edit(layer, name, codes, steps)
    found = [(items, change) for items, change in edit.changes() if len(items)]
    if not found:
        return
    items, change = (torch.cat(parts) for parts in zip(*found, strict=True))
    if bool(change.isnan().any()):
        raise SweepError(
            f"{codes.name} at {codes.hook} gives NaN. Is there one in the new values, or does the "
            f"autoencoder make them of this prompt?"
        )
    branch, pos = edit.branch[items], edit.pos[items]
    layer.own(layer.pack.mask(branch, pos))
    rows = layer.rows[name].flatten(1)
    places = layer.pack.table[branch, pos].unsqueeze(1)
    patch_sites_(rows, places, change, "add", is_checked=True)


@dataclass
class _Step:
    """One of the steps, its entries sorted by item.

    Attributes:
        entries: What is patched.
        item: Of each entry.
    """

    entries: Entries
    item: Tensor

    def between(self, start: int, stop: int) -> tuple[Entries, Tensor]:
        """The entries of items ``start .. stop - 1``, and each one's item."""
        low, high = torch.searchsorted(self.item, torch.tensor([start, stop])).tolist()
        if high - low == len(self.item):
            return self.entries, self.item
        which = torch.arange(low, high).numpy()
        return self.entries.only(which), self.item[low:high]


class _Edit:
    """The codes of some items, each a branch at a position, as they were and as they become.

    Attributes:
        branch, pos: Of each item; items that have the same row lie together.
        distinct: The rows.
        row_of: For each item, which of them is its.
    """

    def __init__(self, layer: CodedLayer, name: str, codes: PlacedCodes, steps: Sequence[Entries]):
        self.layer, self.codes = layer, codes
        self.rows = layer.rows[name].flatten(1)
        self.matrix = None if codes.matrix is None else codes.matrix.to(self.rows.device)
        table = layer.pack.table
        n_pos = table.shape[1]
        places = [layer.place(entries)[:2] for entries in steps]
        keys = [branch * n_pos + pos for branch, pos in places]
        every = torch.cat(keys).unique()
        rows = table[every // n_pos, every % n_pos]
        self.distinct, row_of = rows.unique(return_inverse=True)
        self.row_of, order = row_of.sort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        self.branch, self.pos = every[order] // n_pos, every[order] % n_pos
        self.steps = []
        for entries, key in zip(steps, keys, strict=True):
            # Where items go is worked out on the host, as the entries are.
            item, by_item = rank[torch.searchsorted(every, key)].cpu().sort(stable=True)
            self.steps.append(_Step(entries.only(by_item.numpy()), item))
        has_whole = any(entries.column is None for entries in steps)
        self.is_sparse = self.matrix is not None and not has_whole
        each = codes.n_features * codes.like.element_size()
        self.size = max(1, min(CODES_BYTES, layer.wave.blocks.codes) // (4 * each))

    def changes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Items that change, and by how much their rows do."""
        ends = torch.arange(0, len(self.distinct) + self.size, self.size, device=self.row_of.device)
        starts = torch.searchsorted(self.row_of, ends).tolist()
        for block, (start, stop) in enumerate(itertools.pairwise(starts)):
            first = block * self.size
            x = self.rows[self.distinct[first : first + self.size]]
            c = self.codes.encode(x)
            if self.is_sparse:
                yield self._sparse(c, first, start, stop)
                continue
            is_shared = self.matrix is None and not self.codes.needs_input
            before = self.codes.decode(c) if is_shared else None
            for low in range(start, stop, self.size):
                yield self._dense(c, before, first, low, min(stop, low + self.size))

    def _sparse(self, c: Tensor, first: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Only of the features that are patched, and of these only what changes."""
        n = self.codes.n_features
        assert self.matrix is not None
        parts, keys = [], []
        for step in self.steps:
            entries, item = step.between(start, stop)
            if len(item):
                feature = self.layer.place(entries)[2]
                assert feature is not None
                parts.append(entries)
                keys.append(item.to(feature.device) * n + feature)
        pairs = torch.cat(keys).unique()
        item, feature = pairs // n, pairs % n
        old = c[self.row_of[item] - first, feature]
        new = old.clone()
        for entries, key in zip(parts, keys, strict=True):
            at = torch.searchsorted(pairs, key)
            new[at] = applied(new[at], self._value(entries, old), entries.mode)
        changes = new != old
        items, counts = item[changes].unique_consecutive(return_counts=True)
        if not len(items):
            return items, self.rows[:0]
        change = F.embedding_bag(
            feature[changes],
            self.matrix,
            counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=(new - old)[changes],
        )
        return items, change

    def _dense(
        self, c: Tensor, before: Tensor | None, first: int, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Whole codes of items ``start .. stop - 1``."""
        local = self.row_of[start:stop] - first
        old = c[local]
        new = old.clone()
        for step in self.steps:
            entries, item = step.between(start, stop)
            if len(item):
                feature = self.layer.place(entries)[2]
                at = (item - start).to(new.device)
                where = (at,) if feature is None else (at, feature)
                new[where] = applied(new[where], self._value(entries, old), entries.mode)
        changes = (new != old).any(1).nonzero()[:, 0]
        if self.matrix is not None:
            change = (new - old)[changes] @ self.matrix
        elif self.codes.needs_input:
            x = self.rows[self.distinct[first + local[changes]]]
            self.codes.encode(x)
            after = self.codes.decode(new[changes])
            self.codes.encode(x)
            change = after - self.codes.decode(old[changes])
        else:
            assert before is not None
            change = self.codes.decode(new[changes]) - before[local[changes]]
        return start + changes, change

    def _value(self, entries: Entries, like: Tensor) -> Any:
        """The value the source gives: a number, or ``[entry]``, or ``[entry, feature]``."""
        wave, pack = self.layer.wave, self.layer.pack
        source = wave.sources[entries.value]
        branch, pos, feature = self.layer.place(entries)
        example, batch = pack.example[branch], wave.frame.batch
        if source.reads_other:
            return source.of_examples(
                lambda one: self._found(pack.table[batch + one, pos], feature), example, batch
            )
        sizes = {"pos": wave.n_all_pos, "feature": self.codes.n_features, "batch": batch}
        return source.of_entries("", 0, entries, example, sizes, like, axes=PER_FEATURE)

    def _found(self, rows: Tensor, feature: Tensor | None) -> Tensor:
        """Codes of packed rows, of one feature each or whole."""
        distinct, which = rows.unique(return_inverse=True)
        found = []
        order = which.argsort(stable=True)
        ends = torch.arange(0, len(distinct) + self.size, self.size, device=rows.device)
        starts = torch.searchsorted(which[order], ends).tolist()
        for block, (start, stop) in enumerate(itertools.pairwise(starts)):
            first = block * self.size
            c = self.codes.encode(self.rows[distinct[first : first + self.size]])
            some = order[start:stop]
            at = which[some] - first
            found.append(c[at] if feature is None else c[at, feature[some]])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return torch.cat(found)[back]
