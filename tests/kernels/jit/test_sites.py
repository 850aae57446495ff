"""Patching and capturing by a table, interpreted, between guard pages. Not run on a GPU."""

import pytest
import torch

from fastlens.errors import ShapeError, SiteError
from fastlens.kernels import reference
from tests.close import assert_no_worse
from tests.gpu.guard_pages import guarded, guarded_outputs
from tests.gpu.judged_sites import (
    DTYPES,
    MODES,
    STRIDES,
    check_capture,
    check_capture_int8,
    check_patch_sites,
)
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.mutation import mutated
from tests.gpu.workers import Died, interpreted

pytestmark = NEEDS_TRITON

SIZES = [1, 63, 129, 1000]


def between_guards(judge, **kwargs):
    with guarded_outputs():
        judge(place=guarded, **kwargs)


def of_every_kind(judge, cases):
    """One process for many small cases."""
    for case in cases:
        between_guards(judge, **case)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patch_sites(mode, dtype):
    cases = [{"d": d, "strides": strides} for d in SIZES for strides in STRIDES]
    cases += [{"width": width, "strides": strides} for width in (1, 2, 4) for strides in STRIDES]
    cases = [{"mode": mode, "dtype": dtype, **case} for case in cases]
    interpreted(of_every_kind, judge=check_patch_sites, cases=cases)


@pytest.mark.parametrize("spread", ["one for all", "one number each", "strided"])
@pytest.mark.parametrize("mode", MODES)
def test_spread_values(mode, spread):
    cases = [{"width": width, "strides": strides} for width in (1, 2, 3) for strides in STRIDES]
    cases = [{"mode": mode, "spread": spread, "is_checked": True, **case} for case in cases]
    interpreted(of_every_kind, judge=check_patch_sites, cases=cases)


