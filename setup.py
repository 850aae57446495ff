"""The optional CUDA module only; everything else is declared in pyproject.toml."""

import os
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


def missing() -> str:
    """What the CUDA module lacks here, or an empty string."""
    if not any(source.endswith(".cu") for source in SOURCES):
        return "csrc/ has no CUDA sources yet"
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    try:
        import torch
    except ImportError:
        return "torch is not importable in the build (install it, then pip --no-build-isolation)"
    return "" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"


class NvccBuild(build_ext):
    """Compiles all of csrc/ in one call of nvcc; `NVCC_APPEND_FLAGS` adds flags, e.g. -arch."""

    def build_extension(self, ext: Extension) -> None:
        """Write the shared library to the place setuptools expects it."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        flags = ["-shared", "-O3", "-std=c++17", "-arch=all-major", "-Xcompiler", "-fPIC"]
        command = ["nvcc", *flags, *includes, *ext.sources, "-o", str(target)]
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
