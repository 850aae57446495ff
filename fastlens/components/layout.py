"""How weights lie in memory: TransformerLens' shapes over ``nn.Linear``'s ``[out, in]`` storage.

Every projection is stored as the matrix its product reads, ``[out, in]``, and shown with
TransformerLens' axes as a strided parameter. So ``F.linear`` copies nothing, Hugging Face's linear
weights load without a transpose, and the strides survive ``.to()``, deepcopy, pickling and
``load_state_dict``. A leaf replaced by hand may have other strides: then the product copies, and
stays right.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def input_heads(
    storage: Float[Tensor, "out d_model"], n_heads: int
) -> Float[Tensor, "h d_model d"]:
    """``[head * d_head, d_model]`` storage as ``[head, d_model, d_head]`` (W_Q, W_K, W_V)."""
    return storage.view(n_heads, -1, storage.shape[1]).transpose(1, 2)


def output_heads(
    storage: Float[Tensor, "d_model in"], n_heads: int
) -> Float[Tensor, "h d d_model"]:
    """``[d_model, head * d_head]`` storage as ``[head, d_head, d_model]`` (W_O)."""
    return storage.view(storage.shape[0], n_heads, -1).permute(1, 2, 0)


def from_input_heads(w: Float[Tensor, "h d_model d"]) -> Float[Tensor, "out d_model"]:
    """W_Q, W_K or W_V as the ``[out, in]`` matrix of its product; a view in our layout."""
    return w.transpose(1, 2).reshape(-1, w.shape[1])


def from_output_heads(w: Float[Tensor, "h d d_model"]) -> Float[Tensor, "d_model in"]:
    """W_O as the ``[out, in]`` matrix of its product; a view in our layout."""
    return w.permute(2, 0, 1).reshape(w.shape[2], -1)


def linear_parameter(d_in: int, d_out: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised ``[d_in, d_out]`` parameter over ``[d_out, d_in]`` storage."""
    return nn.Parameter(torch.empty(d_out, d_in, dtype=dtype).t())


def side_by_side(
    rows: Sequence[int], d_in: int, dtype: torch.dtype, device: torch.device | None = None
) -> list[Tensor]:
    """Uninitialised ``[rows, d_in]`` matrices, one below the other in one storage."""
    return list(torch.empty(sum(rows), d_in, dtype=dtype, device=device).split(list(rows)))


def neighbours(parts: Sequence[Tensor]) -> Tensor | None:
    """One ``[sum of rows, ...]`` view over contiguous tensors that lie behind one another.

    None if they do not, if gradients are being recorded (each part must get its own), or while a
    compiler traces (pointers cannot be read then).
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.dtype != first.dtype or not part.is_contiguous():
            return None
        end += part.nbytes
    rows = sum(part.shape[0] for part in parts)
    try:
        return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    except RuntimeError:
        # Neighbours by chance, in separate allocations: no one view may reach into both.
        return None


def neighbour_heads(
    first: Float[Tensor, "batch pos h d"], second: Float[Tensor, "batch pos g d"]
) -> Float[Tensor, "batch pos h_and_g d"] | None:
    """One view over two stacks of heads that came from one product; None if they did not.

    None too while gradients are recorded or a compiler traces, as for `neighbours`.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    batch, pos, heads, d_head = first.shape
    gap = heads * first.stride(2) * first.element_size()
    if (
        second.data_ptr() != first.data_ptr() + gap
        or second.stride() != first.stride()
        or second.dtype != first.dtype
        or second.shape[:2] != first.shape[:2]
        or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    ):
        return None
    return first.as_strided((batch, pos, heads + second.shape[2], d_head), first.stride())


def rejoin(parameters: Sequence[nn.Parameter], storage_shape: Sequence[tuple[int, ...]]) -> None:
    """Move parameters into one storage again, after ``.to()`` has scattered them.

    ``storage_shape[i]`` is ``(rows, columns)`` of parameter i in ``[out, in]`` form. Parameters
    that are not in our layout (replaced by hand) are left alone.
    """
    first = parameters[0]
    if any(p.dtype != first.dtype or p.device != first.device for p in parameters):
        return
    joint = side_by_side(
        [s[0] for s in storage_shape], storage_shape[0][1], first.dtype, first.device
    )
    for parameter, part in zip(parameters, joint, strict=True):
        view = part.as_strided(parameter.shape, parameter.stride())
        view.copy_(parameter.detach())
        parameter.data = view


def linear(
    x: Float[Tensor, "... in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "... out"]:
    """``x @ weight.T + bias``; an input of another dtype is taken to the weight's."""
    if x.dtype != weight.dtype:
        x = x.to(weight.dtype)
    return F.linear(x, weight, bias)
