"""The compiled module of csrc/, if `setup.py` built it here. No kernel in it was run on a GPU."""

import contextlib
import functools
import importlib
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# As in csrc/launchers.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FORMATS = {"int8": 0, "Q4_0": 1, "Q4_1": 2, "Q8_0": 3}
MODES = {"replace": 0, "add": 1, "scale": 2, "zero": 3, "mean": 4}


@functools.cache
def module() -> ModuleType | None:
    """`fastlens.kernels._cuda`, or None where it was not built."""
    try:
        return importlib.import_module("fastlens.kernels._cuda")
    except ModuleNotFoundError:
        return None


def launchers() -> Any:
    """The module (csrc/launchers.h lists its functions), where it is known to be there."""
    found = module()
    assert found is not None, "a kernel that refuses was called"
    return found


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of csrc/ cannot serve that device and dtype here, or None if they can."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}; csrc/ is for CUDA"
    if dtype not in DTYPES:
        return f"{dtype} is not one of its types"
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs; csrc/ is built by nvcc"
    if module() is None:
        return (
            "the CUDA module was not built (needs nvcc and a CUDA torch: FASTLENS_CUDA=1 "
            "pip install -v --no-build-isolation)"
        )
    return None


def stream(tensor: Tensor) -> int:
    """The handle of the stream that PyTorch queues work on for this tensor's device."""
    if tensor.device.type != "cuda":
        return 0
    return torch.cuda.current_stream(tensor.device).cuda_stream


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which that tensor's GPU is the current one, as a launch needs it."""
    on_gpu = tensor.device.type == "cuda"
    return torch.cuda.device(tensor.device) if on_gpu else contextlib.nullcontext()
