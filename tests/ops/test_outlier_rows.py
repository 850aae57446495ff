"""int8 rows with exact outliers: the stated bound, the memory, and rows that are not ordinary."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlens.errors import ShapeError
from fastlens.ops.outlier_rows import (
    Int8OutlierRows,
    capture_int8_outliers,
    exact_channels,
    packed_bytes,
)

FLOATS = st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=True)
# Channels of very different sizes, as in residual streams.
NUMBERS = FLOATS | st.builds(lambda m, e: m * 10.0**e, st.floats(-1, 1), st.integers(-40, 30))
ROWS = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 24)), elements=NUMBERS)


def bound(x, packed):
    """What `Int8OutlierRows.read` states, per number, in float64."""
    others = x.double().abs().scatter(-1, packed.indices.long(), 0.0)
    m = others.amax(-1, keepdim=True)
    wide = ((others * m).sqrt() / 127 + m / 127**2 / 4) * (1 + 1e-3)
    # A subnormal number is rounded to the nearest of those, in the root's square too.
    return (wide + 2.0**-149).masked_fill(others == 0, 0.0)


@given(ROWS, st.integers(0, 5))
def test_no_number_is_off_by_more_than_stated(rows, k):
    x = torch.from_numpy(rows).float()
    packed = capture_int8_outliers(x, min(k, x.shape[-1]))
    read = packed.read()
    assert read.dtype == x.dtype and read.shape == x.shape
    assert bool(((read.double() - x.double()).abs() <= bound(x, packed)).all())


def test_the_bound_is_not_loose():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    packed = capture_int8_outliers(x)
    off = (packed.read().double() - x.double()).abs()
    assert (off / bound(x, packed).clamp_min(1e-30)).max() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reading_gives_the_own_dtype_and_exact_outliers(dtype):
    x = torch.randn(3, 5, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[..., 7] = 21784.0
    packed = capture_int8_outliers(x)
    read = packed.read()
    assert read.dtype == dtype == packed.dtype and packed.shape == x.shape
    assert torch.equal(read[..., 7], x[..., 7])
    others = torch.arange(512) != 7
    x, read = x[..., others].double(), read[..., others].double()
    assert ((read - x).norm(dim=-1) / x.norm(dim=-1)).max() <= 0.01


def test_plain_int8_would_not_do():
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(2))
    x[0, 3] = 21784.0
    rest = torch.arange(512) != 3
    good, plain = capture_int8_outliers(x).read(), capture_int8_outliers(x, 0).read()
    norm = x[:, rest].norm()
    assert (good - x)[:, rest].norm() / norm < 0.01 < (plain - x)[:, rest].norm() / norm


@pytest.mark.parametrize("d", [512, 576, 768, 2048, 4096, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_is_at_most_027_of_float32(d, dtype):
    packed = capture_int8_outliers(torch.randn(2, 3, d).to(dtype))
    assert packed.nbytes <= 0.27 * 2 * 3 * d * 4
    assert packed.nbytes == packed_bytes((2, 3, d), dtype)
    assert packed.indices.dtype == (torch.int16 if d <= 2**15 else torch.int32)
    assert packed.indices.shape[-1] == exact_channels(d, dtype) > 1


def test_indices_up_to_the_last_of_16_bits():
    x = torch.zeros(1, 2**15)
    x[0, -1] = 5.0
    assert torch.equal(capture_int8_outliers(x).read(), x)


def test_rows_that_are_not_ordinary():
    d = 512
    k = exact_channels(d)
    x = torch.randn(6, d, generator=torch.Generator().manual_seed(3))
    x[0] = 0.0
    x[1] = x[1] * 1e-40
    x[2, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    x[3, : k + 1] = math.nan
    x[4, : k + 1] = math.inf
    read = capture_int8_outliers(x).read()
    assert torch.equal(read[0], x[0])
    assert (read[1] - x[1]).double().norm() / x[1].double().norm() < 0.01
    assert torch.equal(read[2, :2], x[2, :2]) and read[2, 2].isnan()
    assert read[2, 3:].isfinite().all() and (read[2, 3:] - x[2, 3:]).norm() < 0.3
    # Too many: nothing of the row but the exact ones is to be trusted, and it says so.
    assert read[3].isnan().sum() >= d - k and read[4].isnan().sum() >= d - k
    assert read[5].isfinite().all()


@pytest.mark.parametrize("shape", [(1,), (4, 1), (0, 8), (2, 0, 8)])
def test_one_channel_and_no_rows(shape):
    x = torch.randn(shape)
    read = capture_int8_outliers(x).read()
    assert read.shape == x.shape
    if shape[-1] == 1:
        assert torch.equal(read, x)


def test_rows_do_not_depend_on_each_other():
    x = torch.randn(4, 6, 100)
    whole = capture_int8_outliers(x)
    for one, alone in zip(whole.on(lambda t: t[2]), capture_int8_outliers(x[2]), strict=True):
        assert torch.equal(one, alone)


def test_strided_rows_and_no_larger_memory():
    x = torch.randn(6, 512, 4).transpose(1, 2)
    packed = capture_int8_outliers(x)
    same = capture_int8_outliers(x.contiguous())
    assert torch.equal(packed.read(), same.read())
    for tensor in packed:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert isinstance(packed.to("cpu"), Int8OutlierRows) and packed.device.type == "cpu"
    assert packed.ndim == 3


def test_what_cannot_be_packed_says_so():
    with pytest.raises(ShapeError, match="at least one channel"):
        capture_int8_outliers(torch.ones(2, 0))
    with pytest.raises(ShapeError, match="k=4 exact channels of 3"):
        capture_int8_outliers(torch.ones(2, 3), 4)
