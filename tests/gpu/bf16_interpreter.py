"""Give Triton's interpreter bfloat16, whose bit patterns it takes for integers.

bfloat16 operands become float32, the operation is done there, and the result is rounded to nearest
even, as a GPU does. Built on Triton's private interfaces: Triton is pinned where this runs.
"""

from typing import Any

import numpy as np

from tests.gpu.ptx_numbers import from_bf16, to_bf16


def install() -> None:
    """Once a process, after TRITON_INTERPRET was set and before a kernel runs."""
    import triton.language as tl
    from triton.runtime import interpreter

    handle = interpreter.TensorHandle
    builder = interpreter.InterpreterBuilder

    def is_bf16(value: Any) -> bool:
        return isinstance(value, handle) and value.dtype.scalar == tl.bfloat16

    def wide(value: Any) -> Any:
        return handle(from_bf16(value.data), tl.float32) if is_bf16(value) else value

    def narrow(values: np.ndarray) -> Any:
        return handle(to_bf16(values), tl.bfloat16)

    _correct_conversions(interpreter, builder, handle, narrow)
    binary, unary, dot, fma = (
        builder.binary_op, builder.unary_op, builder.create_dot, builder.create_fma
    )  # fmt: skip

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        if not (is_bf16(a) and is_bf16(b)):
            return binary(self, a, b, op)
        out = op(from_bf16(a.data), from_bf16(b.data))
        return handle(out, tl.int1) if out.dtype == np.bool_ else narrow(out)

    def unary_op(self: Any, a: Any, op: Any) -> Any:
        return narrow(op(from_bf16(a.data))) if is_bf16(a) else unary(self, a, op)

    def create_dot(self: Any, a: Any, b: Any, out: Any, precision: Any, limit: Any) -> Any:
        return dot(self, wide(a), wide(b), out, precision, limit)

    def create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        if not is_bf16(c):
            return fma(self, a, b, c)
        return narrow(from_bf16(a.data) * from_bf16(b.data) + from_bf16(c.data))

    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.create_dot, builder.create_fma = create_dot, create_fma
    for reduction in (interpreter.ReduceOps, interpreter.ScanOps):
        _correct_reduction(reduction, handle, is_bf16, narrow)


def _correct_conversions(interpreter: Any, builder: Any, handle: Any, narrow: Any) -> None:
    import triton.language as tl

    convert, cast = interpreter._convert_float, builder.cast_impl

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:
            return from_bf16(values).view(np.uint32).reshape(values.shape)
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(values).view(np.float32)
            if rounding == interpreter._ir.ROUNDING_MODE.RTZ:
                return (bits.view(np.uint32) >> 16).astype(np.uint16).reshape(values.shape)
            return to_bf16(bits).reshape(values.shape)
        return convert(values, source, target, rounding)

    def cast_impl(self: Any, value: Any, target: Any) -> Any:
        source, goal = value.dtype.scalar, target.scalar
        if source == tl.bfloat16 and goal not in (tl.bfloat16, tl.float32):
            return cast(self, handle(from_bf16(value.data), tl.float32), target)
        if goal == tl.bfloat16 and source not in (tl.bfloat16, tl.float32):
            return narrow(value.data.astype(np.float32))
        return cast(self, value, target)

    interpreter._convert_float, builder.cast_impl = convert_float, cast_impl


def _correct_reduction(reduction: Any, handle: Any, is_bf16: Any, narrow: Any) -> None:
    """Reductions and scans work on raw arrays: give them float32 ones."""
    import triton.language as tl

    apply = reduction.apply_impl

    def widened(x: Any) -> Any:
        if not is_bf16(x.handle):
            return x
        kind = tl.block_type(tl.float32, x.shape)
        return tl.tensor(handle(from_bf16(x.handle.data), tl.float32), kind)

    def narrowed(x: Any) -> Any:
        if x.handle.dtype.scalar != tl.float32:
            return x
        shape = list(getattr(x, "shape", ()))
        kind = tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16
        return tl.tensor(narrow(x.handle.data), kind)

    def apply_impl(self: Any, given: Any) -> Any:
        values = given if isinstance(given, tuple) else (given,)
        if not is_bf16(getattr(values[0], "handle", None)):
            return apply(self, given)
        is_tuple = isinstance(given, tuple)
        out = apply(self, tuple(map(widened, values)) if is_tuple else widened(given))
        return tuple(map(narrowed, out)) if isinstance(out, tuple) else narrowed(out)

    reduction.apply_impl = apply_impl
