"""csrc/ compiled by nvcc for each architecture that is shipped, and loaded where no GPU is."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fastlens.kernels import compiled
from tests.csrc.on_cpu import CSRC, KERNELS, ROOT, signatures

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
# With so many, an SM holds 1,024 threads of 64 K registers: half of its most.
MOST_REGISTERS = 64
FILES = sorted(set(KERNELS.values()))


def nvcc(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["nvcc", *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_without_spills(tmp_path, file, architecture):
    flags = ("-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", f"-arch={architecture}")
    built = nvcc(*flags, CSRC / file, "-o", tmp_path / "out.cubin")
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    stacks = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.stderr
    )
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", built.stderr)]
    assert len(stacks) == len(registers) >= 8
    assert {tuple(map(int, stack)) for stack in stacks} == {(0, 0, 0)}, built.stderr
    assert max(registers) <= MOST_REGISTERS, built.stderr


def test_a_spill_would_be_seen(tmp_path):
    """An array that is indexed by what only the GPU knows has to live on the stack."""
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void k(int* x) { int a[64]; for (int i = 0; i < 64; ++i) a[i] = x[i] * x[i];\n"
        "  for (int i = 0; i < 64; ++i) x[i] = a[x[i + 64] & 63]; }",
        encoding="utf-8",
    )
    built = nvcc("-Xptxas", "-v", "-cubin", "-arch=sm_80", source, "-o", tmp_path / "out.cubin")
    assert built.returncode == 0 and re.search(r"[1-9]\d* bytes stack frame", built.stderr)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory):
    """The module as setup.py builds it, a stand-in saying that torch has CUDA."""
    pytest.importorskip("pybind11")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        pytest.skip("Python.h is not installed")
    folder = tmp_path_factory.mktemp("module")
    shutil.copy2(ROOT / "setup.py", folder)
    shutil.copytree(CSRC, folder / "csrc")
    (folder / "pyproject.toml").write_text(
        "[project]\nname = 'stand-in'\nversion = '1'\n[tool.setuptools]\npackages = []\n",
        encoding="utf-8",
    )
    (folder / "torch.py").write_text("class version:\n    cuda = '13.0'\n", encoding="utf-8")
    wanted = {"FASTLENS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0+PTX", "PYTHONPATH": str(folder)}
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "built"],
        cwd=folder,
        env={**os.environ, **wanted},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    (target,) = (folder / "built" / "fastlens" / "kernels").glob("_cuda*")
    spec = importlib.util.spec_from_file_location("_cuda", target)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_module_has_every_launcher(module):
    assert {name for name in dir(module) if not name.startswith("_")} == set(signatures())


def test_a_launcher_raises_what_it_finds(module):
    with pytest.raises(RuntimeError, match="CUDA kernel not launched: patch_sites: no such mode"):
        module.patch_sites(0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 9, 0, 0)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        module.capture(1)


def test_where_no_gpu_is_a_launch_says_so(module):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for launch, arguments in (
        (module.patch_sites, (0, 0, 0, 0, 1, 1, 0, 0, 0, 0, compiled.MODES["zero"], 0, 0)),
        (module.capture, (0, 0, 0, 1, 1, 1, 0, 0, 0)),
        (module.capture_int8, (0, 0, 0, 0, 1, 1, 1, 0, 0)),
        (module.dequantize, (0, 0, 0, 1, 1, 0, 0, 0)),
    ):
        with pytest.raises(RuntimeError, match="driver|device"):
            launch(*arguments)
