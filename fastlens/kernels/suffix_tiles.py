"""What each program of the suffix kernel does: which rows, over which keys. Numpy, no torch.

Branches whose leading packed rows are the same share those keys: their rows go over them together,
in the first launch, and each branch goes on alone over its own keys in the second.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastlens.kernels.masks import AttentionRule

Integers = np.ndarray
# What a row's state costs to write and read again, as keys read for its tile. Not measured.
STATE_COST = 64


class Tiles(NamedTuple):
    """The work of one launch.

    Attributes:
        tiles: ``[tile, 5]``: first entry, number of entries, branch whose keys are read, first key,
            end of the keys.
        entries: ``[entry, 3]``: row of the output, packed row of the query, absolute position.
    """

    tiles: Integers
    entries: Integers


class _Pieces(NamedTuple):
    """Neighbouring rows of one branch, the unit that shares a prefix or does not.

    Attributes:
        branch, start, stop: Which rows.
        first: The row of the output that the first of them is.
    """

    branch: Integers
    start: Integers
    stop: Integers
    first: Integers


def tiles_of(
    table: Integers,
    spans: Sequence[tuple[Integers, int, int]],
    rule: AttentionRule,
    block_rows: tuple[int, int],
    key_mask: Integers | None = None,
    state_cost: int = STATE_COST,
) -> tuple[Tiles, Tiles]:
    """The tiles of the first launch (none if no prefix is worth sharing) and of the second.

    Args:
        table: ``[branch, pos]``, the packed row of each branch at each position.
        spans: Branches, first position and end of the wanted rows, in the order of the output.
        block_rows: Most rows of a tile in either launch.
        key_mask: ``[branch, pos]``. Branches share a prefix only where they mask the same keys.
        state_cost: A group shares a prefix only if that saves more keys than this a tile.
    """
    pieces = _pieces(spans)
    shared = np.zeros(len(pieces.branch), np.int64)
    first = Tiles(np.zeros((0, 5), np.int64), np.zeros((0, 3), np.int64))
    if len(shared) > 1:
        codes = table if key_mask is None else 2 * table + key_mask
        order, common = _sorted_prefixes(codes, pieces.branch)
        sorted_pieces = _Pieces(*(field[order] for field in pieces))
        groups = _groups(common, sorted_pieces, rule, block_rows[0], state_cost)
        made = []
        for low, high, n_keys in groups:
            shared[order[low:high]] = n_keys
            group = _Pieces(*(field[low:high] for field in sorted_pieces))
            made.append(_shared_tiles(table, group, n_keys, rule, block_rows[0]))
        first = _joined(made) if made else first
    return first, _own_tiles(table, pieces, shared, rule, block_rows[1])


def longest_piece(spans: Sequence[tuple[Integers, int, int]]) -> int:
    """How many neighbouring rows of one branch are wanted, at most."""
    return max((stop - start for branches, start, stop in spans if len(branches)), default=0)


def _pieces(spans: Sequence[tuple[Integers, int, int]]) -> _Pieces:
    spans = [span for span in spans if len(span[0]) and span[2] > span[1]]
    if not spans:
        return _Pieces(*(np.zeros(0, np.int64) for _ in range(4)))
    counts = [len(span[0]) for span in spans]
    branch = np.concatenate([span[0] for span in spans]).astype(np.int64)
    start = np.repeat([start for _, start, _ in spans], counts)
    stop = np.repeat([stop for _, _, stop in spans], counts)
    lengths = stop - start
    return _Pieces(branch, start, stop, np.cumsum(lengths) - lengths)


def _sorted_prefixes(codes: Integers, branch: Integers) -> tuple[Integers, Integers]:
    """An order that puts equal prefixes together, and how long each piece's and the next's is."""
    # Bytes of big-endian numbers sort as the rows of numbers do.
    rows = np.ascontiguousarray((codes[branch] + 2).astype(">u4"))
    n_pos = rows.shape[1]
    if not n_pos:
        return np.arange(len(rows)), np.zeros(len(rows) - 1, np.int64)
    order = np.argsort(rows.view(f"V{4 * n_pos}")[:, 0], kind="stable")
    rows = rows[order]
    same = rows[1:] == rows[:-1]
    return order, np.where(same.all(1), n_pos, same.argmin(1))


def _groups(
    common: Integers, pieces: _Pieces, rule: AttentionRule, block_rows: int, state_cost: int
) -> list[tuple[int, int, int]]:
    """Ranges of sorted pieces and the prefix each shares, so that most keys are saved.

    The ranges of pieces with a common prefix form a tree. From its leaves up: a range shares its
    own prefix, or its parts share their longer ones, whichever saves more.
    """
    n_rows = pieces.stop - pieces.start
    n_tiles = -(-n_rows // block_rows)
    first_key = np.zeros_like(n_rows)
    if rule.window is not None:
        first_key = np.maximum(0, pieces.start - rule.window + 1)

    def saved(low: int, high: int, n_keys: int) -> int:
        keys = np.maximum(0, n_keys - first_key[low:high])
        together = -(-int(n_rows[low:high].sum()) // block_rows)
        apart = int((n_tiles[low:high] * keys).sum())
        return apart - together * (int(keys.max()) + state_cost)

    # Open ranges, of growing prefixes: prefix, first piece, what their parts save, their groups.
    ranges: list[tuple[int, int, int, list[tuple[int, int, int]]]] = [(0, 0, 0, [])]
    for end, n_keys in enumerate([*common.tolist(), 0], start=1):
        first, inner, inside = end - 1, 0, []
        while ranges[-1][0] > n_keys:
            prefix, first, more, groups = ranges.pop()
            inner, inside = inner + more, [*groups, *inside]
            here = saved(first, end, prefix)
            if here > inner:
                inner, inside = here, [(first, end, prefix)]
        if ranges[-1][0] < n_keys:
            ranges.append((n_keys, first, inner, inside))
        else:
            prefix, outer, more, groups = ranges.pop()
            groups.extend(inside)
            ranges.append((prefix, outer, more + inner, groups))
    return ranges[0][3]


def _shared_tiles(
    table: Integers, pieces: _Pieces, n_keys: int, rule: AttentionRule, block_rows: int
) -> Tiles:
    """A group's rows over the keys it shares; rows of one position together."""
    entries = _entries(table, pieces)
    entries = entries[np.argsort(entries[:, 2], kind="stable")]
    tiles = []
    for first in range(0, len(entries), block_rows):
        pos = entries[first : first + block_rows, 2]
        low = 0 if rule.window is None else max(0, int(pos[0]) - rule.window + 1)
        high = min(n_keys, int(pos[-1]) + 1) if rule.causal else n_keys
        if low < high:
            tiles.append((first, len(pos), int(pieces.branch[0]), low, high))
    return Tiles(np.array(tiles, np.int64).reshape(-1, 5), entries)


