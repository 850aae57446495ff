"""Choose a kernel once per (op, device type, dtype), and say why the others were refused."""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import fastlens.kernels
from fastlens.errors import FastlensError, did_you_mean
from fastlens.kernels import reference
from fastlens.kernels.kernel import Kernel


@dataclass(frozen=True)
class Choice:
    """The kernel that serves an op on a device and dtype, and why each other one does not."""

    op: str
    kernel: str
    refused: dict[str, str]


@functools.cache
def kernels() -> dict[str, list[Kernel]]:
    """Every kernel by op, best first: one a module ``torch_*``, ``triton_*`` or ``cuda_*``."""
    found: dict[str, list[Kernel]] = {}
    for info in pkgutil.iter_modules(fastlens.kernels.__path__):
        if info.name.startswith(("torch_", "triton_", "cuda_")):
            kernel = importlib.import_module(f"fastlens.kernels.{info.name}").KERNEL
            found.setdefault(kernel.op, []).append(kernel)
    return {op: sorted(ks, key=lambda k: -k.priority) for op, ks in sorted(found.items())}


# What was chosen. A compiler can trace a look-up in a dict, and cannot trace the choice.
_CHOSEN: dict[tuple[str, str, torch.dtype], Callable[..., Any]] = {}
# Those of them that torch cannot look into.
_OPAQUE: set[tuple[str, str, torch.dtype]] = set()
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def kernel_for(op: str, device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The function that runs ``op`` there: the best kernel that does not refuse."""
    if torch.compiler.is_compiling():
        _choose_all(device_type)
    chosen = _CHOSEN.get((op, device_type, dtype))
    if chosen is None:
        chosen = _remembered(op, device_type, dtype)
    return chosen


def is_opaque(op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether the kernel that serves ``op`` there must be called through its registered op."""
    kernel_for(op, device_type, dtype)
    return (op, device_type, dtype) in _OPAQUE


def _remembered(op: str, device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    fn = _CHOSEN[op, device_type, dtype] = choose(op, device_type, dtype)
    if any(kernel.is_opaque for kernel in _of(op) if kernel.fn is fn):
        _OPAQUE.add((op, device_type, dtype))
    return fn


def _choose_all(device_type: str) -> None:
    """All at once: a compiler reads the dict once, at its first look-up."""
    for op in kernels():
        for dtype in _FLOATS:
            if (op, device_type, dtype) not in _CHOSEN:
                _remembered(op, device_type, dtype)


# What torch.compiler.assume_constant_result does, which would load the compiler at import.
_choose_all._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(op: str, device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The best kernel for ``op`` there, looked for anew."""
    for kernel in _of(op):
        if kernel.refuses(torch.device(device_type), dtype) is None:
            return kernel.fn
    return getattr(reference, op)


def explain(
    op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Choice:
    """Which kernel serves ``op`` there and the sentence with which each other one refused."""
    refused = {}
    for kernel in _of(op):
        reason = kernel.refuses(torch.device(device), dtype)
        if reason is None:
            return Choice(op, kernel.name, refused)
        refused[kernel.name] = reason
    return Choice(op, "reference (plain PyTorch)", refused)


def _of(op: str) -> list[Kernel]:
    if op not in kernels():
        raise FastlensError(f"no op {op!r}.{did_you_mean(op, kernels())}")
    return kernels()[op]
