"""The launchers of csrc/launchers.h as that header states them, on addresses of CPU memory.

They stand in for the compiled module where there is no compiler, so that what the Python side hands
over (addresses, strides, offsets, codes) is tested everywhere.
"""

import ctypes

import torch
from torch import Tensor

from fastlens.kernels import compiled, reference
from fastlens.kernels.reference_packed import FORMATS

DTYPES = {code: dtype for dtype, code in compiled.DTYPES.items()}
MODES = {code: mode for mode, code in compiled.MODES.items()}
NAMES = {code: name for name, code in compiled.FORMATS.items()}


def memory(address: int, dtype: torch.dtype, count: int) -> Tensor:
    """So many numbers from that address on, as a tensor that shares them."""
    held = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(held, dtype=dtype)


def at(address: int, dtype: torch.dtype, index: Tensor) -> Tensor:
    """The numbers with those indices from an address on."""
    return memory(address, dtype, int(index.max()) + 1)[index]


class PythonLaunchers:
    """Each method is one launcher; arguments as in csrc/launchers.h."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def patch_sites(
        self, out, sites, places, values, n_sites, length, site_stride, step, *rest
    ) -> None:
        n_samples, sample_stride, mode, dtype, _ = rest
        self.calls.append("patch_sites")
        columns, dtype, mode = torch.arange(length), DTYPES[dtype], MODES[mode]
        index = memory(sites, torch.int64, n_sites)[:, None] * length + columns
        x = at(out, dtype, index)
        given = torch.zeros_like(x)
        if mode == "mean":
            rows = memory(places, torch.int64, n_sites)[:, None] * site_stride
            samples = torch.arange(n_samples)[:, None, None] * sample_stride
            given = at(values, dtype, samples + rows + columns * step).mean(0)
        elif mode != "zero":
            rows = torch.arange(n_sites)[:, None] * site_stride
            given = at(values, dtype, rows + columns * step)
        result = {"add": x + given, "scale": x * given}.get(mode, given)
        memory(out, dtype, int(index.max()) + 1)[index] = result

    def _rows(self, source, offsets, n_rows, length, step, dtype) -> Tensor:
        starts = memory(offsets, torch.int64, n_rows)[:, None]
        return at(source, DTYPES[dtype], starts + torch.arange(length) * step)

    def capture(self, source, offsets, out, n_rows, length, step, of, to, _) -> None:
        self.calls.append("capture")
        rows = self._rows(source, offsets, n_rows, length, step, of)
        memory(out, DTYPES[to], n_rows * length).copy_(rows.flatten())

    def capture_int8(self, source, offsets, values, scale, n_rows, length, step, of, _) -> None:
        self.calls.append("capture_int8")
        rows = self._rows(source, offsets, n_rows, length, step, of)
        kept, scales = reference.capture_int8(rows, torch.arange(n_rows)[:, None])
        memory(values, torch.int8, n_rows * length).copy_(kept.flatten())
        memory(scale, torch.float32, n_rows).copy_(scales)

    def dequantize(self, packed, scale, out, n_blocks, width, packed_as, to, _) -> None:
        self.calls.append("dequantize")
        name = NAMES[packed_as]
        block = FORMATS[name]
        if name == "int8":
            rows = memory(packed, torch.int8, n_blocks).view(-1, width)
            scales = memory(scale, torch.float32, len(rows))
        else:
            n_bytes = n_blocks * block.n_bytes
            rows, scales = memory(packed, torch.uint8, n_bytes).view(n_blocks, -1), None
        weights = reference.dequantize(rows, scales, name, DTYPES[to]).flatten()
        memory(out, DTYPES[to], n_blocks * block.weights).copy_(weights)
