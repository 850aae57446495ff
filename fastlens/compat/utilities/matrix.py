"""Composition of factored matrices, and a look at their corners."""

from jaxtyping import Float
from torch import Tensor

from fastlens.compat.utilities.tensors import get_corner
from fastlens.factored_matrix import FactoredMatrix, composition_scores

__all__ = ["FactoredMatrix", "composition_scores", "get_corner", "get_matrix_corner"]


def get_matrix_corner(matrix: FactoredMatrix, n: int = 3) -> Float[Tensor, "..."]:
    """The first ``n`` entries along every axis, multiplied out."""
    return matrix.get_corner(n)
