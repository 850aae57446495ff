"""The optional CUDA module only; everything else is declared in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path(__file__).parent / "csrc"
SOURCES = sorted(f"csrc/{path.name}" for path in CSRC.glob("*") if path.suffix in (".cu", ".cpp"))
WANTED = os.environ.get("FASTLENS_CUDA", "")


def nvcc() -> str | None:
    """The compiler: on PATH, or under CUDA_HOME."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    inside = Path(home) / "bin" / "nvcc" if home else None
    return str(inside) if inside is not None and inside.is_file() else shutil.which("nvcc")


def missing() -> str:
    """What the CUDA module lacks here, or an empty string."""
    if not any(source.endswith(".cu") for source in SOURCES):
        return "csrc/ has no CUDA sources yet"
    if nvcc() is None:
        return "nvcc is not on PATH"
    try:
        import torch
    except ImportError:
        return "torch is not importable in the build (install it, then pip --no-build-isolation)"
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h is not installed (the Python development package)"
    try:
        architecture_flags()
    except ValueError as error:
        return str(error)
    return ""


def architecture_flags() -> list[str]:
    """nvcc's flags for the GPUs that TORCH_CUDA_ARCH_LIST names, or those present, or all."""
    named = re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not named:
        import torch

        count = torch.cuda.device_count()
        present = sorted({torch.cuda.get_device_capability(index) for index in range(count)})
        if not present:
            return ["-arch=all-major"]
        named = [f"{major}.{minor}" for major, minor in present]
        # The newest as PTX too, which later GPUs can run.
        named[-1] += "+PTX"
    flags = []
    for name in named:
        parts = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", name)
        if parts is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST names {name!r}, which is not like 9.0 or 9.0+PTX"
            )
        number = parts[1] + parts[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if parts[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NvccBuild(build_ext):
    """Compiles all of csrc/ in one call of nvcc; `NVCC_APPEND_FLAGS` adds flags."""

    def build_extension(self, ext: Extension) -> None:
        """Write the shared library to the place setuptools expects it."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        flags = ["-shared", "-O3", "-std=c++17", *architecture_flags(), "-Xcompiler", "-fPIC"]
        command = [str(nvcc()), *flags, *includes, *ext.sources, "-o", str(target)]
        if subprocess.run(command).returncode:
            raise CompileError(f"nvcc could not build {ext.name}: see its message above")


reason = "FASTLENS_CUDA=0" if WANTED == "0" else missing()
if reason and WANTED == "1":
    sys.exit(f"FASTLENS_CUDA=1 asks for the CUDA module, but {reason}")
if reason and {"bdist_wheel", "editable_wheel", "build", "build_ext", "install"} & set(sys.argv):
    print(f"fastlens: installing without the CUDA module: {reason}")
# optional: a failed compilation warns and installs pure Python, unless it was asked for.
module = Extension("fastlens.kernels._cuda", SOURCES, optional=WANTED != "1")
setup(ext_modules=[] if reason else [module], cmdclass={"build_ext": NvccBuild})
