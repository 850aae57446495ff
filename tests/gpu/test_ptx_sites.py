"""The compiled sm_80 kernels on sites and packed weights, executed on CPU tensors, bit for bit.

This is the code a GPU of compute capability 8.0 would load. It has not been run on one.
"""

import re

import pytest
import torch

from fastlens.kernels.reference_packed import FORMATS
from tests.gpu.judged_sites import (
    DTYPES,
    MODES,
    STRIDES,
    check_capture,
    check_capture_int8,
    check_dequantize,
    check_patch_sites,
)
from tests.gpu.launches import all_modules, instead_of_launching
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.mutation import mutated
from tests.gpu.ptx import execute
from tests.gpu.ptx_program import PtxError
from tests.gpu.workers import compiling

pytestmark = NEEDS_TRITON


def executed(judge, cases, edit=None):
    """``judge(**case)`` of each case with every launch run as PTX; ``edit`` changes its text."""

    def act(launch):
        execute(launch, edit)

    with instead_of_launching(act, *all_modules()):
        for case in cases:
            judge(**case)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patch_sites(mode, dtype):
    cases = [{"d": 129}, {"d": 1, "width": 4}, {"d": 1000, "width": 2, "strides": "sliced"}]
    cases += [{"strides": strides, "spread": "strided"} for strides in STRIDES]
    cases += [{"spread": "one for all", "is_checked": True, "d": 8}]
    cases = [{"mode": mode, "dtype": dtype, **case} for case in cases]
    compiling(executed, judge=check_patch_sites, cases=cases)


@pytest.mark.parametrize("of", DTYPES, ids=str)
def test_capture(of):
    cases = [{"to": to, "strides": strides} for to in DTYPES for strides in STRIDES]
    cases += [{"to": torch.float64}, {"d": 1000, "width": 0}, {"d": 63, "width": 3}, {"width": 4}]
    compiling(executed, judge=check_capture, cases=[{"of": of, **case} for case in cases])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capture_int8(dtype):
    cases = [{"d": d} for d in (1, 63, 129, 1000, 2049)]
    cases += [{"strides": strides, "width": width} for strides in STRIDES for width in (0, 3)]
    compiling(executed, judge=check_capture_int8, cases=[{"dtype": dtype, **c} for c in cases])


@pytest.mark.parametrize("packed_as", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(packed_as, dtype):
    cases = [{"width": width} for width in ((1, 129, 1030) if packed_as == "int8" else (1, 9))]
    cases = [{"packed_as": packed_as, "dtype": dtype, **case} for case in cases]
    compiling(executed, judge=check_dequantize, cases=cases)


def fused():
    def act(launch):
        execute(launch.with_options(enable_fp_fusion=True))

    with instead_of_launching(act, *all_modules()):
        check_dequantize(packed_as="Q4_1")


def test_no_bit_depends_on_fusing():
    """It is off all the same; a product of 11 bits and 4 is exact, so only the sum is rounded."""
    compiling(fused)


# -- broken on purpose -----------------------------------------------------------------------------


def outcome(judge, case, pattern, replacement):
    """What is said when every match in the PTX is replaced; None if nothing is."""

    def edit(text):
        assert re.search(pattern, text), f"no {pattern}"
        return re.sub(pattern, replacement, text)

    try:
        executed(judge, [case], edit)
    except (PtxError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(
    ("judge", "case", "pattern", "replacement", "caught_as"),
    [
        (check_capture_int8, {"d": 129}, r"shfl\.sync\.bfly(.*), 16, ", r"shfl.sync.bfly\1, 0, ",
         "values differ"),
        (check_capture_int8, {"d": 1000}, r"bar\.sync\s+0;", "", "race"),
        (check_capture_int8, {}, r"div\.rn\.f32", "mul.f32", "values differ"),
        (check_patch_sites, {"mode": "add", "d": 129}, r"setp\.lt\.s64(\s+%p\d+), ",
         r"setp.le.s64\1, ", "PtxError|values differ"),
        (check_dequantize, {"packed_as": "Q4_0"}, r"(shr\.u16\s+%rs\d+, %rs\d+), 4", r"\1, 3",
         "values differ"),
        (check_dequantize, {"packed_as": "int8", "width": 129}, r"st\.global\.b32 \[ (%rd\d+) \+ 0",
         r"st.global.b32 [ \1 + 4", "PtxError|values differ"),
    ],
    ids=["shuffle", "barrier", "division", "comparison off by one", "shift", "store one further"],
)  # fmt: skip
def test_a_wrong_instruction_is_caught(judge, case, pattern, replacement, caught_as):
    said = compiling(outcome, judge=judge, case=case, pattern=pattern, replacement=replacement)
    assert said is not None and re.search(caught_as, said), said


def source_mistake(name, right, wrong, judge, case):
    with mutated(name, right, wrong):
        executed(judge, [case])


@pytest.mark.parametrize(
    ("name", "right", "wrong", "judge", "case"),
    [
        ("sites", "out.to(x_ptr.dtype.element_ty), mask=inside",
         "out.to(x_ptr.dtype.element_ty), mask=is_row[:, None]",
         check_patch_sites, {"d": 129, "width": 3}),
        ("sites", "(place // n_pieces) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)\n"
         "    column = (place % n_pieces) * BLOCK_D + tl.arange(0, BLOCK_D)\n"
         "    is_row = row < n_rows\n"
         "    inside = is_row[:, None] & (column < length)[None, :]\n"
         "    start = tl.load(rows_ptr + row, mask=is_row, other=0)\n"
         "    x =",
         "tl.arange(0, BLOCK_ROWS)\n"
         "    column = (place % n_pieces) * BLOCK_D + tl.arange(0, BLOCK_D)\n"
         "    is_row = row < n_rows\n"
         "    inside = is_row[:, None] & (column < length)[None, :]\n"
         "    start = tl.load(rows_ptr + row, mask=is_row, other=0)\n"
         "    x =", check_capture, {"d": 1000, "width": 3}),
        ("dequantize", "block < n_blocks", "block <= n_blocks", check_dequantize, {"width": 3}),
    ],
    ids=["a store past the row", "two blocks in one place", "a block too many"],
)  # fmt: skip
def test_an_index_that_is_off_is_caught(name, right, wrong, judge, case):
    with pytest.raises((PtxError, AssertionError), match="out-of-bounds|two blocks|values differ"):
        compiling(source_mistake, name=name, right=right, wrong=wrong, judge=judge, case=case)
