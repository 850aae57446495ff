"""Instructions that the 32 threads of a warp run together: shuffles, sums, matrix products.

The lane layouts are those of the PTX ISA's tables. Triton's compiler was written from the same
tables by others, so a kernel that comes out right is a check on both.
"""

from typing import TYPE_CHECKING

import numpy as np

from tests.gpu import ptx_numbers as numbers
from tests.gpu.ptx_program import Instruction, PtxError

if TYPE_CHECKING:
    from tests.gpu.ptx import Block

LANE = np.arange(32)


def _require_whole_warps(block: "Block", i: Instruction) -> None:
    if block.mask is not None:
        raise PtxError(f"part of the block runs what a whole warp must: {i.text}")


def shuffle(block: "Block", i: Instruction) -> None:
    """shfl.sync: each lane reads another's register; outside its segment, its own."""
    _require_whole_warps(block, i)
    target, _, in_range = i.operands[0].partition("|")
    value = np.broadcast_to(block.read(i.operands[1], "u32"), block.n).reshape(-1, 32)
    other, limits = (
        np.broadcast_to(block.read(x, "u32"), block.n).reshape(-1, 32).astype(np.int64)
        for x in i.operands[2:4]
    )
    segment, clamp = (limits >> 8) & 31, limits & 31
    first, last = LANE & segment, (LANE & segment) | (clamp & ~segment & 31)
    mode = i.op[2]
    if mode == "bfly":
        source, inside = LANE ^ other, None
    elif mode == "idx":
        source, inside = first | (other & ~segment & 31), None
    elif mode == "down":
        source, inside = LANE + other, None
    else:
        source, inside = LANE - other, LANE - other >= last
    inside = source <= last if inside is None else inside
    source = np.where(inside, source, LANE)
    block.write(target, np.take_along_axis(value, source, 1).reshape(-1))
    if in_range:
        block.write(in_range, inside.reshape(-1))


REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def reduce_lanes(block: "Block", i: Instruction) -> None:
    """redux.sync: over the lanes that a lane's mask names, itself among them."""
    _require_whole_warps(block, i)
    kind = i.type.replace("b", "u")
    value = np.broadcast_to(block.read(i.operands[1], kind), block.n).reshape(-1, 32)
    members = np.broadcast_to(block.read(i.operands[2], "u32"), block.n).reshape(-1, 32)
    out = np.empty_like(value)
    for warp, lane in np.ndindex(*value.shape):
        named = members[warp, lane] >> LANE.astype(np.uint32) & 1 == 1
        if not named[lane] or (members[warp, named] != members[warp, lane]).any():
            raise PtxError(f"lanes that do not agree who reduces: {i.text}")
        out[warp, lane] = REDUCTIONS[i.op[2]].reduce(value[warp, named])
    block.write(i.operands[0], out.reshape(-1))


def load_matrix(block: "Block", i: Instruction) -> None:
    """ldmatrix: matrix j of 8 x 8 halves has its row addresses in lanes 8 j to 8 j + 7."""
    _require_whole_warps(block, i)
    if "m8n8" not in i.op or i.type != "b16":
        raise PtxError(f"not known: {i.text}")
    addresses = block.addresses(i.operands[1]).reshape(-1, 32)
    n_warps = len(addresses)
    for j, target in enumerate(i.operands[0]):
        rows = addresses[:, 8 * j : 8 * j + 8].reshape(-1)
        data = block.shared.load(rows, 16, np.repeat(np.arange(n_warps), 8), i.text)
        matrix = data.view(np.uint16).reshape(n_warps, 8, 8)
        if "trans" in i.op:
            matrix = matrix.transpose(0, 2, 1)
        block.write(target, np.ascontiguousarray(matrix).view(np.uint32).reshape(-1))


def multiply_matrices(block: "Block", i: Instruction) -> None:
    """mma.sync m16n8k16 of float16 or bfloat16 into float32."""
    _require_whole_warps(block, i)
    kind = i.op[-2]
    wanted = ("m16n8k16", "row", "col", "f32", kind, kind, "f32")
    if i.op[3:] != wanted or kind not in ("bf16", "f16"):
        raise PtxError(f"not known: {i.text}")
    wide = numbers.from_bf16 if kind == "bf16" else numbers.from_f16
    n_warps = block.n // 32
    group, member = LANE >> 2, LANE & 3

    def halves(register: str) -> np.ndarray:
        bits = np.broadcast_to(block.read(register, "u32"), block.n)
        return wide(np.ascontiguousarray(bits).view(np.uint16)).reshape(n_warps, 32, 2)

    a = np.empty((n_warps, 16, 16), np.float32)
    b = np.empty((n_warps, 16, 8), np.float32)
    c = np.empty((n_warps, 16, 8), np.float32)
    for j, register in enumerate(i.operands[1]):
        pair = halves(register)
        for e in (0, 1):
            a[:, group + 8 * (j & 1), 2 * member + e + 8 * (j >> 1)] = pair[:, :, e]
    for j, register in enumerate(i.operands[2]):
        pair = halves(register)
        for e in (0, 1):
            b[:, 2 * member + e + 8 * j, group] = pair[:, :, e]
    for j, register in enumerate(i.operands[3]):
        value = np.broadcast_to(block.read(register, "f32"), block.n).reshape(n_warps, 32)
        c[:, group + 8 * (j >> 1), 2 * member + (j & 1)] = value
    out = a @ b + c
    for j, register in enumerate(i.operands[0]):
        value = out[:, group + 8 * (j >> 1), 2 * member + (j & 1)]
        block.write(register, np.ascontiguousarray(value).reshape(-1))


STEPS = {"shfl": shuffle, "redux": reduce_lanes, "ldmatrix": load_matrix, "mma": multiply_matrices}
