"""The compiled module: where it is refused and why, and its codes, which csrc/ has too."""

import re
from pathlib import Path

import pytest
import torch

from fastlens.kernels import compiled
from fastlens.ops import dispatch

CSRC = Path(__file__).parents[2] / "csrc"
OPS = ["capture", "capture_int8", "dequantize", "patch_sites"]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def enumeration(file: str, name: str) -> dict[str, int]:
    """The names and numbers of a C++ enum."""
    text = (CSRC / file).read_text(encoding="utf-8")
    body = re.search(rf"enum {name} {{(.*?)}}", text, re.DOTALL)
    assert body is not None
    return {key: int(value) for key, value in re.findall(r"k(\w+) = (\d+)", body[1])}


def test_the_codes_are_those_of_the_sources():
    by_name = {str(dtype).removeprefix("torch."): code for dtype, code in compiled.DTYPES.items()}
    found = enumeration("device.cuh", "Dtype")
    assert {name.lower(): code for name, code in found.items()} == by_name
    modes = enumeration("patch_sites.cu", "Mode")
    assert {name.lower(): code for name, code in modes.items()} == compiled.MODES
    formats = enumeration("dequantize.cu", "Format")
    assert {name.replace("Int8", "int8"): code for name, code in formats.items()} == (
        compiled.FORMATS
    )


@pytest.fixture
def built(monkeypatch):
    """As if the module had been built here."""
    monkeypatch.setattr(compiled, "module", lambda: object())


def test_it_serves_cuda_tensors_of_its_types_where_it_was_built(built):
    assert "are on cpu" in compiled.refuses(CPU, torch.float32)
    assert "torch.int64" in compiled.refuses(CUDA, torch.int64)
    for dtype in compiled.DTYPES:
        assert compiled.refuses(CUDA, dtype) is None


def test_it_is_refused_where_it_was_not_built(monkeypatch):
    monkeypatch.setattr(compiled, "module", lambda: None)
    assert "was not built" in compiled.refuses(CUDA, torch.float32)


def test_amd_is_refused(built, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in compiled.refuses(CUDA, torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_dispatch_takes_it_on_a_gpu_only(op, built):
    on_gpu = dispatch.explain(op, CUDA)
    assert on_gpu.kernel == f"CUDA C++ {op}"
    on_cpu = dispatch.explain(op, CPU)
    assert on_cpu.kernel.startswith("reference") and on_gpu.kernel in on_cpu.refused


def test_in_place_too(built):
    assert dispatch.explain("patch_sites_", CUDA).kernel == "CUDA C++ patch_sites_"
    assert "CUDA C++ patch_sites_" in dispatch.explain("patch_sites_", CPU).refused


@pytest.mark.parametrize("op", [*OPS, "patch_sites_"])
def test_it_is_called_through_the_registered_op(op):
    assert all(k.is_opaque for k in dispatch.kernels()[op] if k.name.startswith("CUDA C++"))


def test_what_is_needed_of_a_device_costs_nothing_on_the_cpu():
    x = torch.zeros(1)
    assert compiled.stream(x) == 0
    with compiled.on_device(x):
        pass
