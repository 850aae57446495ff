"""Capture by table and by slices: the same values as indexing, and int8 within its bound."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlens.errors import ShapeError, SiteError
from fastlens.ops.capture import capture, capture_int8
from fastlens.slices import Slice
from tests.close import assert_close_to

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TABLE = torch.tensor([[2, 4, 1], [0, 0, 0], [2, 4, 1], [1, 3, 0]])


def strided():
    """``[3, 5, 2, 4]``, no two of its axes in memory order."""
    return torch.randn(5, 9, 2, 3).permute(3, 0, 2, 1)[..., 2:6]


@pytest.mark.parametrize(("of", "to"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_table_captures_what_indexing_gives(of, to, width):
    x, table = strided().to(of), TABLE[:, :width]
    out = capture(x, table, to)
    assert torch.equal(out, x[tuple(table.T)].to(to))
    assert out.dtype == to and out.is_contiguous()


SLICES = [
    (),
    (None, -1),
    (0, 1, 1),
    (None, (1, 4), [1, 0, 1]),
    ([2, 0], None, 1),
    (1, [0, -1]),
    (None, [True, False, False, True, True]),
    (None, [], None),
    (slice(None, None, 2), (4,), 0),
    (None, slice(None, None, -1)),
]


@pytest.mark.parametrize("where", SLICES, ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_slices_capture_what_slicing_gives(where, dtype):
    x = strided()
    expected, axis = x, 0
    for one in where:
        choice = Slice(one)
        expected = choice.apply(expected, axis)
        axis += choice.mode != "int"
    out = capture(x, where, dtype)
    assert torch.equal(out, expected.to(dtype or torch.float32))
    assert (
        out.is_contiguous() and out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    )
    assert out.untyped_storage().nbytes() == out.numel() * out.element_size()
    if out.numel():
        found = capture_int8(x, where)
        whole = capture_int8(expected.contiguous(), ())
        assert torch.equal(found.values, whole.values) and torch.equal(found.scale, whole.scale)


def test_a_captured_vector_outlives_an_edit_of_the_activation():
    x = torch.zeros(2, 3, 4)
    kept = [capture(x, ()), capture(x, torch.tensor([[0, 1]])), capture(x, (0, (1, 2)))]
    x += 1
    assert not any(bool(one.any()) for one in kept)


# -- int8 ------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(DTYPES), st.integers(-30, 30))
@settings(max_examples=60, deadline=None)
def test_int8_is_within_its_bound(seed, d, dtype, exponent):
    generator = torch.Generator().manual_seed(seed)
    # Rows of very different sizes, so one scale for all would not do.
    sizes = 2.0 ** torch.linspace(-8, 8, 5)[:, None]
    x = torch.randn(5, d, dtype=torch.float64, generator=generator) * sizes
    x = (x * 2.0 ** (exponent if dtype in (torch.float32, torch.float64) else 0)).to(dtype)
    kept = capture_int8(x, ())
    assert kept.values.dtype == torch.int8 and kept.values.abs().max() <= 127
    difference = (kept.read(torch.float64) - x.double()).abs()
    assert bool((difference <= kept.scale.double()[:, None] * (0.5 + 2**-15)).all())
    largest = x.double().abs().amax(-1)
    assert bool((difference.amax(-1) <= largest / 254 * (1 + 2**-14)).all())


def test_int8_of_known_rows():
    x = torch.tensor([[127.0, -63.5, 62.5, 0.0], [0.0, 0.0, 0.0, 0.0], [-1e-3, 1e-3, 0.0, 0.0]])
    kept = capture_int8(x, ())
    # Ties go to the even number.
    assert kept.values.tolist() == [[127, -64, 62, 0], [0, 0, 0, 0], [-127, 127, 0, 0]]
    assert kept.scale.tolist()[:2] == [1.0, 0.0]
    assert_close_to(kept.read()[2], x[2], atol=1e-9)


def test_int8_rows_that_cannot_be_kept():
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0], [1e-40, -1e-40], [1.0, 0.5]])
    kept = capture_int8(x, ())
    assert kept.read()[:2].isnan().all() and not kept.values[:3].any()
    assert not kept.read()[2].any() and kept.read()[3].isfinite().all()
    # Too large for float32: the scale would be infinite.
    assert capture_int8(torch.tensor([[1e300]], dtype=torch.float64), ()).read().isnan().all()


def test_int8_by_table_is_int8_of_what_the_table_names():
    x = strided()
    kept = capture_int8(x, TABLE[:, :2])
    whole = capture_int8(x, ())
    index = tuple(TABLE[:, :2].T)
    assert torch.equal(kept.values, whole.values[index])
    assert torch.equal(kept.scale, whole.scale[index])
    assert kept.read(torch.float16).dtype == torch.float16


# -- gradients and compilers -----------------------------------------------------------------------


@pytest.mark.parametrize("where", [TABLE, TABLE[:, :1], (None, [0, 0, 2]), (0, (1, 3))], ids=str)
def test_gradients(where):
    x = torch.randn(3, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: capture(x, where), (x,))
    assert torch.autograd.gradgradcheck(lambda x: capture(x, where), (x,), fast_mode=True)


def test_gradients_arrive_in_the_dtype_of_the_activation():
    x = torch.randn(3, 5, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    capture(x, TABLE, torch.float32).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert float(x.grad[2, 4, 1, 0]) == 2.0 and float(x.grad.sum()) == 16.0


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("width", [0, 2, 4])
def test_opcheck(needs_grad, width):
    x = strided().detach().requires_grad_(needs_grad)
    table = torch.zeros(2, width, dtype=torch.long)
    torch.library.opcheck(torch.ops.fastlens.capture.default, (x, table, torch.bfloat16))
    if width < 4 and not needs_grad:
        arguments = (x, table)
        torch.library.opcheck(torch.ops.fastlens.capture_int8.default, arguments)


def test_traced_whole():
    """The checks of shapes under pytest cannot be traced, so the op itself is."""

    def run(x):
        values, scale = torch.ops.fastlens.capture_int8(x, TABLE[:, :2])
        return torch.ops.fastlens.capture(x, TABLE[:, :2], torch.float32), values, scale

    x = strided()
    traced = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, traced(x), run(x)))


def test_a_fake_gpu_needs_no_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 4, device="cuda", dtype=torch.bfloat16)
        out = capture(x, torch.zeros(5, 2, dtype=torch.long), torch.float32)
        kept = capture_int8(x, (None, [1]))
        read = kept.read(torch.float16)
    assert (out.device.type, out.shape, out.dtype) == ("cuda", (5, 4), torch.float32)
    assert (kept.values.shape, kept.scale.shape) == ((2, 1, 4), (2, 1))
    assert (read.device.type, read.shape, read.dtype) == ("cuda", (2, 1, 4), torch.float16)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [capture, capture_int8])
def test_places_outside_are_refused(keep):
    x = strided()
    with pytest.raises(SiteError, match="site 1 of the table"):
        keep(x, torch.tensor([[0, 0], [0, 5]]))
    with pytest.raises(SiteError, match="site 0 of the table"):
        keep(x, torch.tensor([[-1, 0]]))
    for outside in (5, -6, [0, 5], [-6]):
        with pytest.raises(ShapeError, match="outside axis 1, which has 5 places"):
            keep(x, (None, outside))


def test_what_does_not_fit_is_refused():
    x = strided()
    with pytest.raises(ShapeError, match="use capture_int8"):
        capture(x, (), torch.int8)
    with pytest.raises(ShapeError, match="5 slices"):
        capture(x, (None,) * 5)
    # The last axis is what the scale is taken over.
    with pytest.raises(ShapeError, match="at most 3"):
        capture_int8(x, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ShapeError, match="4 slices"):
        capture_int8(x, (None,) * 4)
