"""What each op must compute and move at least: operations, bytes, and the time that takes.

Bytes are compulsory traffic with GPU memory: every input once, every output once. What a kernel
reads again it should find in cache. ``benchmarks`` divides measured times by these, docs/gpu.md
prints them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.cuda_devices import Gpu
from fastlens.kernels.spans import Span


@dataclass(frozen=True)
class Work:
    """Of one call.

    Attributes:
        flops: Multiplications and additions.
        n_bytes: To and from GPU memory.
        exponentials: Of scores.
        is_matrix: The products run on tensor cores; else in float32 outside them.
    """

    flops: float
    n_bytes: float
    exponentials: float = 0.0
    is_matrix: bool = False

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.n_bytes

    def times(self, gpu: Gpu) -> dict[str, float]:
        """Seconds that each of its parts takes alone at the GPU's full rate."""
        return {
            "memory": self.n_bytes / gpu.bandwidth,
            "arithmetic": self.flops / (gpu.matrix if self.is_matrix else gpu.plain),
            "exp": self.exponentials / gpu.exponentials,
        }

    def roofline(self, gpu: Gpu) -> float:
        """Seconds below which no kernel can be that uses these units."""
        return max(self.times(gpu).values())

    def bound(self, gpu: Gpu) -> str:
        """The part that takes longest."""
        times = self.times(gpu)
        return max(times, key=lambda part: times[part])


def visible_pairs(
    n_queries: int, n_keys: int, is_causal: bool = True, window: int | None = None
) -> int:
    """(query, key) pairs of one head, the last query standing at the last key."""
    first = n_keys - n_queries
    pairs = 0
    for position in range(first, n_keys):
        high = position + 1 if is_causal else n_keys
        low = 0 if window is None else max(0, position - window + 1)
        pairs += high - low
    return pairs


def attention(
    batch: int,
    n_queries: int,
    n_keys: int,
    heads: int,
    kv_heads: int,
    d_head: int,
    itemsize: int,
    is_causal: bool = True,
    window: int | None = None,
    is_capped: bool = False,
) -> Work:
    """``4 B H P d`` operations on ``P`` visible pairs; q, k, v, z and the log-sum-exp.

    A soft cap is one more exponential a pair.
    """
    pairs = batch * heads * visible_pairs(n_queries, n_keys, is_causal, window)
    rows, keys = batch * n_queries * heads, batch * n_keys * kv_heads
    n_bytes = 2 * itemsize * d_head * (rows + keys) + 4 * rows
    exponentials = pairs * (2 if is_capped else 1)
    return Work(4 * pairs * d_head, n_bytes, exponentials, is_matrix=itemsize == 2)


def pattern_rows(
    n_rows: int, n_keys: int, d_head: int, itemsize: int, key_heads: int, d_out: int = 4
) -> Work:
    """``2 S N d`` for ``S`` rows; ``key_heads`` (example, head) pairs whose keys are read."""
    n_bytes = itemsize * d_head * (n_rows + key_heads * n_keys) + d_out * n_rows * n_keys
    return Work(2 * n_rows * n_keys * d_head, n_bytes + 28 * n_rows, n_rows * n_keys)


def attention_summary(
    batch: int, n_pos: int, heads: int, kv_heads: int, d_head: int, itemsize: int, n_masses: int
) -> Work:
    """``2 B H P d``; q, k and the log-sum-exp in, the entropy and the masses out."""
    pairs = batch * heads * visible_pairs(n_pos, n_pos)
    rows = batch * n_pos * heads
    n_bytes = itemsize * d_head * (rows + batch * n_pos * kv_heads) + 4 * rows * (2 + n_masses)
    return Work(2 * pairs * d_head, n_bytes, pairs, is_matrix=itemsize == 2)


@dataclass(frozen=True)
class Branches:
    """Runs of a sweep in one layer: ``n`` of them that own the positions from ``start`` on."""

    n: int
    start: int
    stop: int