def _own_tiles(
    table: Integers, pieces: _Pieces, shared: Integers, rule: AttentionRule, block_rows: int
) -> Tiles:
    """Each piece's rows over the keys it does not share; every row is in one tile."""
    n_blocks = -(-(pieces.stop - pieces.start) // block_rows)
    piece = np.repeat(np.arange(len(n_blocks)), n_blocks)
    block = np.arange(len(piece)) - np.repeat(np.cumsum(n_blocks) - n_blocks, n_blocks)
    start = pieces.start[piece] + block * block_rows
    stop = np.minimum(pieces.stop[piece], start + block_rows)
    low = shared[piece]
    if rule.window is not None:
        low = np.maximum(low, start - rule.window + 1)
    high = stop if rule.causal else np.full_like(stop, table.shape[1])
    first = pieces.first[piece] + block * block_rows
    tiles = np.stack([first, stop - start, pieces.branch[piece], low, high], 1)
    return Tiles(tiles, _entries(table, pieces))


def _entries(table: Integers, pieces: _Pieces) -> Integers:
    lengths = pieces.stop - pieces.start
    piece = np.repeat(np.arange(len(lengths)), lengths)
    inside = np.arange(len(piece)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    pos = pieces.start[piece] + inside
    return np.stack([pieces.first[piece] + inside, table[pieces.branch[piece], pos], pos], 1)


def _joined(parts: Sequence[Tiles]) -> Tiles:
    return Tiles(
        np.concatenate(list(_moved(parts))), np.concatenate([part.entries for part in parts])
    )


def _moved(parts: Sequence[Tiles]) -> Iterator[Integers]:
    """Each part's tiles, their first entries counted from the start of all."""
    n_entries = 0
    for tiles, entries in parts:
        yield tiles + np.array([n_entries, 0, 0, 0, 0])
        n_entries += len(entries)
