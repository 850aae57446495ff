"""Which of an op's kernels a timed call runs: Triton's, csrc/'s, or plain torch."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

import torch

from fastlens.kernels.kernel import Kernel
from fastlens.ops import dispatch
from fastlens.settings import TRITON

# In the order in which they are told; the prefix of their modules.
FAMILIES = ("torch", "cuda", "triton")
# One kernel an op; None is the reference.
Choice = Mapping[str, Kernel | None]


def family_of(kernel: Kernel) -> str:
    """The prefix of the module that the kernel stands in."""
    return kernel.fn.__module__.rpartition(".")[2].partition("_")[0]


@contextlib.contextmanager
def triton_allowed() -> Iterator[None]:
    """Inside, Triton's kernels do not refuse for want of FASTLENS_TRITON=1."""
    before = os.environ.get(TRITON.name)
    os.environ[TRITON.name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[TRITON.name]
        else:
            os.environ[TRITON.name] = before


def choices(
    ops: Sequence[str], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Choice], dict[str, str]]:
    """Every way to serve these ops together, by a name; and why a family is left out.

    An op that a family does not serve falls to plain torch, or to the reference.
    """
    with triton_allowed():
        served = {
            op: {
                family_of(kernel): kernel
                for kernel in reversed(dispatch.kernels().get(op, []))
                if kernel.refuses(device, dtype) is None
            }
            for op in ops
        }
        refused = {
            f"fastlens: {kernel.name}": kernel.refuses(device, dtype)
            for op in ops
            for kernel in dispatch.kernels().get(op, [])
        }
    found: dict[str, Choice] = {}
    for family in FAMILIES:
        chosen = {op: by.get(family) or by.get("torch") for op, by in served.items()}
        if family == "torch" or any(family in by for by in served.values()):
            found[label(chosen)] = chosen
    return found, {name: reason for name, reason in refused.items() if reason is not None}


def label(choice: Choice) -> str:
    """The names of its kernels, each once."""
    names = [kernel.name for kernel in choice.values() if kernel is not None]
    return f"fastlens: {', '.join(dict.fromkeys(names)) or 'reference'}"


@contextlib.contextmanager
def using(choice: Choice, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, dispatch takes these kernels there, whatever it would choose itself."""
    from fastlens.kernels import reference

    keys = [(op, device.type, dtype) for op in choice]
    before = {key: dispatch._CHOSEN.get(key) for key in keys}
    opaque = dispatch._OPAQUE & set(keys)
    try:
        for key, kernel in zip(keys, choice.values(), strict=True):
            dispatch._CHOSEN[key] = kernel.fn if kernel else getattr(reference, key[0])
            dispatch._OPAQUE.discard(key)
            if kernel is not None and kernel.is_opaque:
                dispatch._OPAQUE.add(key)
        yield
    finally:
        for key, fn in before.items():
            if fn is None:
                dispatch._CHOSEN.pop(key, None)
            else:
                dispatch._CHOSEN[key] = fn
        dispatch._OPAQUE.difference_update(keys)
        dispatch._OPAQUE.update(opaque)
