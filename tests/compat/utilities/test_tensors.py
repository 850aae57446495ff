"""Small things about tensors, against TransformerLens."""

from typing import Any

import numpy as np
import pytest
import torch

from fastlens.compat.utilities import tensors as ours
from fastlens.errors import ShapeError

COMPARED = [
    "transformer_lens.utilities.tensors.check_structure",
    "transformer_lens.utilities.tensors.filter_dict_by_prefix",
    "transformer_lens.utilities.tensors.get_corner",
    "transformer_lens.utilities.tensors.get_cumsum_along_dim",
    "transformer_lens.utilities.tensors.get_offset_position_ids",
    "transformer_lens.utilities.tensors.is_lower_triangular",
    "transformer_lens.utilities.tensors.is_square",
    "transformer_lens.utilities.tensors.remove_batch_dim",
    "transformer_lens.utilities.tensors.repeat_along_head_dimension",
    "transformer_lens.utilities.tensors.to_numpy",
    "transformer_lens.utilities.tensors.transpose",
]


@pytest.fixture(scope="module")
def tl(theirs) -> Any:
    return theirs("tensors")


@pytest.mark.tl
@pytest.mark.parametrize(
    "value",
    [
        torch.arange(3.0, requires_grad=True),
        torch.nn.Parameter(torch.eye(2)),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor([True]),
        [1, 2],
        (1.5, 2),
        np.eye(2),
        3,
        2.5,
        True,
        "text",
    ],
    ids=repr,
)
def test_to_numpy(tl, value):
    found, wanted = ours.to_numpy(value), tl.to_numpy(value)
    assert isinstance(found, np.ndarray) and found.dtype == wanted.dtype
    assert np.array_equal(found, wanted)


def test_to_numpy_takes_numpy_s_own_numbers_and_refuses_the_rest():
    assert ours.to_numpy(np.float32(1.5)) == 1.5
    with pytest.raises(ValueError, match="takes a tensor"):
        ours.to_numpy({1, 2})


@pytest.mark.tl
def test_shapes(tl):
    x = torch.arange(24.0).view(1, 4, 6)
    for n in (2, 3, 100):
        assert torch.equal(ours.get_corner(x, n), tl.get_corner(x, n))
    assert torch.equal(ours.get_corner(x), tl.get_corner(x))
    for tensor in (x, x[0]):
        assert torch.equal(ours.remove_batch_dim(tensor), tl.remove_batch_dim(tensor))
        assert torch.equal(ours.transpose(tensor), tl.transpose(tensor))
    for dim in (-1, 1):
        for reverse in (False, True):
            found = ours.get_cumsum_along_dim(x, dim, reverse=reverse)
            assert torch.equal(found, tl.get_cumsum_along_dim(x, dim, reverse=reverse))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
    for offset in (0, 2):
        found = ours.get_offset_position_ids(offset, mask)
        assert torch.equal(found, tl.get_offset_position_ids(offset, mask))


@pytest.mark.tl
def test_kinds_of_matrices(tl):
    ones = torch.ones(3, 3)
    for x in (torch.eye(3), ones, ones.tril(), ones.triu(), torch.zeros(3, 2), torch.ones(2, 3, 3)):
        assert ours.is_square(x) == tl.is_square(x)
        assert ours.is_lower_triangular(x) == tl.is_lower_triangular(x)
    assert ours.is_square(ones) and ours.is_lower_triangular(ones.tril())
    assert not ours.is_lower_triangular(ones)


@pytest.mark.tl
def test_heads(tl):
    x = torch.randn(2, 5, 7)
    repeated = ours.repeat_along_head_dimension(x, 3)
    assert torch.equal(repeated, tl.repeat_along_head_dimension(x, 3))
    assert repeated.is_contiguous()
    view = ours.repeat_along_head_dimension(x, 3, clone_tensor=False)
    assert torch.equal(view, repeated) and view.data_ptr() == x.data_ptr()


@pytest.mark.tl
@pytest.mark.parametrize("prefix", ["h.0", "h.0.", "x"])
def test_prefixes(tl, prefix):
    weights = {"h.0.a": 1, "h.0.b.c": 2, "h.1.a": 3, "h.01": 4}
    before = dict(weights)
    assert ours.filter_dict_by_prefix(weights, prefix) == tl.filter_dict_by_prefix(weights, prefix)
    assert weights == before


STRUCTURES = {
    "same": torch.tensor([[1.0, 2, 3], [4, 5, 6], [0, 1, 2]]),
    "another row order": torch.tensor([[4.0, 5, 6], [1, 2, 3], [0, 1, 2]]),
    "another column order": torch.tensor([[2.0, 1, 3], [5, 4, 6], [1, 0, 2]]),
}


@pytest.mark.tl
@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_structure(tl, capsys, kind, verbose):
    ours.check_structure(STRUCTURES["same"], STRUCTURES[kind], verbose=verbose)
    found = capsys.readouterr().out
    tl.check_structure(STRUCTURES["same"], STRUCTURES[kind], verbose=verbose)
    # TransformerLens calls columns rows there.
    assert found.replace("\tcolumns", "\trows") == capsys.readouterr().out
    assert ("PASSED" in found) == (kind == "same")


def test_structure_says_all_that_differs(capsys):
    """TransformerLens says nothing of columns where rows differ too."""
    ours.check_structure(STRUCTURES["same"], -STRUCTURES["same"])
    assert capsys.readouterr().out == "row mismatch: [0, 1]\ncolumn mismatch: [0, 1]\n"
    with pytest.raises(ShapeError, match="two matrices of one shape"):
        ours.check_structure(torch.ones(2, 2), torch.ones(2, 3))
