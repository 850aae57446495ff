"""csrc/ compiled by g++ for the CPU (`simt.h`), with the launchers that Python calls on a GPU."""

import ctypes
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
KERNELS = {
    "patch_sites": "patch_sites.cu",
    "capture": "capture.cu",
    "capture_int8": "capture.cu",
    "dequantize": "dequantize.cu",
}
# Off: contraction, since the kernels ask for it nowhere. On: a trap at a misaligned access.
FLAGS = (
    "-std=c++17 -O1 -Wall -Wno-unknown-pragmas -fPIC -shared -ffp-contract=off "
    "-fno-gnu-unique -U_FORTIFY_SOURCE -fsanitize=alignment -fsanitize-undefined-trap-on-error"
).split()
ORDERS = {"forward": 0, "backward": 1, "random": 2}

_CTYPES = {"uint64_t": ctypes.c_uint64, "int64_t": ctypes.c_int64, "int": ctypes.c_int}

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux"
)


def compile_text(text: str, folder: Path, name: str) -> ctypes.CDLL:
    """A .cu source as a library that runs on the CPU."""
    source, library = folder / f"{name}.cu", folder / f"{name}.so"
    source.write_text(text, encoding="utf-8")
    shim = ["-include", str(ROOT / "tests/csrc/simt.h"), f"-I{CSRC}"]
    built = subprocess.run(
        ["g++", *FLAGS, *shim, "-x", "c++", str(source), "-o", str(library)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    return ctypes.CDLL(str(library))


def source_of(name: str) -> str:
    """The .cu source in which a launcher stands."""
    return (CSRC / KERNELS[name]).read_text(encoding="utf-8")


def changed(text: str, old: str, new: str, which: int = 0) -> str:
    """The source with one occurrence of ``old`` replaced: a kernel broken on purpose."""
    parts = text.split(old)
    assert len(parts) > which + 1, f"{old!r} stands {len(parts) - 1} times in the source"
    return old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :])


@functools.cache
def signatures() -> dict[str, list[type]]:
    """The arguments of each launcher, read from csrc/launchers.h."""
    header = (CSRC / "launchers.h").read_text(encoding="utf-8")
    found = re.findall(r"const char\* fastlens_(\w+)\((.*?)\);", header, re.DOTALL)
    return {
        name: [_CTYPES[argument.split()[0]] for argument in arguments.split(",")]
        for name, arguments in found
    }


def launcher(library: ctypes.CDLL, name: str) -> Callable[..., None]:
    """A launcher that raises what it says, as csrc/bindings.cpp makes it."""
    function = library[f"fastlens_{name}"]
    function.argtypes, function.restype = signatures()[name], ctypes.c_char_p

    def launch(*arguments: int) -> None:
        sentence = function(*arguments)
        if sentence is not None:
            raise RuntimeError(f"CUDA kernel not launched: {sentence.decode()}")

    return launch


class Launchers:
    """Stands where `fastlens.kernels._cuda` stands, its kernels run on CPU tensors."""

    def __init__(self, folder: Path):
        libraries = {
            file: compile_text((CSRC / file).read_text(encoding="utf-8"), folder, Path(file).stem)
            for file in dict.fromkeys(KERNELS.values())
        }
        self.libraries = list(libraries.values())
        for name, file in KERNELS.items():
            setattr(self, name, launcher(libraries[file], name))

    def set_order(self, order: str) -> None:
        """In which order the threads of a block take turns."""
        for library in self.libraries:
            library.simt_set_order(ORDERS[order])
