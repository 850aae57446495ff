"""Tensors that end, or begin, at memory nobody may touch: a read or write beyond is a crash."""

import ctypes
import mmap

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_NO_ACCESS, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE


class Guarded:
    """Makes copies of tensors between two guard pages, flush with one of them."""

    def __init__(self, flush_with: str):
        assert flush_with in ("end", "begin")
        self.flush_with = flush_with
        self._mapped: list[tuple[int, int]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """A contiguous copy; its memory goes at `close`."""
        n_bytes = tensor.numel() * tensor.element_size()
        assert n_bytes > 0
        page = mmap.PAGESIZE
        inside = -(-n_bytes // page) * page
        start = _LIBC.mmap(
            None, inside + 2 * page, _READ_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        assert start not in (None, ctypes.c_void_p(-1).value)
        self._mapped.append((start, inside + 2 * page))
        for guard in (start, start + page + inside):
            assert _LIBC.mprotect(guard, page, _NO_ACCESS) == 0
        first = start + page + (inside - n_bytes if self.flush_with == "end" else 0)
        memory = (ctypes.c_char * n_bytes).from_address(first)
        copy = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    def close(self) -> None:
        """Unmap everything: no copy may be used any more."""
        for start, size in self._mapped:
            _LIBC.munmap(start, size)
        self._mapped.clear()
