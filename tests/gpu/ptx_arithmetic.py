"""Instructions that each thread runs alone: arithmetic, comparison, conversion, moves."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.gpu import ptx_numbers as numbers
from tests.gpu.ptx_program import SIGNED, UNSIGNED, Instruction, PtxError

if TYPE_CHECKING:
    from tests.gpu.ptx import Block

Step = Callable[["Block", Instruction], None]

FLOAT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "min": np.fmin,
    "max": np.fmax,
    "fma": numbers.fused,
    "mad": numbers.fused,
    "neg": np.negative,
    "abs": np.abs,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: np.float32(1) / np.sqrt(a),
    "rcp": lambda a: np.float32(1) / a,
}


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; a GPU promises nothing about a divisor of zero, so none may matter."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    if a.dtype.kind == "u":
        return quotient
    return (quotient + ((a % b != 0) & ((a < 0) != (b < 0)))).astype(a.dtype)


INTEGER = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def arithmetic(block: "Block", i: Instruction) -> None:
    """add, sub, mul, div, min, max, fma, mad, neg, abs and the special functions."""
    if i.type == "f32":
        values = [block.read(x, "f32") for x in i.operands[1:]]
        if "ftz" in i.op:
            values = [numbers.flush(value) for value in values]
        out = np.asarray(FLOAT[i.name](*values), np.float32)
        block.write(i.operands[0], numbers.flush(out) if "ftz" in i.op else out)
    elif i.type.removesuffix("x2") in _ROUND_TO_16:
        _in_16_bits(block, i)
    elif i.name in ("mul", "mad") and i.type[0] in "su":
        _multiply(block, i)
    elif i.type[0] in "su":
        out = INTEGER[i.name](*(block.read(x, i.type) for x in i.operands[1:]))
        block.write(i.operands[0], out)
    else:
        raise PtxError(f"not known: {i.text}")


def _in_16_bits(block: "Block", i: Instruction) -> None:
    """Each result of 16-bit floats rounded once; of the packed types, both halves alike."""
    kind, bits = i.type.removesuffix("x2"), 32 if i.type.endswith("x2") else 16
    if i.name not in ("add", "sub", "mul", "fma", "min", "max", "neg", "abs") or "ftz" in i.op:
        raise PtxError(f"not known: {i.text}")
    given = [np.broadcast_to(block.read(x, f"u{bits}"), block.n) for x in i.operands[1:]]
    halves = [_FROM_16[kind](np.ascontiguousarray(x).view(np.uint16)) for x in given]
    function = (lambda a, b, c: a * b + c) if i.name == "fma" else FLOAT[i.name]
    out = _ROUND_TO_16[kind](function(*(x.astype(np.float64) for x in halves)))
    block.write(i.operands[0], out.view(UNSIGNED[bits]))


def _multiply(block: "Block", i: Instruction) -> None:
    bits = int(i.type[1:])
    a, b = (block.read(x, i.type) for x in i.operands[1:3])
    if "wide" in i.op or "hi" in i.op:
        family = SIGNED if i.type[0] == "s" else UNSIGNED
        if bits == 64:
            raise PtxError(f"not known: {i.text}")
        wide = family[2 * bits]
        product = a.astype(wide) * b.astype(wide)
        if "hi" in i.op:
            product = (product >> wide(bits)).astype(family[bits])
        addend = i.type[0] + str(2 * bits if "wide" in i.op else bits)
    else:
        product, addend = a * b, i.type
    if i.name == "mad":
        product = product + block.read(i.operands[3], addend)
    block.write(i.operands[0], product)


def logic(block: "Block", i: Instruction) -> None:
    """and, or, xor, not on integers and predicates."""
    values = [block.read(x, i.type) for x in i.operands[1:]]
    if i.name == "not":
        block.write(i.operands[0], ~values[0])
    else:
        block.write(i.operands[0], LOGIC[i.name](*values))


def shift(block: "Block", i: Instruction) -> None:
    """shl and shr; a shift by the width or more gives zero, or the sign."""
    bits = int(i.type[1:])
    kind = i.type if i.type[0] == "s" else f"u{bits}"
    value = block.read(i.operands[1], kind)
    count = block.read(i.operands[2], "u32")
    within = np.minimum(count, bits - 1).astype(value.dtype)
    if i.name == "shl":
        out = np.where(count >= bits, value.dtype.type(0), value << within)
    else:
        beyond = value >> value.dtype.type(bits - 1) if kind[0] == "s" else value.dtype.type(0)
        out = np.where(count >= bits, beyond, value >> within)
    block.write(i.operands[0], out.astype(value.dtype))


def bit_field(block: "Block", i: Instruction) -> None:
    """bfe: ``length`` bits from ``start`` on, sign-extended for s32."""
    value = block.read(i.operands[1], "u32").astype(np.int64)
    start, length = (block.read(x, "u32").astype(np.int64) & 0xFF for x in i.operands[2:4])
    out = (value >> np.minimum(start, 32)) & ((np.int64(1) << np.minimum(length, 32)) - 1)
    if i.type == "s32":
        top = np.int64(1) << np.maximum(length - 1, 0)
        out = np.where((length > 0) & (out & top != 0), out - (top << 1), out)
    elif i.type != "u32":
        raise PtxError(f"not known: {i.text}")
    block.write(i.operands[0], (out & 0xFFFFFFFF).astype(np.uint32))


def count_bits(block: "Block", i: Instruction) -> None:
    """popc: how many bits are set, 32 bits wide also of a wider source."""
    if i.type not in ("b32", "b64"):
        raise PtxError(f"not known: {i.text}")
    value = block.read(i.operands[1], f"u{i.type[1:]}")
    block.write(i.operands[0], np.bitwise_count(value).astype(np.uint32))


def permute_bytes(block: "Block", i: Instruction) -> None:
    """prmt: each byte of the result is one of eight, or the sign of one."""
    a, b, selector = (np.broadcast_to(block.read(x, "u32"), block.n) for x in i.operands[1:4])
    source = np.stack([a, b], 1).view(np.uint8).reshape(block.n, 8)
    out = np.empty((block.n, 4), np.uint8)
    for place in range(4):
        chosen = (selector >> np.uint32(4 * place)) & np.uint32(15)
        value = source[np.arange(block.n), chosen & 7]
        sign = np.where(value & 0x80, np.uint8(255), np.uint8(0))
        out[:, place] = np.where(chosen & 8, sign, value)
    block.write(i.operands[0], out.view(np.uint32).reshape(-1))


def set_predicate(block: "Block", i: Instruction) -> None:
    """setp, with the unordered comparisons and a second predicate to combine with."""
    comparison = i.op[1]
    a, b = (block.read(x, i.type) for x in i.operands[1:3])
    unordered = np.isnan(a) | np.isnan(b) if i.type == "f32" else None
    if comparison in ("num", "nan"):
        out = unordered if comparison == "nan" else ~unordered
    elif comparison.endswith("u") and comparison[:-1] in COMPARE:
        out = COMPARE[comparison[:-1]](a, b) | unordered
    else:
        out = COMPARE[comparison](a, b)
        out = out if unordered is None else out & ~unordered
    if i.op[2] in LOGIC:
        out = LOGIC[i.op[2]](out, block.read(i.operands[3], "pred"))
    block.write(i.operands[0], out)


def select(block: "Block", i: Instruction) -> None:
    """selp."""
    a, b = (block.read(x, i.type) for x in i.operands[1:3])
    block.write(i.operands[0], np.where(block.read(i.operands[3], "pred"), a, b))


def move(block: "Block", i: Instruction) -> None:
    """mov, also between one register and several halves of it; cvta changes nothing here."""
    target, source = i.operands
    if isinstance(target, list):
        bits = int(i.type[1:]) // len(target)
        value = block.read(source, f"u{bits * len(target)}")
        for place, name in enumerate(target):
            shifted = value >> value.dtype.type(bits * place)
            block.write(name, shifted.astype(UNSIGNED[bits]))
    elif isinstance(source, list):
        bits = int(i.type[1:]) // len(source)
        out = np.zeros(block.n, UNSIGNED[bits * len(source)])
        for place, name in enumerate(source):
            part = block.read(name, f"u{bits}").astype(out.dtype)
            out = out | (part << out.dtype.type(bits * place))
        block.write(target, out)
    else:
        block.write(target, block.read(source, i.type))


_TYPE = re.compile(r"bf16x2|f16x2|bf16|f16|f32|f64|[sub]\d+")
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_TO_16 = {"bf16": numbers.to_bf16, "f16": numbers.to_f16}
_FROM_16 = {"bf16": numbers.from_bf16, "f16": numbers.from_f16}
_ROUND_TO_16 = {"bf16": numbers.round_to_bf16, "f16": numbers.round_to_f16}


def convert(block: "Block", i: Instruction) -> None:
    """cvt between integers, float32, float16 and bfloat16, and to float64."""
    target, source = [part for part in i.op[1:] if _TYPE.fullmatch(part)]
    if "sat" in i.op or source == "f64":
        raise PtxError(f"not known: {i.text}")
    if target in ("bf16x2", "f16x2"):
        high, low = (_TO_16[target[:-2]](block.read(x, "f32")) for x in i.operands[1:3])
        packed = (high.astype(np.uint32) << np.uint32(16)) | low.astype(np.uint32)
        block.write(i.operands[0], packed)
        return
    if source in _FROM_16:
        value = _FROM_16[source](block.read(i.operands[1], "u16"))
    else:
        value = block.read(i.operands[1], source)
    block.write(i.operands[0], _converted(value, target, i))


def _converted(value: np.ndarray, target: str, i: Instruction) -> np.ndarray:
    if target == "f64":
        return value.astype(np.float64)
    if target in _TO_16 or target == "f32":
        if value.dtype == np.float32 and target != "f32" and "rn" not in i.op:
            raise PtxError(f"not known: {i.text}")
        for mode in _ROUND.keys() & set(i.op):
            value = _ROUND[mode](value)
        value = value.astype(np.float32)
        return value if target == "f32" else _TO_16[target](value)
    dtype = (SIGNED if target[0] == "s" else UNSIGNED)[int(target[1:])]
    if value.dtype == np.float32:
        (mode,) = _ROUND.keys() & set(i.op)
        limits = np.iinfo(dtype)
        whole = _ROUND[mode](np.nan_to_num(value.astype(np.float64), nan=0.0))
        return np.clip(whole, limits.min, limits.max).astype(dtype)
    return value.astype(dtype)


STEPS: dict[str, Step] = {
    **dict.fromkeys(FLOAT, arithmetic),
    **dict.fromkeys(INTEGER, arithmetic),
    **dict.fromkeys((*LOGIC, "not"), logic),
    "shl": shift,
    "shr": shift,
    "bfe": bit_field,
    "popc": count_bits,
    "prmt": permute_bytes,
    "setp": set_predicate,
    "selp": select,
    "mov": move,
    "cvta": move,
    "cvt": convert,
}