# `z` by layer, position and head of GPT-2 small (2,160 sites), 15 tokens that differ from the tenth
# on: in the last layer each of 12 x 12 (layer, head) pairs has a run from every such position on.
Z_SWEEP = [Branches(144, start, 15) for start in range(10, 15)]
LONG_SWEEP = [Branches(16, 960, 1024)]


def packed(branches: Sequence[Branches]) -> tuple[torch.Tensor, list[Span], int]:
    """Table, spans and number of packed rows: the base run first, then each branch's own."""
    n_pos = max(b.stop for b in branches)
    n_rows, rows, spans, first = n_pos, [], [], 0
    for group in branches:
        length = group.stop - group.start
        for _ in range(group.n):
            row = torch.arange(n_pos)
            row[group.start : group.stop] = torch.arange(n_rows, n_rows + length)
            n_rows += length
            rows.append(row)
        spans.append(Span(torch.arange(first, first + group.n), group.start, group.stop))
        first += group.n
    return torch.stack(rows), spans, n_rows


def suffix_attention(
    branches: Sequence[Branches], heads: int, kv_heads: int, d_head: int, itemsize: int
) -> Work:
    """``4 H P d``; the base run's keys and values once, and each branch's own."""
    own = sum(b.n * (b.stop - b.start) for b in branches)
    # The row at position p sees p + 1 keys.
    pairs = heads * sum(b.n * sum(range(b.start + 1, b.stop + 1)) for b in branches)
    shared = max(b.start for b in branches)
    n_bytes = 2 * itemsize * d_head * (heads * own + kv_heads * (own + shared)) + 8 * heads * own
    return Work(4 * pairs * d_head, n_bytes, pairs, is_matrix=itemsize == 2)


def gathered_bytes(branches: Sequence[Branches], kv_heads: int, d_head: int, itemsize: int) -> int:
    """What gathering every branch's keys and values first would write and read again."""
    return 2 * 2 * itemsize * d_head * kv_heads * sum(b.n * b.stop for b in branches)


def norm(n_rows: int, d: int, itemsize: int, is_centred: bool) -> Work:
    """8 (LayerNorm) or 4 (RMSNorm) operations a number; mean and scale are written too."""
    statistics = (2 if is_centred else 1) * 4 * n_rows
    factors = (2 if is_centred else 1) * d * itemsize
    return Work(
        (8 if is_centred else 4) * n_rows * d, 2 * n_rows * d * itemsize + statistics + factors
    )


def rotary(n_rows: int, heads: int, rotary_dim: int, d_head: int, itemsize: int) -> Work:
    """3 operations a number that turns; cos and sin once a position."""
    n_bytes = itemsize * (2 * n_rows * heads * d_head + 2 * n_rows * rotary_dim)
    return Work(3 * n_rows * heads * rotary_dim, n_bytes)


def patch_sites(n_sites: int, length: int, itemsize: int, n_copied: int = 0) -> Work:
    """Values in, sites out, two indices a site; the clone of ``n_copied`` numbers before it."""
    return Work(0, itemsize * (2 * n_sites * length + 2 * n_copied) + 16 * n_sites)


def capture(n_sites: int, length: int, itemsize: int, itemsize_out: int) -> Work:
    """Rows in, rows out, one index a row."""
    return Work(0, n_sites * (length * (itemsize + itemsize_out) + 8))


def capture_int8(n_sites: int, length: int, itemsize: int) -> Work:
    """Rows in, bytes and one scale a row out; a largest number, a division and a rounding each."""
    return Work(4 * n_sites * length, n_sites * (length * (itemsize + 1) + 8 + 4))


def dequantize(n_weights: int, block: int, block_bytes: int, itemsize: int, n_scales: int) -> Work:
    """Packed blocks in, weights out; up to two operations a weight."""
    return Work(
        2 * n_weights, n_weights * block_bytes / block + n_weights * itemsize + 4 * n_scales
    )
