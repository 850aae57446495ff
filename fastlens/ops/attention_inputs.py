"""What the attention ops are given, checked: nothing that does not fit is computed with."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlens.errors import ShapeError
from fastlens.kernels.masks import AttentionRule


def checked_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    rule: AttentionRule,
    offset: int,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor | None:
    """The key mask with one row an example, once all inputs of an attention op were found to fit.

    Shapes and types alone are compared: no element of a tensor is read.

    Raises: ShapeError for shapes or types that do not fit, an offset below 0, a window below 1.
    """
    q_shape, k_shape = q.shape, k.shape
    if (
        len(q_shape) != 4
        or len(k_shape) != 4
        or q_shape[0] != k_shape[0]
        or q_shape[3] != k_shape[3]
    ):
        raise ShapeError(
            f"q is [batch, query_pos, head, d_head] and k [batch, key_pos, kv_head, d_head], of "
            f"one batch and d_head; got {list(q_shape)} and {list(k_shape)}."
        )
    check_heads(q_shape[2], k_shape[2])
    check_floats(q)
    if v is not None and v.shape != k_shape:
        raise ShapeError(
            f"each key needs its value: k is {list(k_shape)} and v {list(v.shape)}. Give them one "
            f"shape."
        )
    if offset < 0:
        raise ShapeError(
            f"offset={offset} puts the first query before position 0, where it sees no key. It is "
            f"the number of keys before the first query, 0 or more."
        )
    check_rule(rule)
    if bias is not None:
        _check_bias(bias, q_shape, k_shape)
    if lse is not None and lse.shape != (q_shape[0], q_shape[2], q_shape[1]):
        raise ShapeError(
            f"lse is [batch, head, query_pos] of all queries, "
            f"{[q_shape[0], q_shape[2], q_shape[1]]}; got {list(lse.shape)}. Give what "
            f"attention_with_lse gave for them."
        )
    if key_mask is None:
        return None
    check_mask(key_mask)
    if key_mask.shape == k_shape[:2]:
        return key_mask
    if key_mask.shape == (1, k_shape[1]):
        return key_mask.expand(k_shape[0], -1)
    raise ShapeError(
        f"key_mask is [batch, key_pos], {list(k_shape[:2])}, or one row for all examples; got "
        f"{list(key_mask.shape)}."
    )


def widened(v: Tensor, k: Tensor) -> Tensor:
    """Values with zeros behind them, as wide as the keys that the kernels take them with."""
    return F.pad(v, (0, k.shape[-1] - v.shape[-1]))


def check_heads(n_heads: int, kv_heads: int) -> None:
    """Raises ShapeError for query heads that are no multiple of the KV heads, or no KV heads."""
    if not kv_heads or n_heads % kv_heads:
        raise ShapeError(
            f"{n_heads} query heads cannot share {kv_heads} KV heads evenly. Give 1 or more KV "
            f"heads and a multiple of them of query heads."
        )


def check_floats(x: Tensor) -> None:
    """Raises ShapeError for queries or values that are no floating-point numbers."""
    if not x.is_floating_point():
        raise ShapeError(
            f"attention takes floating-point numbers and got {x.dtype}. Convert with .float()."
        )


def check_rule(rule: AttentionRule) -> None:
    """Raises ShapeError for a window in which a query does not see its own position."""
    if rule.window is not None and rule.window < 1:
        raise ShapeError(
            f"window={rule.window} hides each query's own position. It counts that one too, so it "
            f"is 1 or more, or None for no window."
        )


def check_mask(key_mask: Tensor) -> None:
    """Raises ShapeError for a mask that is not boolean."""
    if key_mask.dtype is not torch.bool:
        raise ShapeError(
            f"key_mask is boolean, True where a key counts; got {key_mask.dtype}. Give "
            f"key_mask.bool() if it is 0 for padding."
        )


def check_lengths(key_lengths: Tensor, batch: int) -> None:
    """Raises ShapeError for lengths that are not one integer an example."""
    if key_lengths.shape != (batch,) or not is_integer(key_lengths):
        raise ShapeError(
            f"key_lengths is [batch], one integer for each of {batch} examples; got "
            f"{key_lengths.dtype} {list(key_lengths.shape)}."
        )


def check_branches(branches: Any, n_branches: int) -> None:
    """What can be known without waiting for a GPU: integers of one axis, from 0 up on the CPU.

    Raises: ShapeError.
    """
    if not isinstance(branches, Tensor) or branches.ndim != 1 or not is_integer(branches):
        given = (
            f"{branches.dtype} {list(branches.shape)}"
            if isinstance(branches, Tensor)
            else repr(branches)
        )
        raise ShapeError(f"a span's branches are a tensor of integers with one axis; got {given}.")
    # A compiler's or a fake tensor has nothing to read.
    is_plain = type(branches) is Tensor and not torch.compiler.is_compiling()
    if not is_plain or branches.device.type != "cpu" or not branches.numel():
        return
    least, most = map(int, branches.aminmax())
    if least < 0 or most >= n_branches:
        raise ShapeError(
            f"a span names branch {least if least < 0 else most}, and the table has {n_branches} "
            f"branches. Count from 0."
        )


def indices_of(indices: Any, length: int, name: str) -> Sequence[int]:
    """Indices from 0 up, checked against a length; negative ones count from the end.

    Raises: ShapeError for an index outside, and for what is no index: a truth value, a fraction.
    """
    if isinstance(indices, range) and (
        not len(indices) or (min(indices) >= 0 and max(indices) < length)
    ):
        return indices
    given = _listed(indices, name)
    outside = [i for i in given if not -length <= i < length]
    if outside:
        raise ShapeError(f"{name} {outside[0]} was asked for, and there are {length}.")
    return tuple(i + length if i < 0 else i for i in given)


def is_integer(x: Tensor) -> bool:
    """Whether a tensor can hold indices: truth values cannot, they would count as 0 and 1."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)


def _listed(indices: Any, name: str) -> list[int]:
    if isinstance(indices, Tensor):
        # An empty tensor is of floats unless one says otherwise.
        if indices.ndim == 1 and (is_integer(indices) or not len(indices)):
            return indices.tolist()
        found = f"a {indices.dtype} tensor {list(indices.shape)}"
    else:
        try:
            return [i if type(i) is int else _index(i) for i in indices]
        except TypeError:
            found = repr(indices)
    raise ShapeError(
        f"{name} indices are a sequence or a tensor of integers with one axis; got {found}. For a "
        f"mask of truth values give mask.nonzero()[:, 0], for one index a list of it."
    )


def _index(i: Any) -> int:
    if isinstance(i, bool) or getattr(i, "dtype", None) == torch.bool:
        raise TypeError
    return operator.index(i)


def _check_bias(bias: Tensor, q_shape: Sequence[int], k_shape: Sequence[int]) -> None:
    wanted, found = (q_shape[0], q_shape[2], q_shape[1], k_shape[1]), bias.shape
    fits = len(found) == 4 and found[2:] == wanted[2:]
    if not fits or found[0] not in (1, wanted[0]) or found[1] not in (1, wanted[1]):
        raise ShapeError(
            f"bias is [batch or 1, head or 1, query_pos, key_pos], here {list(wanted)}; got "
            f"{list(found)}. Expand one that queries share."
        )
    if not bias.is_floating_point():
        raise ShapeError(
            f"bias is added to the scores, so it is of floating-point numbers; got {bias.dtype}. "
            f"A mask of keys is key_mask."
        )
