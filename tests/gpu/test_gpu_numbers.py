"""docs/gpu.md's tables of the compilers, and its rules of occupancy, against the tools."""

import importlib.util
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cuda_devices import SMS, occupancy

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.kernels

PROBE = """
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
    int cc, registers, warps; size_t shared;
    while (scanf("%d %d %d %zu", &cc, &registers, &warps, &shared) == 4) {
        cudaOccDeviceProp p = cudaOccDeviceProp();
        p.computeMajor = cc / 10; p.computeMinor = 0; p.maxThreadsPerBlock = 1024;
        p.maxThreadsPerMultiprocessor = 2048; p.regsPerBlock = p.regsPerMultiprocessor = 65536;
        p.warpSize = 32; p.numSms = 100; p.reservedSharedMemPerBlock = 1024;
        p.sharedMemPerMultiprocessor = (cc == 80 ? 164 : 228) * 1024;
        p.sharedMemPerBlock = 49152;
        p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - 1024;
        cudaOccFuncAttributes a = cudaOccFuncAttributes();
        a.maxThreadsPerBlock = 1024; a.numRegs = registers;
        a.maxDynamicSharedSizeBytes = p.sharedMemPerBlockOptin;
        a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        cudaOccDeviceState s = cudaOccDeviceState();
        s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        cudaOccResult r;
        if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, warps * 32, shared)) return 1;
        printf("%d\\n", r.activeBlocksPerMultiprocessor);
    }
}
"""


def toolkit() -> Path | None:
    """The folder of cuda_occupancy.h, which needs neither nvcc nor a GPU."""
    places = [Path("/usr/local/cuda/include")]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        places.append(Path(nvcc).resolve().parents[1] / "include")
    return next((place for place in places if (place / "cuda_occupancy.h").is_file()), None)


@pytest.mark.skipif(toolkit() is None or shutil.which("g++") is None, reason="no CUDA toolkit, g++")
def test_the_rules_are_those_of_cudas_calculator(tmp_path):
    source, program = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text(PROBE, encoding="utf-8")
    built = subprocess.run(
        ["g++", f"-I{toolkit()}", str(source), "-o", str(program)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    draw = random.Random(0)
    cases = [
        (
            draw.choice(list(SMS)),
            draw.randint(16, 255),
            draw.choice([1, 2, 3, 4, 8, 16]),
            draw.choice([0, 1, 5000, draw.randint(0, 160_000)]),
        )
        for _ in range(2000)
    ]
    lines = [f"{target[3:]} {registers} {w} {shared}" for target, registers, w, shared in cases]
    said = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True)
    expected = [int(line) for line in said.stdout.split()]
    assert len(expected) == len(cases)
    for (target, registers, warps, shared), blocks in zip(cases, expected, strict=True):
        found = occupancy(SMS[target], registers, warps, shared)
        assert found.blocks == blocks, (target, registers, warps, shared, found)


def between(text: str, name: str) -> str:
    """A table of the page."""
    _, _, rest = text.partition(f"<!-- tools/gpu_numbers.py: {name} -->")
    return rest.partition("<!--")[0].strip("\n")


def printed(names: str) -> str:
    """What the tool makes, in a process where Triton compiles."""
    code = f"import gpu_numbers as g\nfor n in {names.split()!r}: print(getattr(g, n)(), end='\\0')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(
    shutil.which("nvcc") is None or importlib.util.find_spec("triton") is None,
    reason="nvcc or triton is not installed",
)
@pytest.mark.parametrize("name", ["compiled", "shipped"])
def test_tables_of_the_compilers_are_up_to_date(name):
    """Where the compilers are those of the page; others may give other numbers of registers."""
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    version, table, _ = printed(f"versions {name}").split("\0")
    if version != between(text, "versions"):
        pytest.skip(f"the page is of {between(text, 'versions')}, and here is {version}")
    assert between(text, name) == table, "run `python tools/gpu_numbers.py`"
