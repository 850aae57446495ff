"""Runs of neighbouring rows that attention is asked for, by which branches share them."""

from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor


class Span(NamedTuple):
    """Branches whose rows ``start .. stop - 1`` are wanted.

    Attributes:
        branches: Which.
        start, stop: Positions.
    """

    branches: Int[Tensor, " branch"]
    start: int
    stop: int
