"""What the kernels on sites and packed weights are asked for, as calls that each launch once.

Every mode, format and pair of dtypes; of the widths of a block the least, the most, one between.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastlens.kernels.reference_packed import FORMATS
from tests.gpu.judged_sites import DTYPES, MODES

# Numbers in a row: single channels, a head, the residual stream.
LENGTHS = (1, 64, 4096)


def patching() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each mode, with values of each site and with one for all."""
    from fastlens.kernels.triton_patch_sites_in_place import patch_sites_

    table = torch.cartesian_prod(torch.arange(2), torch.arange(5))
    for d in LENGTHS:
        for dtype in DTYPES if d == 64 else DTYPES[:2]:
            for mode in MODES:
                x = torch.randn(2, 5, d).to(dtype)
                values = torch.randn(7, 5, d) if mode == "mean" else torch.randn(10, d)
                given = None if mode == "zero" else values.to(dtype)
                yield (
                    f"patch_sites_ {mode} {d} {dtype}",
                    lambda x=x, v=given, m=mode: patch_sites_(x, table, v, m, True),
                )
    x = torch.randn(2, 5, 12, 64).transpose(1, 2)
    for mode in ("replace", "scale"):
        yield (
            f"patch_sites_ {mode} strided, one value for all",
            lambda x=x, m=mode: patch_sites_(x, torch.zeros(1, 1).long(), torch.ones(1), m, True),
        )


def capturing() -> Iterator[tuple[str, Callable[[], Any]]]:
    """From each dtype to each, and to int8."""
    from fastlens.kernels.triton_capture import capture
    from fastlens.kernels.triton_capture_int8 import capture_int8

    table = torch.tensor([[0, 1], [1, 4], [0, 1]])
    for d in LENGTHS:
        for of in DTYPES:
            x = torch.randn(2, 5, d).to(of)
            for to in (*DTYPES, torch.float64) if d == 64 else DTYPES[:1]:
                yield f"capture {d} {of} {to}", lambda x=x, to=to: capture(x, table, to)
            yield f"capture_int8 {d} {of}", lambda x=x: capture_int8(x, table)
    x = torch.randn(3, 64, 10).transpose(1, 2)
    yield "capture strided", lambda: capture(x, table, torch.float16)
    yield "capture_int8 strided", lambda: capture_int8(x, table)


def unpacking() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each format in each dtype."""
    from fastlens.kernels.triton_dequantize import dequantize

    for dtype in DTYPES:
        for packed_as, block in FORMATS.items():
            if packed_as != "int8":
                packed = torch.zeros(4, 3 * block.n_bytes, dtype=torch.uint8)
                yield (
                    f"dequantize {packed_as} {dtype}",
                    lambda p=packed, f=packed_as, to=dtype: dequantize(p, None, f, to),
                )
        for width in LENGTHS:
            rows, scale = torch.zeros(4, width, dtype=torch.int8), torch.ones(4)
            yield (
                f"dequantize int8 {width} {dtype}",
                lambda p=rows, s=scale, to=dtype: dequantize(p, s, "int8", to),
            )


def by_name() -> dict[str, Callable[[], Any]]:
    """All of them."""
    return dict([*patching(), *capturing(), *unpacking()])
