"""Where Triton kernels run: the refusals that `fastlens doctor` shows, without triton."""

import importlib
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from fastlens.kernels import compiled, jit
from fastlens.ops import dispatch

TRITON_KERNELS = {
    "attention": "triton attention",
    "attention_lse": "triton attention with log-sum-exp",
    "attention_pattern_rows": "triton rows of the pattern",
    "attention_summary": "triton attention_summary",
    "capture": "triton capture",
    "capture_int8": "triton capture_int8",
    "dequantize": "triton dequantize",
    "layer_norm": "triton layer_norm",
    "norm": "triton norm",
    "patch_sites": "triton patch_sites",
    "patch_sites_": "triton patch_sites_",
    "rms_norm": "triton rms_norm",
    "rotary": "triton rotary",
    "suffix_attention": "triton suffix_attention",
}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def installed(monkeypatch, is_installed):
    found = object() if is_installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)


@pytest.mark.parametrize(
    ("device", "dtype", "is_installed", "capability", "reason"),
    [
        (CPU, torch.float32, True, (9, 0), "tensors are on the CPU"),
        (torch.device("mps"), torch.float32, True, (9, 0), "tensors are on the MPS"),
        (CUDA, torch.float64, True, (9, 0), "torch.float64 is not one of float32, bfloat16"),
        (CUDA, torch.float32, False, (9, 0), "triton is not installed"),
        (CUDA, torch.float32, True, (7, 5), "compute capability is 7.5, below 8.0"),
        (CUDA, torch.bfloat16, True, (8, 0), None),
    ],
)
def test_refusals(monkeypatch, device, dtype, is_installed, capability, reason):
    installed(monkeypatch, is_installed)
    monkeypatch.setenv("FASTLENS_TRITON", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    said = jit.refusal(device, dtype)
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize("op", TRITON_KERNELS)
def test_each_kernel_is_found_and_chosen_only_for_cuda(monkeypatch, op):
    # csrc/ comes first where it was built.
    monkeypatch.setattr(compiled, "module", lambda: None)
    kernel = TRITON_KERNELS[op]
    choice = dispatch.explain(op, "cpu")
    assert choice.refused[kernel] == "tensors are on the CPU" and choice.kernel != kernel
    installed(monkeypatch, True)
    monkeypatch.delenv("FASTLENS_TRITON", raising=False)
    assert "no one has run it on a GPU" in dispatch.explain(op, "cuda").refused[kernel]
    monkeypatch.setenv("FASTLENS_TRITON", "1")
    assert dispatch.explain(op, "cuda").kernel == kernel
    assert dispatch.explain(op, "cuda", torch.float64).kernel != kernel
    installed(monkeypatch, False)
    assert dispatch.explain(op, "cuda").refused[kernel] == "triton is not installed"


def test_finding_the_kernels_does_not_import_triton(monkeypatch):
    before = "triton" in sys.modules
    monkeypatch.setattr(dispatch, "kernels", dispatch.kernels.__wrapped__)
    assert dispatch.kernels()
    assert ("triton" in sys.modules) == before


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
    said = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: said.append((grid, args, kwargs))

    class Device:
        def __init__(self, device):
            said.append(device)

        def __enter__(self):
            said.append("in")

        def __exit__(self, *error):
            said.append("out")

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(kernel=Kernel()))
    second = torch.device("cuda:1")
    jit.launch("norm", "kernel", (3,), second, 1, d=2)
    assert said == [second, "in", ((3,), (1,), {"d": 2, "enable_fp_fusion": True}), "out"]
    said.clear()
    jit.launch("norm", "kernel", (3,), CPU, 1)
    jit.launch("norm", "kernel", (3,), CPU, 1, enable_fp_fusion=False)
    assert said == [((3,), (1,), {"enable_fp_fusion": fused}) for fused in (True, False)]


@pytest.mark.parametrize(("n", "block"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_blocks_are_powers_of_two(n, block):
    assert jit.power_of_two(n) == block


@pytest.mark.parametrize(
    ("n", "rows", "columns"), [(1, 64, 1), (5, 8, 8), (64, 1, 64), (99, 1, 64)]
)
def test_a_tile_is_no_wider_than_it_must_be(n, rows, columns):
    assert jit.tile(n, 64) == (rows, columns)


@pytest.mark.parametrize("op", TRITON_KERNELS)
def test_csrc_comes_before_triton_and_triton_before_torch(op):
    """Whoever has no nvcc loses nothing."""
    by_name = {kernel.name: kernel for kernel in dispatch.kernels()[op]}
    ours = by_name[TRITON_KERNELS[op]]
    for name, kernel in by_name.items():
        if name.startswith("CUDA C++"):
            assert kernel.priority > ours.priority
        elif kernel is not ours:
            assert kernel.priority < ours.priority and not kernel.is_opaque
