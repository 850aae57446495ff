"""The ops on tables of sites and on packed weights against the specification, bit for bit.

As `judged`: whoever calls decides what a launch means. Only a mean may differ, by its rounding.
"""

import torch

from fastlens.kernels import reference
from fastlens.kernels.reference_packed import FORMATS
from tests.close import assert_no_worse
from tests.gpu.judged import Place, as_it_is

MODES = ("replace", "add", "scale", "zero", "mean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRIDES = ("whole", "sliced", "transposed", "every other")


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Same dtype, shape and values, NaN for NaN."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    found, expected = (x.double().nan_to_num(nan=7.25e77) for x in (found, expected))
    n_wrong = int((found != expected).sum())
    assert n_wrong == 0, f"{name}: values differ: {n_wrong} of {found.numel()}"


def activation(d: int, dtype: torch.dtype, strides: str) -> torch.Tensor:
    """``[3, 4, 2, d]``: whole, a slice, with positions innermost, or every other channel."""
    torch.manual_seed(d)
    x = torch.randn(3, 4, 2, d) * 3
    if strides == "sliced":
        return torch.cat([x, x, x], -1).to(dtype)[..., 1 : d + 1]
    if strides == "transposed":
        return x.to(dtype).permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    if strides == "every other":
        return x.repeat_interleave(2, -1).to(dtype)[..., ::2]
    return x.to(dtype)


def sites(width: int, d: int, n: int = 5) -> torch.Tensor:
    """Distinct sites of such an activation, in no order; the first and the last among them."""
    lengths = (3, 4, 2, d)[:width]
    places = int(torch.tensor(lengths).prod())
    generator = torch.Generator().manual_seed(width)
    inner = torch.randperm(max(places - 2, 0), generator=generator)[: n - 2] + 1
    flat = torch.cat([torch.tensor([places - 1]), inner, torch.tensor([0])])
    return torch.stack(torch.unravel_index(flat, lengths), 1)


def values_for(mode: str, n_sites: int, x: torch.Tensor, width: int, spread: str):
    """Values of such sites: one block each, one for all, one number each, or of odd strides."""
    if mode == "zero":
        return None
    leading = (7, *x.shape[1:width]) if mode == "mean" else (n_sites,)
    shape = (*leading, *x.shape[width:])
    if mode != "mean" and spread == "one for all":
        return torch.randn(shape[1:]).to(x.dtype)
    if mode != "mean" and spread == "one number each":
        return torch.randn(n_sites, *(1,) * (len(shape) - 1)).to(x.dtype)
    if spread == "strided":
        big = torch.randn(*shape[1:-1], shape[0], shape[-1] + 3).to(x.dtype)
        return big.movedim(-2, 0)[..., 2 : shape[-1] + 2]
    return torch.randn(shape).to(x.dtype)


def check_patch_sites(
    mode: str = "replace",
    dtype: torch.dtype = torch.float32,
    d: int = 7,
    width: int = 3,
    strides: str = "whole",
    spread: str = "a block each",
    is_checked: bool = False,
    place: Place = as_it_is,
) -> None:
    """A copy, and in place; the input of the one and the surroundings of the other stay."""
    from fastlens.kernels import triton_patch_sites, triton_patch_sites_in_place

    x, table = place(activation(d, dtype, strides)), sites(width, d)
    values = values_for(mode, len(table), x, width, spread)
    values = None if values is None else place(values)
    before = x.clone()
    expected = reference.patch_sites(x, table, values, mode)
    found = triton_patch_sites.patch_sites(x, table, values, mode)
    assert torch.equal(x, before), "the activation was written to"
    patched = place(x)
    triton_patch_sites_in_place.patch_sites_(patched, table, values, mode, is_checked)
    assert_same_bits(patched, found, f"in place, {mode} {dtype}")
    if mode == "mean":
        assert values is not None
        truth = reference.patch_sites(x.double(), table, values.double(), mode)
        assert_no_worse(found, expected, truth, name=f"mean {dtype}")
    else:
        assert_same_bits(found, expected, f"{mode} {dtype}")
    if strides in ("sliced", "every other"):
        # What lies between the places of the activation, in a tensor that surrounds it.
        whole = torch.full((3, 4, 2, 3 * d), 5.0, dtype=dtype)
        part = whole[..., 1 : d + 1] if strides == "sliced" else whole[..., : 2 * d : 2]
        triton_patch_sites_in_place.patch_sites_(part, table, values, mode, is_checked)
        part.fill_(5.0)
        assert bool((whole == 5).all()), "the surroundings were written to"


def check_capture(
    of: torch.dtype = torch.float32,
    to: torch.dtype = torch.float32,
    d: int = 7,
    width: int = 2,
    strides: str = "whole",
    place: Place = as_it_is,
) -> None:
    """Values, with a site named twice and with sites that are the whole activation."""
    from fastlens.kernels import triton_capture

    x = activation(d, of, strides)
    x[0, 0, 0, 0] = torch.nan
    x = place(x)
    table = torch.zeros(2, 0, dtype=torch.int64)
    if width:
        table = sites(width, d)
        table = torch.cat([table, table[:2]])
    found = triton_capture.capture(x, table, to)
    assert_same_bits(found, reference.capture(x, table, to), f"{of} as {to}")
    assert found.is_contiguous()


def check_capture_int8(
    dtype: torch.dtype = torch.float32,
    d: int = 7,
    width: int = 2,
    strides: str = "whole",
    place: Place = as_it_is,
) -> None:
    """Numbers and scales: of ties, of rows that hold NaN or infinity, of tiny rows, of zeros."""
    from fastlens.kernels import triton_capture_int8

    x = activation(d, dtype, strides)
    x[0, 0, 0, d // 2] = torch.nan
    x[1, 1, 1, d - 1] = -torch.inf
    x[2, 3, 1] = 0.0
    x[2, 3, 0, :] = 1e-36 if dtype != torch.float16 else 6e-8
    # Every quotient is a half: ties go to the even number.
    ties = torch.arange(d) % 127 + 0.5
    ties[0] = 127.0
    x[2, 0, 0] = ties.to(dtype)
    x = place(x)
    table = sites(width, d, 12) if width else torch.zeros(1, 0, dtype=torch.int64)
    values, scale = triton_capture_int8.capture_int8(x, table)
    expected_values, expected_scale = reference.capture_int8(x, table)
    assert_same_bits(scale, expected_scale, f"scale {dtype}")
    assert_same_bits(values, expected_values, f"int8 {dtype}")


def check_dequantize(
    packed_as: str = "Q4_1",
    dtype: torch.dtype = torch.float32,
    width: int = 7,
    is_strided: bool = False,
    place: Place = as_it_is,
) -> None:
    """Every byte there is, scales of every size.

    Args:
        width: Of an int8 row; in blocks otherwise.
        is_strided: Rows are not neighbours in memory.
    """
    from fastlens.kernels import triton_dequantize

    torch.manual_seed(width)
    scale = None
    if packed_as == "int8":
        packed = torch.randint(-128, 128, (3, 4, width)).to(torch.int8)
        scale = place(torch.randn(3, 4).exp())
    else:
        block = FORMATS[packed_as]
        packed = torch.randint(0, 256, (3, 4, width, block.n_bytes)).to(torch.uint8)
        halves = torch.randn(3, 4, width, 2).half().view(torch.uint8)
        # Float16s of every sort in some blocks, ordinary ones in most.
        header = 4 if packed_as == "Q4_1" else 2
        packed[1:, ..., :header] = halves[1:, ..., :header]
        packed = packed.flatten(2)
    packed = place(packed.repeat_interleave(2, 0)[::2] if is_strided else packed)
    found = triton_dequantize.dequantize(packed, scale, packed_as, dtype)
    expected = reference.dequantize(packed, scale, packed_as, dtype)
    assert_same_bits(found, expected, f"{packed_as} {dtype}")
