"""Run compiled sm_80 PTX on CPU tensors, and refuse what a GPU would not forgive.

All threads of a block advance together, the one furthest behind first, so that diverged threads
meet again. Refused: global and shared accesses out of bounds or misaligned, races between warps
between two barriers, reads of asynchronous copies that were not waited for, barriers that some
threads miss, two blocks writing one address, reads of registers never written.

Not modelled: time, warp-level races, wgmma, TMA and tcgen05 (so sm_80 code is what runs), global
atomics, the exact bits of approximate functions (``ex2.approx``, ``div.full``).
"""

import struct
from typing import Any

import numpy as np
import torch

from tests.gpu import ptx_access, ptx_arithmetic, ptx_collective
from tests.gpu.ahead_of_time import TARGETS, assembly, compile_for
from tests.gpu.launches import Launch
from tests.gpu.ptx_memory import GlobalMemory, SharedMemory
from tests.gpu.ptx_program import (
    SIGNED,
    UNSIGNED,
    Instruction,
    Operand,
    Program,
    PtxError,
    parse,
)

STEPS = {**ptx_arithmetic.STEPS, **ptx_access.STEPS, **ptx_collective.STEPS}


class Block:
    """The threads of one block, their registers and their shared memory."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        parameters: dict[str, bytes],
        shared_bytes: int,
        n_threads: int,
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
    ):
        self.program, self.memory, self.parameters = program, memory, parameters
        self.n = n_threads
        self.number = place[0] + grid[0] * (place[1] + grid[1] * place[2])
        self.shared = SharedMemory(program.static_shared_bytes + shared_bytes)
        self.registers: dict[str, np.ndarray] = {}
        self.groups: list[list[Any]] = []
        self.uncommitted: list[Any] = []
        self.pc = np.zeros(n_threads, np.int64)
        self.live = np.ones(n_threads, bool)
        self.mask: np.ndarray | None = None  # None: every thread runs the instruction
        thread = np.arange(n_threads, dtype=np.uint32)
        self.warp = (thread // 32).astype(np.int16)
        self.special = {"%tid.x": thread, "%laneid": thread % 32, "%warpid": thread // 32}
        self.special["%ntid.x"] = np.full(n_threads, n_threads, np.uint32)
        for axis in "yz":
            self.special[f"%tid.{axis}"] = np.zeros(n_threads, np.uint32)
            self.special[f"%ntid.{axis}"] = np.ones(n_threads, np.uint32)
        for axis, at, size in zip("xyz", place, grid, strict=True):
            self.special[f"%ctaid.{axis}"] = np.full(n_threads, at, np.uint32)
            self.special[f"%nctaid.{axis}"] = np.full(n_threads, size, np.uint32)

    def read(self, operand: Operand, kind: str) -> np.ndarray:
        """A register, special register, symbol or literal as ``pred``, ``f32``, ``s32``, ..."""
        assert isinstance(operand, str)
        if kind == "pred":
            if not operand.lstrip("!").startswith("%"):
                return np.full(self.n, int(operand, 0) != 0)
            negated = operand.startswith("!")
            value = self._register(operand.lstrip("!"))
            return ~value if negated else value
        bits = int(kind[1:])
        if operand in self.special:
            value = self.special[operand]
        elif operand.startswith("%"):
            value = self._register(operand)
        elif operand[:2] in ("0f", "0F"):
            value = np.array([int(operand[2:], 16)], np.uint32)
        elif operand in self.program.shared:
            value = np.array([self.program.shared[operand]], UNSIGNED[bits])
        else:
            literal = int(operand.rstrip("U"), 0) & ((1 << bits) - 1)
            value = np.array([literal], UNSIGNED[bits])
        if value.dtype.itemsize * 8 != bits:
            # A narrower instruction reads the low bits of a wider register.
            value = value.astype(UNSIGNED[bits])
        if kind[0] == "s":
            return value.view(SIGNED[bits])
        return value.view(np.float32) if kind == "f32" else value

    def _register(self, name: str) -> np.ndarray:
        value = self.registers.get(name)
        if value is None:
            raise PtxError(f"{name} is read and was never written")
        return value

    def write(self, name: Operand, value: np.ndarray) -> None:
        """To the threads that run the instruction."""
        assert isinstance(name, str)
        if name == "_":
            return
        width = self.program.width(name)
        if width == 1:
            value = np.asarray(value, bool)
        else:
            value = np.ascontiguousarray(value)
            value = value.view(UNSIGNED[value.dtype.itemsize * 8])
            if value.dtype.itemsize * 8 != width:
                value = value.astype(UNSIGNED[width])
        if value.shape != (self.n,):
            value = np.broadcast_to(value, (self.n,))
        if self.mask is not None:
            old = self.registers.get(name)
            if old is None:
                # As good as random: all ones is NaN in every float format.
                old = np.full(self.n, -1 if width > 1 else 1).astype(value.dtype)
            value = np.where(self.mask, value, old)
        self.registers[name] = value

    def active(self) -> np.ndarray:
        """Indices of the threads that run the instruction."""
        return np.arange(self.n) if self.mask is None else np.nonzero(self.mask)[0]

    def addresses(self, address: Operand) -> np.ndarray:
        """Byte addresses, one a thread."""
        base, offset = address
        if base in self.program.shared:
            start = self.program.shared[base]
            return np.full(self.n, start + offset, np.int64)
        value = self._register(base)
        return value.astype(np.int64) + offset

    def run(self) -> None:
        """Until every thread has returned."""
        instructions = self.program.instructions
        with np.errstate(all="ignore"):
            while self.live.any():
                at = int(self.pc[self.live].min())
                if at >= len(instructions):
                    break
                self._advance(at, instructions[at])
        if self.groups and any(self.groups):
            raise PtxError("the kernel ends with asynchronous copies on their way")

    def _advance(self, at: int, i: Instruction) -> None:
        here = self.live & (self.pc == at)
        taken = here
        if i.guard is not None:
            register, negated = i.guard
            value = self._register(register)
            taken = here & (~value if negated else value)
        self.pc[here] = at + 1
        if not taken.any():
            return
        if i.name == "bra":
            self.pc[taken] = self.program.labels[i.operands[0]]
        elif i.name in ("ret", "exit"):
            self.live &= ~taken
        elif i.name in ("bar", "barrier"):
            self._barrier(taken, i)
        else:
            self.mask = None if taken.all() else taken
            step = STEPS.get(i.name)
            if step is None:
                raise PtxError(f"not known: {i.text}")
            try:
                step(self, i)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise PtxError(f"{type(error).__name__}: {error} in: {i.text}") from error

    def _barrier(self, taken: np.ndarray, i: Instruction) -> None:
        if "warp" in i.op:
            return
        if not (taken == self.live).all():
            raise PtxError(f"a barrier that {int((self.live & ~taken).sum())} threads miss")
        self.shared.epoch += 1


def run_ptx(
    text: str,
    arguments: list[Any],
    grid: tuple[int, ...],
    n_threads: int,
    shared_bytes: int,
) -> None:
    """Run a kernel over its grid; what it stores lands in the tensors among ``arguments``."""
    program = parse(text)
    # Triton adds pointers to scratch memory, which none of these kernels uses.
    values = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    parameters = {
        name: _packed(value, size)
        for (name, size), value in zip(program.parameters, values, strict=True)
    }
    memory = GlobalMemory([x for x in arguments if isinstance(x, torch.Tensor)])
    x, y, z = (*grid, 1, 1)[:3]
    for number in range(x * y * z):
        place = number % x, number // x % y, number // (x * y)
        Block(program, memory, parameters, shared_bytes, n_threads, place, (x, y, z)).run()


def _packed(value: Any, size: int) -> bytes:
    if isinstance(value, torch.Tensor):
        return struct.pack("<Q", value.data_ptr())
    if isinstance(value, float):
        return struct.pack("<f", value)
    return int(value).to_bytes(size, "little", signed=value < 0)


def execute(launch: Launch, edit: Any = None) -> None:
    """Compile a launch for sm_80 and run it; ``edit`` may change the PTX text first."""
    compiled = compile_for(launch, TARGETS["sm_80"])
    text = assembly(compiled)
    run_ptx(
        text if edit is None else edit(text),
        launch.runtime_arguments(),
        launch.grid,
        compiled.metadata.num_warps * 32,
        compiled.metadata.shared,
    )
