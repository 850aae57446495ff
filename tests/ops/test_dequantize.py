"""Packed formats against the gguf package, bit for bit, and what is refused."""

import pytest
import torch

from fastlens.errors import ShapeError
from fastlens.ops.dequantize import dequantize
from tests.close import assert_close_to

GGUF = ["Q4_0", "Q4_1", "Q8_0"]


def packed_rows(packed_as, rows=3, width=96):
    """Quantised random rows, and what the gguf package reads from them."""
    import gguf

    kind = gguf.GGMLQuantizationType[packed_as]
    packed = gguf.quants.quantize(torch.randn(rows, width).numpy(), kind)
    return torch.from_numpy(packed), torch.from_numpy(gguf.quants.dequantize(packed, kind))


@pytest.mark.parametrize("packed_as", GGUF)
def test_it_is_what_the_gguf_package_gives(packed_as):
    packed, expected = packed_rows(packed_as)
    assert torch.equal(dequantize(packed, packed_as), expected)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(packed, packed_as, dtype=dtype), expected.to(dtype))
    # Rows of more axes, and rows that are not neighbours in memory.
    assert torch.equal(dequantize(packed[None, ::2], packed_as), expected[None, ::2])


@pytest.mark.parametrize("packed_as", GGUF)
def test_every_byte_means_what_the_gguf_package_says(packed_as):
    import gguf

    kind = gguf.GGMLQuantizationType[packed_as]
    block_bytes = gguf.constants.GGML_QUANT_SIZES[kind][1]
    packed = torch.randint(0, 256, (64, block_bytes), dtype=torch.uint8)
    # Bytes 1 and 3 end the two scales: an exponent of ones would be an infinity or a NaN.
    packed[:, 1] &= 0b10111011
    if packed_as == "Q4_1":
        packed[:, 3] &= 0b10111011
    expected = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), kind))
    assert torch.equal(dequantize(packed, packed_as), expected)


def test_a_block_by_hand():
    half = torch.tensor([0.5, 3.0], dtype=torch.float16).view(torch.uint8)
    nibbles = torch.arange(16, dtype=torch.uint8) | ((15 - torch.arange(16)) << 4).to(torch.uint8)
    low, high = torch.arange(16.0), torch.arange(15.0, -1, -1)
    q4_0 = dequantize(torch.cat([half[:2], nibbles]), "Q4_0")
    assert torch.equal(q4_0, torch.cat([low - 8, high - 8]) * 0.5)
    q4_1 = dequantize(torch.cat([half, nibbles]), "Q4_1")
    assert torch.equal(q4_1, torch.cat([low, high]) * 0.5 + 3)
    eight = torch.arange(-16, 16, dtype=torch.int8)
    q8_0 = dequantize(torch.cat([half[:2], eight.view(torch.uint8)]), "Q8_0")
    assert torch.equal(q8_0, torch.arange(-16.0, 16.0) * 0.5)


def test_int8_rows():
    q = torch.randint(-127, 128, (2, 3, 5), dtype=torch.int8)
    scale = torch.rand(2, 3)
    assert_close_to(dequantize(q, "int8", scale), q.double() * scale.double()[..., None], atol=1e-5)
    wide = dequantize(q, "int8", scale)
    assert torch.equal(dequantize(q, "int8", scale, torch.float16), wide.half())


@pytest.mark.parametrize("packed_as", GGUF)
def test_no_rows(packed_as):
    packed, _ = packed_rows(packed_as)
    assert dequantize(packed[:0], packed_as).shape == (0, 96)


@pytest.mark.parametrize("packed_as", ["int8", *GGUF])
def test_opcheck(packed_as):
    if packed_as == "int8":
        packed, scale = torch.ones(2, 5, dtype=torch.int8), torch.rand(2)
    else:
        packed, scale = packed_rows(packed_as)[0], None
    arguments = (packed, scale, packed_as, torch.float16)
    torch.library.opcheck(torch.ops.fastlens.dequantize.default, arguments)


def test_what_does_not_fit_is_refused():
    packed, _ = packed_rows("Q4_0")
    with pytest.raises(ShapeError, match="Nearest: 'Q4_0'"):
        dequantize(packed, "Q4-0")
    with pytest.raises(ShapeError, match="blocks of 20 bytes"):
        dequantize(packed[:, :-1], "Q4_1")
    with pytest.raises(ShapeError, match="stored as torch.uint8"):
        dequantize(packed.view(torch.int8), "Q4_0")
    with pytest.raises(ShapeError, match="int8 needs a scale"):
        dequantize(packed.view(torch.int8), "int8")
    with pytest.raises(ShapeError, match="hold their own"):
        dequantize(packed, "Q4_0", torch.ones(3))
    with pytest.raises(ShapeError, match="a float type"):
        dequantize(packed, "Q4_0", dtype=torch.int32)
