"""16-bit floats in numpy, and the float32 arithmetic that PTX asks for."""

import numpy as np


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 patterns as float32: exact."""
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(
        np.float32
    )


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to uint16 patterns, round to nearest even; NaN becomes the canonical one."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def from_f16(bits: np.ndarray) -> np.ndarray:
    """uint16 patterns as float32: exact."""
    return np.ascontiguousarray(bits, np.uint16).view(np.float16).astype(np.float32)


def to_f16(values: np.ndarray) -> np.ndarray:
    """float32 to uint16 patterns, round to nearest even."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).astype(np.float16).view(np.uint16)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """float64 to uint16 patterns with one rounding."""
    values = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    # Towards zero with the last bit set where inexact: the second rounding then decides as one.
    below = np.where(np.abs(near.astype(np.float64)) > np.abs(values), np.nextafter(near, 0), near)
    below = np.ascontiguousarray(below, np.float32)
    is_exact = (below.astype(np.float64) == values) | np.isnan(values)
    odd = (below.view(np.uint32) | np.where(is_exact, 0, 1).astype(np.uint32)).view(np.float32)
    return to_bf16(odd)


def round_to_f16(values: np.ndarray) -> np.ndarray:
    """float64 to uint16 patterns with one rounding."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(np.float16).view(np.uint16)


def flush(values: np.ndarray) -> np.ndarray:
    """``.ftz``: subnormal numbers are zero."""
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` with one rounding (up to double rounding in the last place)."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)
