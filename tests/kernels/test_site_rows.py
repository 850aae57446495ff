"""Rows of sites in memory: what they name is what indexing names, in as few rows as can be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlens.kernels.site_rows import merged, site_rows, starts


def test_axes_are_merged_where_every_tensor_steps_evenly():
    dense, sliced = (40, 8, 4, 1), (40, 8, 8, 1)
    assert merged((3, 5, 2, 4), [dense]) == [(120, (1,))]
    assert merged((3, 5, 2, 4), [(80, 16, 8, 1)]) == [(30, (8,)), (4, (1,))]
    assert merged((5, 1, 4), [(4, 999, 1)]) == [(20, (1,))]
    # A value for all is read at one place, whatever the activation does.
    assert merged((2, 4), [dense[2:], (0, 0)]) == [(8, (1, 0))]
    assert merged((2, 4), [dense[2:], (0, 1)]) == [(2, (4, 0)), (4, (1, 1))]
    assert merged((2, 4), [dense[2:], sliced[2:]]) == [(2, (4, 8)), (4, (1, 1))]
    assert merged((), [()]) == [] and merged((1, 1), [(7, 7)]) == []


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_starts_count_in_int64(dtype):
    table = torch.tensor([[1, 2], [0, 200]]).to(dtype)
    at = starts(table, (2**40, 3))
    assert at.dtype == torch.int64 and at.tolist() == [2**40 + 6, 600]
    assert starts(torch.zeros(2, 0, dtype=dtype), ()).tolist() == [0, 0]


@given(st.data())
def test_rows_name_what_indexing_names(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    width = data.draw(st.integers(0, len(shape)))
    # Each number is where it lies.
    x = torch.arange(torch.Size(shape).numel()).view([shape[axis] for axis in order])
    x = x.permute([order.index(axis) for axis in range(len(shape))])
    x = x[tuple(slice(data.draw(st.integers(0, n - 1)), None) for n in x.shape)]
    first = x.storage_offset()
    table = torch.stack([torch.randint(n, (3,)) for n in x.shape[:width]], 1) if width else None
    table = torch.zeros(3, 0, dtype=torch.int64) if table is None else table
    block, strides = x.shape[width:], x.stride()
    rows = site_rows([starts(table, strides[:width])], block, [strides[width:]])
    found = first + rows.offsets[0][:, None] + torch.arange(rows.length) * rows.steps[0]
    index = tuple(table.unbind(1)) if width else (None,)
    named = x[index] if width else x.expand(3, *x.shape)
    assert torch.equal(found.flatten(), named.flatten())


def test_two_tensors_share_their_rows():
    x, v = torch.zeros(2, 3, 4), torch.arange(3.0)[None, :, None].expand(5, 3, 4)
    table = torch.tensor([[1]])
    rows = site_rows(
        [starts(table, x.stride()[:1]), torch.tensor([0])], (3, 4), [x.stride()[1:], v.stride()[1:]]
    )
    assert (rows.length, rows.steps) == (4, (1, 0))
    assert rows.offsets.tolist() == [[12, 16, 20], [0, 1, 2]]
