"""Tables of sites: flattened as torch counts, and refused before anything is touched."""

import pytest
import torch

from fastlens.errors import ShapeError, SiteError
from fastlens.kernels.sites import check_table, flat_sites


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_flat_numbers_are_those_of_the_flattened_axes(dtype):
    lengths = (3, 1, 4)
    table = torch.cartesian_prod(*map(torch.arange, lengths)).to(dtype)
    numbers = torch.arange(12).view(lengths)
    order = torch.randperm(12)
    assert torch.equal(flat_sites(table[order], lengths), numbers[tuple(table[order].long().T)])


def test_a_table_without_indices_names_the_whole():
    assert flat_sites(torch.zeros(2, 0, dtype=torch.long), ()).tolist() == [0, 0]


def test_a_repeated_site_is_refused_only_where_it_would_be_chance():
    table = torch.tensor([[1, 0], [0, 1], [1, 0]])
    assert flat_sites(table, (2, 2)).tolist() == [2, 1, 2]
    with pytest.raises(SiteError, match="sites 0 and 2"):
        flat_sites(table, (2, 2), distinct=True)


def test_an_empty_axis_has_no_site():
    with pytest.raises(SiteError, match="1 of 1 sites"):
        flat_sites(torch.zeros(1, 2, dtype=torch.long), (3, 0))


def test_what_is_no_table():
    for table in (torch.zeros(3), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)):
        with pytest.raises(ShapeError, match="a table of sites is"):
            check_table(table, 3)
    check_table(torch.zeros(1, 3, dtype=torch.int32), 3)
    with pytest.raises(ShapeError, match="at most 2"):
        check_table(torch.zeros(1, 3, dtype=torch.int32), 3, 2)
