"""Where sites lie in memory: rows of evenly spaced numbers, for kernels that take any strides."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SiteRows(NamedTuple):
    """The rows that several tensors share, one site after another.

    Attributes:
        offsets: ``[tensor, row]`` where each row starts, in elements from the tensor's first.
        length: Numbers in a row.
        steps: For each tensor, elements between neighbours in a row.
    """

    offsets: Tensor
    length: int
    steps: tuple[int, ...]


def starts(table: Tensor, strides: Sequence[int]) -> Tensor:
    """Where the block of each site starts, in elements; on the device of the table, in int64."""
    at = torch.zeros(len(table), dtype=torch.int64, device=table.device)
    for axis, stride in enumerate(strides):
        # Numbers and not a tensor of them: nothing is copied to a GPU.
        at = at + table[:, axis].to(torch.int64) * stride
    return at


def merged(
    block: Sequence[int], strides: Sequence[Sequence[int]]
) -> list[tuple[int, tuple[int, ...]]]:
    """The axes of a block as few as can be: (length, stride in each tensor).

    Neighbouring axes are one where each tensor steps through both evenly.
    """
    axes: list[tuple[int, tuple[int, ...]]] = []
    for length, *apart in zip(block, *strides, strict=True):
        if length == 1:
            continue
        if axes and all(
            outer == length * inner for outer, inner in zip(axes[-1][1], apart, strict=True)
        ):
            axes[-1] = axes[-1][0] * length, tuple(apart)
        else:
            axes.append((length, tuple(apart)))
    return axes


def site_rows(
    firsts: Sequence[Tensor], block: Sequence[int], strides: Sequence[Sequence[int]]
) -> SiteRows:
    """The rows of the blocks that start at ``firsts``.

    Args:
        firsts: For each tensor, where the block of each site starts (`starts`).
        block: Lengths of the block's axes.
        strides: For each tensor, those of the block's axes.
    """
    axes = merged(block, strides) or [(1, (0,) * len(firsts))]
    offsets = list(firsts)
    for length, apart in axes[:-1]:
        along = torch.arange(length, device=firsts[0].device)
        offsets = [
            (at[:, None] + along * stride).flatten()
            for at, stride in zip(offsets, apart, strict=True)
        ]
    length, steps = axes[-1]
    return SiteRows(torch.stack(offsets), length, steps)
