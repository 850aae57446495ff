"""Packed weights unpacked, interpreted, between guard pages. Not run on a GPU."""

import pytest
import torch

from fastlens.kernels.reference_packed import FORMATS
from tests.gpu.guard_pages import guarded, guarded_outputs
from tests.gpu.judged_sites import DTYPES, assert_same_bits, check_dequantize
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.mutation import mutated
from tests.gpu.workers import Died, interpreted

pytestmark = NEEDS_TRITON


def between_guards(**kwargs):
    with guarded_outputs():
        check_dequantize(place=guarded, **kwargs)


def of_every_width(widths, **kwargs):
    for width in widths:
        between_guards(width=width, **kwargs)
    between_guards(is_strided=True, **kwargs)


@pytest.mark.parametrize("packed_as", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(packed_as, dtype):
    widths = (1, 63, 129, 1000, 3000) if packed_as == "int8" else (1, 3, 63, 129)
    interpreted(of_every_width, widths=widths, packed_as=packed_as, dtype=dtype)


def check_no_rows():
    from fastlens.kernels.triton_dequantize import dequantize

    packed = torch.zeros(0, 18, dtype=torch.uint8)
    assert_same_bits(dequantize(packed, None, "Q4_0", torch.float16), torch.zeros(0, 32).half(), "")
    rows, scale = torch.zeros(3, 0, dtype=torch.int8), torch.ones(3)
    assert dequantize(rows, scale, "int8", torch.float32).shape == (3, 0)


def test_no_rows():
    interpreted(check_no_rows)


def check_mistake(right, wrong, packed_as):
    with mutated("dequantize", right, wrong):
        between_guards(packed_as=packed_as)


@pytest.mark.parametrize(
    ("packed_as", "right", "wrong"),
    [
        ("int8", "* scale[:, None]", "/ scale[:, None]"),
        ("Q8_0", "byte.to(tl.int8, bitcast=True)", "byte"),
        ("Q4_0", "(q - 8)", "(q - 7)"),
        ("Q4_0", "byte & 15, byte >> 4", "byte >> 4, byte & 15"),
        ("Q4_1", "(low | (high << 8))", "(high | (low << 8))"),
        ("Q4_1", "_half_at(first + 2", "_half_at(first + 1"),
    ],
    ids=["scale", "sign", "offset", "order of nibbles", "order of bytes", "place of the minimum"],
)
def test_a_mistake_is_caught(packed_as, right, wrong):
    with pytest.raises(AssertionError, match="values differ") as error:
        interpreted(check_mistake, right=right, wrong=wrong, packed_as=packed_as)
    assert not isinstance(error.value, Died)


@pytest.mark.parametrize(
    ("packed_as", "right", "wrong"),
    [
        ("Q8_0", "tl.load(first[:, None] + HEADER + weight, mask=inside",
         "tl.load(first[:, None] + HEADER + weight, mask=inside | True"),
        ("int8", "scale_ptr + row, mask=is_row, other=0.0", "scale_ptr + row"),
    ],
)  # fmt: skip
def test_a_dropped_mask_hits_a_guard_page(packed_as, right, wrong):
    with pytest.raises(Died):
        interpreted(check_mistake, right=right, wrong=wrong, packed_as=packed_as)
