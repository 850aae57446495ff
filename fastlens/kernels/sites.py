"""Tables of sites: which vectors of an activation an op touches, checked before it touches any.

A table ``[site, width]`` holds one site a row: its index along each of the activation's first
``width`` axes, such as (row, pos, head). What a site holds is the block of the axes that are left.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlens.errors import ShapeError, SiteError


def check_table(table: Tensor, n_axes: int, most: int | None = None) -> None:
    """What can be known without reading it: two axes, integers, a width that fits.

    Args:
        n_axes: Axes of the activation.
        most: The largest width the op takes; all axes by default.

    Raises: ShapeError.
    """
    most = n_axes if most is None else most
    if table.ndim != 2 or table.is_floating_point() or table.dtype == torch.bool:
        raise ShapeError(
            f"a table of sites is [site, index along each of the first axes], integers; got "
            f"{table.dtype} {list(table.shape)}."
        )
    if table.shape[1] > most:
        raise ShapeError(
            f"the table has {table.shape[1]} indices a site, and an activation of {n_axes} axes "
            f"takes at most {most} here."
        )


def flat_sites(table: Tensor, lengths: Sequence[int], distinct: bool = False) -> Tensor:
    """The number of each site when the first axes, of these lengths, are counted as one.

    On the CPU, where it is checked: a table on another device is copied here, which waits for it.

    Args:
        lengths: Of the axes that the table indexes.
        distinct: Refuse a site that is named twice.

    Raises: SiteError for an index below 0 or past the end, and for a repeated site.
    """
    rows = table.detach().to("cpu", torch.int64)
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows))
    ends = torch.tensor(list(lengths), dtype=torch.int64)
    outside = ((rows < 0) | (rows >= ends)).any(1)
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        raise SiteError(
            f"site {first} of the table is {rows[first].tolist()}, and the activation has "
            f"{list(lengths)} places along those axes, counted from 0 ({int(outside.sum())} of "
            f"{len(rows)} sites lie outside). Count from the front, within the lengths."
        )
    strides = torch.tensor([math.prod(lengths[axis + 1 :]) for axis in range(len(lengths))])
    flat = (rows * strides).sum(1)
    if distinct and len(flat) > 1:
        in_order = flat.sort()
        same = in_order.values[1:] == in_order.values[:-1]
        if bool(same.any()):
            at = int(same.nonzero()[0])
            one, other = sorted(in_order.indices[at : at + 2].tolist())
            raise SiteError(
                f"sites {one} and {other} of the table are both {rows[one].tolist()}, so which "
                f"value stays would be chance. Name each site once, or patch in two calls."
            )
    return flat
