"""Instructions that touch memory: loads, stores, asynchronous copies."""

from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.ptx_program import UNSIGNED, Instruction, PtxError

if TYPE_CHECKING:
    from tests.gpu.ptx import Block


def load(block: "Block", i: Instruction) -> None:
    """ld from parameters, global or shared memory."""
    bits, count = int(i.type[1:]), i.vector()
    targets = i.operands[0] if isinstance(i.operands[0], list) else [i.operands[0]]
    if "param" in i.op:
        name, offset = i.operands[1]
        raw = block.parameters[name][offset : offset + bits // 8 * count]
        for place, target in enumerate(targets):
            part = raw[place * bits // 8 : (place + 1) * bits // 8]
            block.write(target, np.full(block.n, np.frombuffer(part, UNSIGNED[bits])[0]))
        return
    active = block.active()
    addresses = block.addresses(i.operands[1])[active]
    size = bits // 8 * count
    if "shared" in i.op:
        data = block.shared.load(addresses, size, block.warp[active], i.text)
    else:
        data = block.memory.load(addresses, size, i.text)
    values = np.zeros((block.n, count), UNSIGNED[bits])
    values[active] = data.view(UNSIGNED[bits])
    for place, target in enumerate(targets):
        block.write(target, values[:, place].copy())


def store(block: "Block", i: Instruction) -> None:
    """st to global or shared memory."""
    bits = int(i.type[1:])
    sources = i.operands[1] if isinstance(i.operands[1], list) else [i.operands[1]]
    columns = [np.broadcast_to(block.read(x, f"u{bits}"), block.n) for x in sources]
    active = block.active()
    data = np.stack(columns, 1)[active].view(np.uint8).reshape(len(active), -1)
    addresses = block.addresses(i.operands[0])[active]
    if "shared" in i.op:
        block.shared.store(addresses, data, block.warp[active], i.text)
    else:
        block.memory.store(addresses, data, block.number, i.text)


def copy(block: "Block", i: Instruction) -> None:
    """cp.async: issued, put into a group, waited for."""
    if "commit_group" in i.op:
        block.groups.append(block.uncommitted)
        block.uncommitted = []
        return
    if "wait_group" in i.op or "wait_all" in i.op:
        if "wait_all" in i.op:
            block.groups.append(block.uncommitted)
            block.uncommitted = []
        left = 0 if "wait_all" in i.op else int(i.operands[0], 0)
        while len(block.groups) > left:
            for addresses, data, warps, text in block.groups.pop(0):
                block.shared.land_copy(addresses, data, warps, text)
        return
    if "global" not in i.op or "shared" not in i.op:
        raise PtxError(f"not known: {i.text}")
    size = int(i.operands[2], 0)
    active = block.active()
    wanted = np.full(block.n, size, np.int64)
    if len(i.operands) > 3:
        wanted = np.broadcast_to(block.read(i.operands[3], "u32"), block.n).astype(np.int64)
    # Bytes beyond those wanted are zeros, and nothing is read for them.
    data = np.zeros((block.n, size), np.uint8)
    for bytes_read in np.unique(wanted[active]):
        which = active[wanted[active] == bytes_read]
        if bytes_read == size:
            data[which] = block.memory.load(block.addresses(i.operands[1])[which], size, i.text)
        elif bytes_read != 0:
            raise PtxError(f"not known: a copy of {bytes_read} of {size} bytes: {i.text}")
    addresses, warps = block.addresses(i.operands[0])[active], block.warp[active]
    block.shared.start_copy(addresses, size, warps, i.text)
    block.uncommitted.append((addresses, data[active], warps, i.text))


STEPS = {"ld": load, "st": store, "cp": copy}
