"""Each family of kernels that serves some ops on a device, and results judged against float64."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda_kernels import choices, using
from tests.close import assert_no_worse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 63, 129, 1000)


def families(
    ops: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """Names, and contexts in which dispatch takes that family's kernels; plain torch's first."""
    served, _ = choices(ops, device, dtype)
    assert served
    for name, choice in served.items():
        yield name, using(choice, device, dtype)


def placed(x: Tensor, strides: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same numbers on the device: whole, a slice at an odd offset, or with turned axes."""
    x = x.to(device, dtype, copy=True)
    if strides == "sliced":
        return torch.cat([x, x, x], -1)[..., 1 : x.shape[-1] + 1].copy_(x)
    if strides == "transposed" and x.ndim > 1:
        order = (*range(x.ndim - 2, -1, -1), x.ndim - 1)
        return x.permute(order).contiguous().permute(order)
    return x


def judge(
    ops: Sequence[str],
    device: torch.device,
    run: Callable[..., Any],
    spec: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    gradients: bool = False,
    floor: float | None = None,
    smallest: float = 0.0,
) -> None:
    """``run`` by every family of kernels: values, and gradients if asked, against float64.

    Args:
        run: The public op on ``inputs``.
        spec: Its specification on the same, in any dtype and on any device.
        floor: What is allowed however good eager PyTorch is, over the truth's largest number; four
            steps in float32, where a few numbers may all happen to come out well, else one.
        smallest: The truth's largest number counts as no smaller: that of what it is made from.
    """
    dtype = inputs[0].dtype
    if floor is None:
        floor = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    truth, true_grads = _with_gradients(spec, [x.double().cpu() for x in inputs], gradients)
    eager, eager_grads = _with_gradients(spec, list(inputs), gradients)
    for name, kernels in families(ops, device, dtype):
        before = [x.clone() for x in inputs]
        with kernels:
            found, grads = _with_gradients(run, list(inputs), gradients)
        for now, then in zip(inputs, before, strict=True):
            assert torch.equal(now, then), f"{name}: an input was written to"
        assert all(x.device.type == device.type for x in found), name
        for one, plain, want in zip(found, eager, truth, strict=True):
            finite = want[want.isfinite()].abs()
            least = floor * max(float(finite.max()) if finite.numel() else 0.0, smallest)
            assert_no_worse(one, plain, want, name=name, floor=least)
        for one, plain, want in zip(grads, eager_grads, true_grads, strict=True):
            # A gradient that is exactly zero in truth is a difference of numbers near one.
            least = torch.finfo(dtype).eps * max(1.0, float(want.abs().max())) * 4
            assert_no_worse(one, plain, want, factor=3, floor=least, name=f"{name}, gradient")


def _with_gradients(
    run: Callable[..., Any], inputs: list[Tensor], gradients: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """What ``run`` gives, and the gradients of a fixed weighing of it in every input."""
    leaves = [x.detach().requires_grad_(gradients) for x in inputs]
    out = run(*leaves)
    found = [out] if isinstance(out, Tensor) else list(out)
    if not gradients:
        return [x.detach() for x in found], []
    loss = sum((x * _weights(x)).sum() for x in found if x.requires_grad)
    return [x.detach() for x in found], list(torch.autograd.grad(loss, leaves))


def _weights(x: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
    return weights.to(x.device, x.dtype)
