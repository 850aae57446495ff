"""What Python hands to the launchers of csrc/: read as their header says, it gives the op."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlens.errors import ShapeError, SiteError
from fastlens.kernels import compiled, reference
from fastlens.kernels.cuda_capture import capture
from fastlens.kernels.cuda_capture_int8 import capture_int8
from fastlens.kernels.cuda_dequantize import dequantize
from fastlens.kernels.cuda_patch_sites import patch_sites
from fastlens.kernels.cuda_patch_sites_in_place import block_length, patch_sites_
from fastlens.kernels.reference_packed import FORMATS
from tests.kernels.launchers_in_python import PythonLaunchers

DTYPES, MODES = list(compiled.DTYPES), list(compiled.MODES)


@pytest.fixture
def launchers(monkeypatch) -> PythonLaunchers:
    made = PythonLaunchers()
    monkeypatch.setattr(compiled, "module", lambda: made)
    return made


def strided(draw, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of that shape whose axes lie in any order, with gaps."""
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.integers(1, 2)) for _ in shape]
    big = torch.randn([shape[axis] * gaps[axis] + 1 for axis in order]).to(dtype)
    x = big.permute([order.index(axis) for axis in range(len(shape))])
    return x[tuple(slice(1, None, gap) for gap in gaps)][tuple(map(slice, shape))]


def sites(draw, lengths: list[int]) -> torch.Tensor:
    places = int(torch.tensor(lengths).prod())
    flat = torch.randperm(places)[: draw(st.integers(0, places))]
    return torch.stack(torch.unravel_index(flat, tuple(lengths)), 1)


any_case = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(data=st.data())
@any_case
def test_patch_sites(launchers, data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    width = data.draw(st.integers(1, len(shape)))
    dtype, mode = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(MODES))
    x, table = strided(data.draw, shape, dtype), sites(data.draw, shape[:width])
    values = None
    if mode == "mean":
        values = strided(data.draw, [3, *shape[1:]], dtype)
    elif mode != "zero":
        # Any axis of the values may be one that is broadcast.
        wanted = [len(table), *shape[width:]]
        given = [data.draw(st.sampled_from([1, length])) if length else 0 for length in wanted]
        values = strided(data.draw, given, dtype)
        values = values[0] if given[0] == 1 and data.draw(st.booleans()) else values
    found = patch_sites(x, table, values, mode)
    assert torch.equal(found, reference.patch_sites(x, table, values, mode))


@given(data=st.data())
@any_case
def test_patch_sites_in_place(launchers, data):
    """Of any strides: by the launcher where it can, else by torch's indexing."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    width = data.draw(st.integers(1, len(shape)))
    dtype, mode = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(MODES))
    x, table = strided(data.draw, shape, dtype), sites(data.draw, shape[:width])
    x = x.contiguous() if data.draw(st.booleans()) else x
    values = None
    if mode == "mean":
        # A part of the activation itself, or something else.
        values = x if data.draw(st.booleans()) else strided(data.draw, [3, *shape[1:]], dtype)
    elif mode != "zero":
        values = strided(data.draw, [len(table), *shape[width:]], dtype)
    expected = reference.patch_sites(x, table, values, mode)
    launchers.calls.clear()
    patch_sites_(x, table, values, mode, data.draw(st.booleans()))
    assert torch.equal(x, expected)
    is_launched = block_length(x, width) is not None and len(table) > 0
    assert launchers.calls == ["patch_sites"] * is_launched


def test_in_place_by_one_launch_where_blocks_lie_in_steps_of_their_length(launchers):
    x = torch.randn(3, 5, 2, 4)
    assert [block_length(x, width) for width in (1, 2, 3, 4)] == [40, 8, 4, 1]
    # Leading axes may be transposed or sliced, and queries beside keys and values.
    assert block_length(x.transpose(0, 1)[1:, ::2], 2) == 8
    assert block_length(torch.randn(3, 5, 3, 2, 4)[:, :, 1], 2) == 8
    # A block with gaps, and blocks that start elsewhere than at multiples of their length.
    assert block_length(x[..., :3], 2) is None and block_length(x.transpose(2, 3), 2) is None
    assert block_length(torch.randn(3, 5, 7)[..., 1:5], 2) is None
    assert block_length(torch.randn(3, 5, 0), 2) == 0
    patch_sites_(x.transpose(0, 1), torch.tensor([[4, 2]]), torch.ones(2, 4), "replace", True)
    assert launchers.calls == ["patch_sites"] and x[2, 4].eq(1).all() and not x[2, 3].eq(1).any()


def test_in_place_refuses_places_that_are_one(launchers):
    x, table = torch.zeros(1, 4).expand(3, 4), torch.tensor([[1]])
    with pytest.raises(ShapeError, match="one place in memory"):
        patch_sites_(x, table, torch.ones(4), "replace", False)
    assert launchers.calls == [] and not x.any()


@given(data=st.data())
@any_case
def test_capture(launchers, data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    of, to = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    x = strided(data.draw, shape, of)
    width = data.draw(st.integers(0, len(shape)))
    table = sites(data.draw, shape[:width]) if width else torch.zeros(1, 0, dtype=torch.long)
    assert torch.equal(capture(x, table, to), reference.capture(x, table, to))
    if width < len(shape):
        values, scale = capture_int8(x, table)
        expected = reference.capture_int8(x, table)
        assert torch.equal(values, expected[0]) and torch.equal(scale, expected[1])


@pytest.mark.parametrize("packed_as", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(launchers, packed_as, dtype):
    if packed_as == "int8":
        packed = torch.randint(-127, 128, (5, 4, 9), dtype=torch.int8)[::2]
        scale = torch.rand(6, 4, dtype=torch.float64)[::2]
    else:
        packed = torch.randint(0, 60, (5, 4, 3 * FORMATS[packed_as].n_bytes), dtype=torch.uint8)
        packed, scale = packed[::2], None
    found = dequantize(packed, scale, packed_as, dtype)
    assert torch.equal(found, reference.dequantize(packed, scale, packed_as, dtype))
    assert launchers.calls == ["dequantize"]


def test_one_launch_however_many_sites(launchers):
    x = torch.randn(6, 7, 2, 3)
    table = torch.cartesian_prod(torch.arange(6), torch.arange(7))
    patch_sites(x, table, torch.zeros(3), "replace")
    capture(x, table, torch.float16)
    capture_int8(x, table)
    assert launchers.calls == ["patch_sites", "capture", "capture_int8"]


def test_nothing_is_launched_for_nothing_or_for_a_wrong_site(launchers):
    x, none = torch.randn(3, 2, 4), torch.zeros(0, 2, dtype=torch.long)
    assert torch.equal(patch_sites(x, none, torch.zeros(4), "add"), x)
    assert capture(x, none, torch.float32).shape == (0, 4)
    values, scale = capture_int8(x[..., :0], torch.zeros(2, 2, dtype=torch.long))
    assert values.shape == (2, 0) and scale.tolist() == [0.0, 0.0]
    empty = torch.zeros(0, 18, dtype=torch.uint8)
    assert dequantize(empty, None, "Q4_0", torch.float32).shape == (0, 32)
    for table in (torch.tensor([[0, 2]]), torch.tensor([[-1, 0]])):
        with pytest.raises(SiteError):
            patch_sites(x, table, torch.zeros(4), "replace")
        with pytest.raises(SiteError):
            capture(x, table, torch.float32)
        with pytest.raises(SiteError):
            capture_int8(x, table)
    assert launchers.calls == []
