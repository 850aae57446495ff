"""The Triton kernels themselves. Importing a module of this package imports triton.

Their launchers, which import nothing but torch until they launch, are the modules ``triton_*``.
Not run on a GPU: what proves them without one is in ``tests/gpu``.
"""

import contextlib
import importlib
import importlib.util
from typing import Any

import torch

from fastlens.kernels.capability import capability
from fastlens.settings import TRITON

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The oldest generation these are compiled for in tests.
LOWEST_CAPABILITY = (8, 0)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel runs there, or None. Does not import triton."""
    if device.type != "cuda":
        return f"tensors are on the {device.type.upper()}"
    if dtype not in DTYPES:
        return f"{dtype} is not one of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    found = capability(device)
    if found is not None and found < LOWEST_CAPABILITY:
        return "the GPU's compute capability is {}.{}, below 8.0".format(*found)
    if not TRITON.is_on():
        return f"no one has run it on a GPU yet: {TRITON.name}=1 uses it"
    return None


def launch(
    module: str, name: str, grid: tuple[int, ...], device: torch.device, *args: Any, **kwargs: Any
) -> None:
    """Launch the kernel ``name`` of a module of this package, which imports triton.

    On the tensors' own GPU: by itself Triton launches on the current one. Products and sums may
    be fused unless ``enable_fp_fusion=False``, said outright because Triton's default changes
    between versions.
    """
    kernel = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **{"enable_fp_fusion": True, **kwargs})


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``, and at least 1: Triton's blocks are such."""
    return 1 << max(0, n - 1).bit_length()


def tile(n_columns: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a block of so many elements, no wider than it must be."""
    columns = min(elements, power_of_two(n_columns))
    return elements // columns, columns