@pytest.mark.parametrize("of", DTYPES, ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_capture(of, strides):
    cases = [{"d": d, "to": to} for d in SIZES for to in (*DTYPES, torch.float64)]
    cases += [{"width": width} for width in (0, 1, 3, 4)]
    cases = [{"of": of, "strides": strides, **case} for case in cases]
    interpreted(of_every_kind, judge=check_capture, cases=cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_capture_int8(dtype, strides):
    cases = [{"d": d} for d in (*SIZES, 5000)] + [{"width": width} for width in (0, 1, 3)]
    cases = [{"dtype": dtype, "strides": strides, **case} for case in cases]
    interpreted(of_every_kind, judge=check_capture_int8, cases=cases)


def check_edges():
    from fastlens.kernels.triton_capture import capture
    from fastlens.kernels.triton_capture_int8 import capture_int8
    from fastlens.kernels.triton_patch_sites import patch_sites
    from fastlens.kernels.triton_patch_sites_in_place import patch_sites_

    x, none = torch.randn(3, 2, 4), torch.zeros(0, 2, dtype=torch.int64)
    assert torch.equal(patch_sites(x, none, torch.zeros(4), "add"), x)
    assert capture(x, none, torch.float32).shape == (0, 4)
    values, scale = capture_int8(x[..., :0], torch.zeros(2, 2, dtype=torch.int64))
    assert values.shape == (2, 0) and scale.tolist() == [0.0, 0.0]
    # An expanded activation is read, and never written to in place.
    wide, table = torch.randn(1, 2, 4).expand(3, 2, 4), torch.tensor([[1, 0], [2, 1]])
    out = patch_sites(wide, table, torch.zeros(4), "replace")
    assert torch.equal(out, reference.patch_sites(wide, table, torch.zeros(4), "replace"))
    assert torch.equal(capture(wide, table, torch.float32), wide[[1, 2], [0, 1]])
    with pytest.raises(ShapeError, match="one place in memory"):
        patch_sites_(wide, table, torch.zeros(4), "replace", False)
    before = x.clone()
    for wrong in ([[0, 2]], [[-1, 0]], [[0, 0], [0, 0]]):
        table = torch.tensor(wrong)
        with pytest.raises(SiteError):
            patch_sites_(x, table, torch.zeros(4), "replace", False)
        with pytest.raises(SiteError):
            patch_sites(x, table, torch.zeros(4), "replace")
    for keep in (lambda t: capture(x, t, torch.float32), lambda t: capture_int8(x, t)):
        with pytest.raises(SiteError):
            keep(torch.tensor([[0, 2]]))
    assert torch.equal(x, before)


def test_edges():
    interpreted(check_edges)


def check_values_within_the_activation():
    """Sites that swap, and the mean of the activation itself: read whole before it is written."""
    from fastlens.kernels.triton_patch_sites_in_place import patch_sites_

    x = torch.randn(4, 3, 200)
    swapped, table = x.clone(), torch.tensor([[0], [1], [2], [3]])
    patch_sites_(swapped, table, swapped.flip(0), "replace", False)
    assert torch.equal(swapped, x.flip(0))
    shifted = x.clone()
    patch_sites_(shifted, table[1:], shifted[:-1], "replace", False)
    assert torch.equal(shifted[1:], x[:-1])
    found = x.clone()
    table = torch.tensor([[0, 1], [3, 1], [2, 0]])
    patch_sites_(found, table, found, "mean", False)
    truth = reference.patch_sites(x.double(), table, x.double(), "mean")
    assert_no_worse(found, reference.patch_sites(x, table, x, "mean"), truth)


def test_values_within_the_activation():
    interpreted(check_values_within_the_activation)


def check_many_samples(dtype):
    """Of a mean far from zero, where a plain sum would lose digits; and of infinities."""
    from fastlens.kernels.triton_patch_sites import patch_sites

    x, table = torch.zeros(1, 2, 5).to(dtype), torch.tensor([[0, 1]])
    values = (torch.randn(1000, 2, 5) + 3).to(dtype)
    found = patch_sites(x, table, values, "mean")
    truth = reference.patch_sites(x.double(), table, values.double(), "mean")
    assert_no_worse(found, reference.patch_sites(x, table, values, "mean"), truth)
    values[3, 1, 0], values[5, 1, 1], values[6, 1, 1] = torch.inf, torch.inf, -torch.inf
    values[9, 1, 2] = torch.nan
    found = patch_sites(x, table, values, "mean")[0, 1]
    assert found[0] == torch.inf and found[1:3].isnan().all() and found[3:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_of_many_samples(dtype):
    interpreted(check_many_samples, dtype=dtype)


def check_every_quotient_is_rounded():
    """All float16 numbers from 0 to 127 as one row each with its largest: the scale is 1."""
    from fastlens.kernels.triton_capture_int8 import capture_int8

    numbers = torch.arange(0, 0x57F0, dtype=torch.int16).view(torch.float16)
    x = torch.cat([torch.tensor([127.0]), numbers, -numbers]).half()[None]
    values, scale = capture_int8(x, torch.zeros(1, 0, dtype=torch.int64))
    assert scale.item() == 1.0
    assert torch.equal(values[0], x.float().round().to(torch.int8))


def test_every_quotient_is_rounded():
    interpreted(check_every_quotient_is_rounded)


# -- broken on purpose -----------------------------------------------------------------------------

CHECKS = {
    "patch_sites": check_patch_sites,
    "capture": check_capture,
    "capture_int8": check_capture_int8,
}


def check_mistake(kernel, right, wrong, kwargs):
    with mutated("sites", right, wrong):
        between_guards(CHECKS[kernel], **kwargs)


# What is broken: the kernel, what is right, what stands there instead, the case that shows it.
MISTAKES = {
    "add multiplies": ("patch_sites", 'x + v if MODE == "add"', 'x * v if MODE == "add"', "add"),
    "a sample left out": ("patch_sites", "in range(n_samples)", "in range(1, n_samples)", "mean"),
    "the first sample again": ("patch_sites", "given += stride_sample", "given += 0", "mean"),
    "the first value for all": (
        "patch_sites",
        "value_rows_ptr + row",
        "value_rows_ptr + 0 * row",
        "add",
    ),
    "one step for all": ("patch_sites", "column[None, :] * step\n", "column[None, :]\n", "scale"),
    "no step in the source": ("capture", "column[None, :] * step, ", "column[None, :], ", None),
    "rows overlap": ("capture", "row[:, None] * length + column", "row[:, None] + column", None),
    "ties away from zero": ("capture_int8", "(q + ROUNDING) - ROUNDING", "tl.floor(q + 0.5)", None),
    "128 levels": ("capture_int8", "127.0, tl.float32", "128.0, tl.float32", None),
    "infinities kept": (
        "capture_int8",
        "tl.where(is_finite, 0, 1)",
        "tl.where(is_finite, 0, 0)",
        0,
    ),
    "tiny rows kept": ("capture_int8", "largest >= LEAST_KEPT", "largest > 0.0", None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake):
    kernel, right, wrong, mode = MISTAKES[mistake]
    kwargs = {"strides": "every other", "d": 129}
    if kernel == "patch_sites":
        kwargs["mode"] = mode
    with pytest.raises(AssertionError, match="values differ|error is") as error:
        interpreted(check_mistake, kernel=kernel, right=right, wrong=wrong, kwargs=kwargs)
    assert not isinstance(error.value, Died)


@pytest.mark.parametrize(
    ("kernel", "right", "wrong"),
    [
        ("patch_sites", "tl.store(here, out.to(x_ptr.dtype.element_ty), mask=inside)",
         "tl.store(here, out.to(x_ptr.dtype.element_ty), mask=is_row[:, None])"),
        ("capture", "column[None, :], x, mask=inside)",
         "column[None, :], x, mask=is_row[:, None])"),
        ("capture_int8", "scale, mask=is_row)", "scale)"),
    ],
)  # fmt: skip
def test_a_dropped_mask_hits_a_guard_page(kernel, right, wrong):
    kwargs = {"d": 7 if kernel == "capture_int8" else 600, "width": 3}
    with pytest.raises(Died):
        interpreted(check_mistake, kernel=kernel, right=right, wrong=wrong, kwargs=kwargs)
