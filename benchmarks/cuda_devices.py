"""What NVIDIA says its GPUs can do, and how many blocks of a kernel fit on one multiprocessor."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sm:
    """Limits of one multiprocessor (CUDA programming guide, compute capabilities).

    Attributes:
        shared_bytes: Shared memory that its blocks have in common.
        tensor_columns: Columns of tensor memory; 0 where there is none.
    """

    target: str
    shared_bytes: int
    tensor_columns: int = 0
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    partitions: int = 4


# Registers are given to a warp in units of 256, shared memory to a block in units of 128 bytes,
# and the driver keeps 1 KiB of it for each block (cuda_occupancy.h of the CUDA toolkit).
REGISTER_UNIT, SHARED_UNIT, RESERVED_BYTES = 256, 128, 1024
WARP = 32

SMS = {
    sm.target: sm
    for sm in (
        Sm("sm_80", 164 * 1024),
        Sm("sm_90", 228 * 1024),
        Sm("sm_100", 228 * 1024, tensor_columns=512),
    )
}


@dataclass(frozen=True)
class Gpu:
    """One product's data sheet: dense rates, in operations and bytes a second.

    Attributes:
        matrix: bfloat16 and float16 products on tensor cores.
        plain: float32 outside tensor cores.
        clock: Boost clock of the tensor rate, in Hz.
    """

    name: str
    target: str
    sms: int
    matrix: float
    plain: float
    bandwidth: float
    clock: float

    @property
    def exponentials(self) -> float:
        """exp2 a second: 16 a clock and multiprocessor on these architectures."""
        return 16.0 * self.sms * self.clock


GPUS = (
    Gpu("A100 80GB SXM", "sm_80", 108, 312e12, 19.5e12, 2.039e12, 1.41e9),
    Gpu("H100 SXM", "sm_90", 132, 989.5e12, 67e12, 3.35e12, 1.83e9),
    Gpu("H200 SXM", "sm_90", 132, 989.5e12, 67e12, 4.8e12, 1.83e9),
)


@dataclass(frozen=True)
class Occupancy:
    """How much of a multiprocessor a kernel may fill.

    Attributes:
        blocks: At the same time on one multiprocessor.
        share: Of its warps, from 0 to 1.
        limit: What ends it: "registers", "shared", "tensor memory", "warps" or "blocks".
    """

    blocks: int
    share: float
    limit: str


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(
    sm: Sm, registers: int, warps: int, shared_bytes: int, tensor_columns: int = 0
) -> Occupancy:
    """By the rules that CUDA's own calculator follows; nothing is run.

    Args:
        registers: Of one thread.
        warps: Of one block.
        shared_bytes: Of one block.
        tensor_columns: Of tensor memory that one block takes.
    """
    a_warp = _up(registers * WARP, REGISTER_UNIT)
    in_partition = sm.registers // sm.partitions // a_warp if a_warp else math.inf
    limits = {
        "warps": sm.warps // warps,
        "registers": in_partition * sm.partitions // warps,
        "shared": sm.shared_bytes // _up(shared_bytes + RESERVED_BYTES, SHARED_UNIT),
        "blocks": sm.blocks,
    }
    if a_warp * _up(warps, sm.partitions) > sm.registers or registers > 255:
        limits["registers"] = 0
    if tensor_columns:
        limits["tensor memory"] = sm.tensor_columns // tensor_columns
    limit = min(limits, key=lambda name: limits[name])
    blocks = int(limits[limit])
    return Occupancy(blocks, blocks * warps / sm.warps, limit)


def problem_of(device: str) -> str | None:
    """Why nothing can be timed there, in a sentence."""
    try:
        named = torch.device(device)
    except RuntimeError:
        return f"no device {device!r}: give cuda, cuda:1 or cpu."
    if named.type not in ("cuda", "cpu"):
        return f"only cuda and cpu can be timed here, not {named.type}."
    if named.type == "cpu":
        return None
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch sees no GPU" if built else f"this torch ({torch.__version__}) has no CUDA"
        return f"there is no CUDA device here: {why}. --device cpu runs the same code without one."
    if (named.index or 0) >= torch.cuda.device_count():
        return f"there is no {device}: torch sees {torch.cuda.device_count()} GPUs."
    return None
