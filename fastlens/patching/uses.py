"""Which entries of which activation a chunk's runs patch, as arrays. No torch here."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fastlens.patching.frame import positions_of
from fastlens.patching.plan import Chunk, Plan, live_masks, live_steps, profile_of
from fastlens.patching.runs import Index
from fastlens.patching.sites import BY_ENTRY, SITES


class Entries(NamedTuple):
    """Entries that are patched in one go: each at most once, all the same way.

    Attributes:
        branch, pos: Whose, and where.
        column: Head, neuron or feature of each entry, or None where whole rows are patched.
        pos_rank, column_rank: Which of the patch's own selection it is, for values given as a
            tensor over that selection.
        selected: How many positions, columns and keys the patches select; None is all.
        keys: Key positions, for patterns; None is all.
        value, mode, codes: As in `PlannedPatch`.
        turn: Which come first at a place; those of one autoencoder's codes in a turn act together.
    """

    branch: np.ndarray
    pos: np.ndarray
    column: np.ndarray | None
    pos_rank: np.ndarray
    column_rank: np.ndarray | None
    selected: tuple[int | None, int | None, int | None]
    keys: tuple[int, ...] | None
    value: int
    mode: str
    codes: int | None = None
    turn: int = 0

    def only(self, which: np.ndarray) -> "Entries":
        """Some of the entries."""
        column = None if self.column is None else self.column[which]
        column_rank = None if self.column_rank is None else self.column_rank[which]
        return self._replace(
            branch=self.branch[which],
            pos=self.pos[which],
            column=column,
            pos_rank=self.pos_rank[which],
            column_rank=column_rank,
        )


@dataclass
class ChunkUse:
    """A chunk's branches and what they patch.

    Attributes:
        branch_of: For each run of the chunk and each example, its branch; -1 for the base run.
        example: Of each branch. Branches are numbered from 0; the wave puts its own before them.
        entries: (layer, stage) -> site -> what is patched there, in order.
    """

    branch_of: np.ndarray
    example: np.ndarray
    entries: dict[tuple[int, int], dict[str, list[Entries]]] = field(default_factory=dict)


def uses_of(plan: Plan, chunk: Chunk) -> ChunkUse:
    """What each stage of each layer patches in this chunk."""
    frame = plan.frame
    branches: list[tuple[int, int, int]] = []
    for at, number in enumerate(chunk.runs):
        for example in range(frame.batch):
            steps = live_steps(frame, plan.patches[number], example)
            if not steps:
                continue
            profile = profile_of(frame, steps) if len(steps) > 1 or frame.batch > 1 else True
            if profile is not None:
                start = min((mask & -mask).bit_length() for *_, mask in steps)
                branches.append((start, at, example))
    # Branches of one start lie together, so that attention finds them in one piece.
    branches.sort()
    branch_of = np.full((len(chunk.runs), frame.batch), -1, dtype=np.int64)
    example_of = np.array([example for _, _, example in branches], dtype=np.int64)
    groups: dict[tuple[int, int], dict[str, dict[tuple, _Growing]]] = {}
    for branch, (_, at, example) in enumerate(branches):
        branch_of[at, example] = branch
        seen: dict[tuple[str, int], _Turn] = {}
        patches = plan.patches[chunk.runs[at]]
        for patch, mask in zip(patches, live_masks(frame, patches, example), strict=True):
            if not mask:
                continue
            place = patch.site, patch.layer
            rank = seen[place] = seen.get(place, _FIRST).next(patch.codes)
            stage = SITES[patch.site].stage
            at_site = groups.setdefault((patch.layer, stage), {}).setdefault(patch.site, {})
            columns = patch.columns
            if columns is None and patch.site in BY_ENTRY:
                is_kv = SITES[patch.site].is_per_kv_head
                columns = tuple(range(frame.n_kv_heads if is_kv else frame.n_heads))
            selected = _length(patch.pos), _length(patch.columns), _length(patch.keys)
            key = rank, patch.value, patch.mode, columns is None, patch.keys, selected
            at_site.setdefault(key, _Growing()).add(branch, patch.pos, columns, mask)
    entries = {
        place: {
            site: [grown.entries(key) for key, grown in sorted(kinds.items(), key=_rank)]
            for site, kinds in sites.items()
        }
        for place, sites in groups.items()
    }
    return ChunkUse(branch_of, example_of, entries)


def _length(index: Index) -> int | None:
    return None if index is None else len(index)


class _Turn(NamedTuple):
    """When a patch acts among those of its branch and place: turn, number of the autoencoder (-1
    for none), and order within the two."""

    turn: int
    codes: int
    order: int

    def next(self, codes: int | None) -> "_Turn":
        """Of the next patch of the branch at the place."""
        if codes is not None and codes == self.codes:
            return self._replace(order=self.order + 1)
        return _Turn(self.turn + 1, -1 if codes is None else codes, 0)


_FIRST = _Turn(-1, -1, 0)


def _rank(item: tuple[tuple, "_Growing"]) -> _Turn:
    return item[0][0]


class _Growing:
    """Uses of one kind, gathered run by run."""

    def __init__(self) -> None:
        self.uses: list[tuple[int, Index, Index, int]] = []

    def add(self, branch: int, pos: Index, columns: Index, mask: int) -> None:
        self.uses.append((branch, pos, columns, mask))

    def entries(self, key: tuple) -> Entries:
        turn, value, mode, whole, keys, selected = key
        branch: list[int] = []
        pos: list[int] = []
        pos_rank: list[int] = []
        column: list[int] = []
        column_rank: list[int] = []
        for number, positions, columns, mask in self.uses:
            columns = columns or (-1,)
            n = len(columns)
            for position in positions_of(mask):
                branch += [number] * n
                pos += [position] * n
                rank = position if positions is None else positions.index(position)
                pos_rank += [rank] * n
                column += columns
                column_rank += range(n)
        as_array = [np.array(x, dtype=np.int64) for x in (branch, pos, pos_rank, column)]
        return Entries(
            branch=as_array[0],
            pos=as_array[1],
            column=None if whole else as_array[3],
            pos_rank=as_array[2],
            column_rank=None if whole else np.array(column_rank, dtype=np.int64),
            selected=selected,
            keys=keys,
            value=value,
            mode=mode,
            codes=None if turn.codes < 0 else turn.codes,
            turn=turn.turn,
        )
