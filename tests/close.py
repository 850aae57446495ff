"""How numbers are compared: the only two ways, both in float64, both saying where they differ."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Values = torch.Tensor | np.ndarray | Sequence[Any] | float

# Largest |difference| allowed by default: DESIGN section 8's bound for tiny random models.
ATOL = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
MISMATCHES_SHOWN = 5


def _as_float64(values: Values) -> torch.Tensor:
    tensor = values if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values))
    return tensor.detach().to("cpu", torch.float64)


def _difference(actual: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """|actual - truth|: 0 where both are the same infinity or both NaN, inf where only one is."""
    difference = (actual - truth).abs()
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    return difference.nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(same, 0.0)


def _report(
    name: str, actual: torch.Tensor, truth: torch.Tensor, difference: torch.Tensor, allowed: Any
) -> str:
    allowed = torch.as_tensor(allowed, dtype=torch.float64).expand_as(difference)
    wrong = difference > allowed
    rms = difference.square().mean().sqrt()
    scale = truth.square().mean().sqrt()
    lines = [
        f"{name}: {int(wrong.sum())} of {wrong.numel()} values differ too much; "
        f"max |difference| {difference.max():.3e}, rms {rms:.3e} ({rms / scale:.2e} of truth's)"
    ]
    for index in wrong.nonzero()[:MISMATCHES_SHOWN].tolist():
        at = tuple(index)
        lines.append(
            f"  at {index}: {actual[at]:.9g}, truth {truth[at]:.9g}, "
            f"difference {difference[at]:.3e} > {allowed[at]:.3e}"
        )
    return "\n".join(lines)


def _check_shapes(name: str, actual: torch.Tensor, truth: torch.Tensor) -> None:
    assert actual.shape == truth.shape, (
        f"{name}: shape {tuple(actual.shape)}, truth has {tuple(truth.shape)}"
    )


def assert_close_to(
    actual: Values,
    truth: Values,
    *,
    atol: float | None = None,
    rtol: float = 0.0,
    name: str = "values",
) -> None:
    """Same shape, and ``|actual - truth| <= atol + rtol * |truth|`` everywhere.

    ``atol`` defaults to the bound for ``actual``'s dtype (`ATOL`); equal infinities and NaN in the
    same places are equal. A failure shows the largest difference and the first five places.
    """
    if atol is None:
        atol = ATOL.get(actual.dtype, 0.0) if isinstance(actual, torch.Tensor) else 1e-9
    got, want = _as_float64(actual), _as_float64(truth)
    _check_shapes(name, got, want)
    if got.numel() == 0:
        return
    difference = _difference(got, want)
    allowed = atol + (rtol * want.abs() if rtol else 0.0) * torch.ones_like(want)
    allowed = allowed.nan_to_num(nan=0.0, posinf=0.0)
    assert bool((difference <= allowed).all()), _report(name, got, want, difference, allowed)


def assert_no_worse(
    kernel: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    *,
    factor: float = 2.0,
    floor: float | None = None,
    name: str = "kernel",
) -> None:
    """A kernel may err at most ``factor`` times as much as plain PyTorch does in the same dtype.

    Args:
        kernel: What is judged.
        eager: The reference implementation, in the same dtype.
        truth: The reference implementation in float64.
        factor: 2 for values, 3 for gradients (Dao-AILab/flash-attention's rule).
        floor: Added to the bound; by default one rounding step of the dtype at the largest truth,
            since eager may happen to be exact.
    """
    assert kernel.dtype == eager.dtype, f"{name}: {kernel.dtype}, eager has {eager.dtype}"
    assert truth.dtype == torch.float64, f"{name}: truth must be float64, not {truth.dtype}"
    got, plain, want = (_as_float64(tensor) for tensor in (kernel, eager, truth))
    _check_shapes(name, got, want)
    _check_shapes(f"{name} (eager)", plain, want)
    if got.numel() == 0:
        return
    if floor is None:
        finite = want[want.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        floor = torch.finfo(kernel.dtype).eps * largest
    difference, eager_error = _difference(got, want), _difference(plain, want)
    assert bool(eager_error.isfinite().all()), f"{name}: eager itself disagrees with truth on NaN"
    bound = factor * float(eager_error.max()) + floor
    ratio = float(difference.max()) / max(float(eager_error.max()), 1e-300)
    assert float(difference.max()) <= bound, (
        f"{name}: error is {ratio:.2f} x eager's, allowed {factor:g} x + {floor:.1e}\n"
        + _report(name, got, want, difference, bound)
    )
