"""Tensors that end, or start, where memory ends: one element further, and the process dies."""

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from typing import Any

import torch

PAGE = mmap.PAGESIZE
_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_long,
    ]
    library.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def guarded(tensor: torch.Tensor, *, at_start: bool = False) -> torch.Tensor:
    """A copy with the same strides between two pages that cannot be touched.

    It ends where the second begins or, ``at_start``, starts where the first ends. Its memory is
    never given back.
    """
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    elements = last + 1 if tensor.numel() else 0
    size = elements * tensor.element_size()
    body = -(-max(size, 1) // PAGE) * PAGE
    library = _library()
    start = library.mmap(
        None, body + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE_ANONYMOUS, -1, 0
    )
    for fence in (start, start + PAGE + body):
        assert library.mprotect(fence, PAGE, 0) == 0
    if not size:
        return tensor.clone()
    address = start + PAGE if at_start else start + PAGE + body - size
    buffer = (ctypes.c_char * size).from_address(address)
    flat = torch.frombuffer(buffer, dtype=tensor.dtype, count=elements)
    copy = flat.as_strided(tensor.shape, tensor.stride())
    copy.copy_(tensor)
    return copy


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """``torch.empty`` and ``torch.empty_like`` give guarded tensors full of NaN.

    Of integers: full of the largest.
    """
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype != torch.bool:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
        return guarded(tensor) if tensor.numel() else tensor

    def guarded_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        return poisoned(empty(*args, **kwargs))

    def guarded_empty_like(*args: Any, **kwargs: Any) -> torch.Tensor:
        return poisoned(empty_like(*args, **kwargs))

    torch.empty, torch.empty_like = guarded_empty, guarded_empty_like
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like
