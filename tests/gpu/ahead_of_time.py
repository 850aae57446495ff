"""Compile a launch for a GPU that is not here, and read what the binary needs of it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.launches import Launch


@dataclass(frozen=True)
class Target:
    """An architecture: Triton's name for it, and its limits.

    ``shared_bytes`` is what one block may hold; ``matrix`` a pattern of its matrix instruction.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    matrix: str


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166912, r"mma\.sync"),
        Target("sm_90", "cuda", 90, 32, 232448, r"wgmma|mma\.sync"),
        Target("sm_100", "cuda", 100, 32, 232448, r"tcgen05\.mma|mma\.sync"),
        Target("gfx942", "hip", "gfx942", 64, 65536, r"v_mfma"),
    )
}


@dataclass(frozen=True)
class Resources:
    """What one block and one thread of the compiled kernel take."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_for(launch: Launch, target: Target) -> Any:
    """Triton's compiled kernel, specialised as the JIT would for these arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    types, constants, promised = launch.signature(target.backend)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=promised)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton_compile(source, target=gpu, options=launch.options)


def assembly(compiled: Any) -> str:
    """PTX or AMD assembly."""
    return compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]


def resources(compiled: Any) -> Resources:
    """Registers, spills and shared memory of a compiled kernel."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def value(name: str) -> int:
            found = re.search(rf"\.{name}:\s*(\d+)", text)
            assert found is not None, f"no .{name} in the AMD assembly"
            return int(found[1])

        spilled = 4 * value("vgpr_spill_count") + value("private_segment_fixed_size")
        return Resources(value("vgpr_count"), spilled, shared)
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    assert usage is not None, said
    # A stack in Triton's code is where registers were spilled to.
    return Resources(int(usage[1]), int(usage[2]), shared)


def faults(compiled: Any, target: Target, *, wants_matrix: bool) -> list[str]:
    """Why this kernel should not be shipped for this target; empty if it may."""
    needs = resources(compiled)
    found = []
    if needs.spilled_bytes:
        found.append(f"spills {needs.spilled_bytes} bytes a thread")
    if needs.shared_bytes > target.shared_bytes:
        found.append(f"{needs.shared_bytes} bytes of shared memory, limit {target.shared_bytes}")
    if wants_matrix and re.search(target.matrix, assembly(compiled)) is None:
        found.append(f"no {target.matrix} instruction")
    return found
