"""Small things about tensors."""

from collections.abc import Mapping
from typing import Any

import einops
import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fastlens.errors import ShapeError
from fastlens.tokens import get_cumsum_along_dim, get_offset_position_ids

__all__ = [
    "check_structure",
    "filter_dict_by_prefix",
    "get_corner",
    "get_cumsum_along_dim",
    "get_offset_position_ids",
    "is_lower_triangular",
    "is_square",
    "remove_batch_dim",
    "repeat_along_head_dimension",
    "to_numpy",
    "transpose",
]


def to_numpy(tensor: Any) -> np.ndarray:
    """An array of the same values: from a tensor (detached, on the CPU), list, tuple or number.

    bfloat16, which numpy does not know, becomes float32. Other tensors on the CPU share their
    memory with the array.
    """
    if isinstance(tensor, Tensor):
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if isinstance(tensor, np.ndarray | np.generic | list | tuple | bool | int | float | str):
        return np.asarray(tensor)
    raise ValueError(f"to_numpy takes a tensor, array, list, tuple or number; got {type(tensor)}.")


def get_corner(tensor: Any, n: int = 3) -> Any:
    """The first ``n`` entries along every axis."""
    return tensor[tuple(slice(n) for _ in range(tensor.ndim))]


def remove_batch_dim(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Without its first axis if that has length 1, else as it is."""
    return tensor.squeeze(0) if tensor.shape[0] == 1 else tensor


def transpose(tensor: Shaped[Tensor, "*lead a b"]) -> Shaped[Tensor, "*lead b a"]:
    """With its last two axes swapped."""
    return tensor.transpose(-1, -2)


def is_square(x: Shaped[Tensor, "..."]) -> bool:
    """Whether it is a matrix with as many rows as columns."""
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Shaped[Tensor, "..."]) -> bool:
    """Whether it is a square matrix with zeros above the diagonal."""
    return is_square(x) and x.equal(x.tril())


def check_structure(
    t1: Shaped[Tensor, "..."], t2: Shaped[Tensor, "..."], *, verbose: bool = False
) -> None:
    """Print whether two matrices rise and fall in the same places: ``PASSED``, or the rows and the
    columns after which they do not.

    Neighbouring rows (columns) are compared entry by entry: is the first at least the second?

    Args:
        verbose: Print each row and column that differs.

    Raises: ShapeError unless both are matrices of one shape.
    """
    if t1.ndim != 2 or t1.shape != t2.shape:
        raise ShapeError(
            f"check_structure takes two matrices of one shape; got {tuple(t1.shape)} and "
            f"{tuple(t2.shape)}."
        )
    rows = _mismatches(t1, t2, "row", verbose)
    columns = _mismatches(t1.T, t2.T, "column", verbose)
    if not rows and not columns:
        print("PASSED")
    if rows:
        print(f"row mismatch: {rows}")
    if columns:
        print(f"column mismatch: {columns}")


def _mismatches(t1: Tensor, t2: Tensor, kind: str, verbose: bool) -> list[int]:
    falls1, falls2 = t1[:-1] >= t1[1:], t2[:-1] >= t2[1:]
    found = (falls1 != falls2).any(-1).nonzero()[:, 0].tolist()
    if verbose:
        print(f"Checking {kind}s")
        for index in found:
            print(f"\t{kind}s {index}:{index + 1}")
            print(f"\tt1: {falls1[index].tolist()}")
            print(f"\tt2: {falls2[index].tolist()}")
    return found


def repeat_along_head_dimension(
    tensor: Float[Tensor, "batch pos d_model"], n_heads: int, clone_tensor: bool = True
) -> Float[Tensor, "batch pos head d_model"]:
    """A head axis with the same values in every head: a copy of its own, or a view."""
    repeated = einops.repeat(tensor, "batch pos d -> batch pos head d", head=n_heads)
    return repeated.clone() if clone_tensor else repeated


def filter_dict_by_prefix(dictionary: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries below ``prefix`` (which need not end in a dot), their keys without it."""
    start = prefix if prefix.endswith(".") else f"{prefix}."
    return {k.removeprefix(start): v for k, v in dictionary.items() if k.startswith(start)}
