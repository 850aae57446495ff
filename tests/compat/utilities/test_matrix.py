"""Composition scores and corners of factored matrices, against TransformerLens."""

import pytest
import torch

from fastlens.compat.utilities.matrix import (
    FactoredMatrix,
    composition_scores,
    get_corner,
    get_matrix_corner,
)
from tests.close import assert_close_to

COMPARED = [
    "transformer_lens.utilities.matrix.composition_scores",
    "transformer_lens.utilities.matrix.get_matrix_corner",
]


@pytest.mark.tl
@pytest.mark.parametrize("broadcast", [True, False])
def test_as_transformer_lens(theirs, broadcast):
    tl = theirs("matrix")
    A, B = torch.randn(2, 3, 9, 4).double(), torch.randn(2, 3, 4, 9).double()
    C, D = torch.randn(2, 3, 9, 5).double(), torch.randn(2, 3, 5, 7).double()
    found = composition_scores(FactoredMatrix(A, B), FactoredMatrix(C, D), broadcast)
    wanted = tl.composition_scores(
        tl.FactoredMatrix(A, B), tl.FactoredMatrix(C, D), broadcast_dims=broadcast
    )
    assert found.shape == ((2, 3, 2, 3) if broadcast else (2, 3))
    assert_close_to(found, wanted, atol=1e-12)
    for n in (1, 3):
        found = get_matrix_corner(FactoredMatrix(A, B), n=n)
        assert_close_to(found, tl.get_matrix_corner(tl.FactoredMatrix(A, B), n=n), atol=1e-12)


def test_a_corner_may_stay_factored():
    A, B = torch.randn(9, 4), torch.randn(4, 9)
    corner = get_corner(FactoredMatrix(A, B), 2)
    assert isinstance(corner, FactoredMatrix)
    assert_close_to(corner.AB, (A @ B)[:2, :2], atol=1e-6)
