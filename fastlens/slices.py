"""`Slice`: one way to say "these positions", which can also drop the axis.

Lives below hooks and cache, which both slice with it. Imports nothing of the library but errors.
"""

import builtins
from typing import Any, SupportsIndex, TypeAlias, Union

import numpy as np
from torch import Tensor

from fastlens.errors import ShapeError

SliceInput: TypeAlias = (
    SupportsIndex
    | tuple[SupportsIndex | None, ...]
    | list[SupportsIndex]
    | slice
    | np.ndarray
    | Tensor
    | None
)


class Slice:
    """A choice along one axis of a tensor.

    >>> tokens = torch.arange(6)
    >>> Slice(2).apply(tokens), Slice((1, 4)).apply(tokens), Slice([0, -1]).apply(tokens)
    (tensor(2), tensor([1, 2, 3]), tensor([0, 5]))

    * ``None``: everything (mode ``"identity"``).
    * an int: that entry, and the axis goes (mode ``"int"``). A 0-d tensor or array counts as one.
    * a tuple: ``(stop,)``, ``(start, stop)`` or ``(start, stop, step)``, as Python's ``slice``
      (mode ``"slice"``); a ``slice`` itself is taken too.
    * a list, array or tensor of indices, or a boolean mask: those entries, in that order
      (mode ``"array"``).

    Raises: ShapeError for anything else.
    """

    slice: int | builtins.slice | np.ndarray
    mode: str

    def __init__(self, input_slice: SliceInput = None):
        if input_slice is None:
            self.slice, self.mode = builtins.slice(None), "identity"
        elif isinstance(input_slice, tuple) and 1 <= len(input_slice) <= 3:
            self.slice, self.mode = builtins.slice(*input_slice), "slice"
        elif isinstance(input_slice, builtins.slice):
            self.slice, self.mode = input_slice, "slice"
        elif isinstance(input_slice, list | np.ndarray | Tensor):
            self._choose_indices(input_slice)
        elif isinstance(input_slice, SupportsIndex) and not isinstance(input_slice, bool):
            self.slice, self.mode = input_slice.__index__(), "int"
        else:
            raise _invalid(input_slice)

    def _choose_indices(self, chosen: Any) -> None:
        array = np.asarray(chosen.tolist() if isinstance(chosen, Tensor) else chosen)
        if array.size == 0:
            array = array.astype(np.int64)
        if not np.issubdtype(array.dtype, np.integer) and not (array.dtype == bool and array.ndim):
            raise _invalid(chosen)
        if array.ndim == 0:
            self.slice, self.mode = int(array), "int"
        else:
            self.slice, self.mode = array, "array"

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The chosen entries along ``dim``, which may count from the end.

        A view for modes ``"int"``, ``"slice"`` and ``"identity"``: whoever keeps the result copies
        it, or the whole tensor stays alive. Mode ``"array"`` copies. A negative step, which torch
        refuses, is taken by indices and copies.
        """
        chosen = self.slice
        if isinstance(chosen, builtins.slice) and chosen.step is not None and chosen.step < 0:
            chosen = self.indices(tensor.shape[dim]).copy()
        index: list[Any] = [builtins.slice(None)] * tensor.ndim
        index[dim] = chosen
        return tensor[tuple(index)]

    def indices(self, max_ctx: int | None = None) -> np.ndarray:
        """The chosen indices of an axis of length ``max_ctx``; an int gives an array of one.

        Raises: ShapeError without ``max_ctx``, unless the choice is an int.
        """
        if self.mode == "int":
            return np.array([self.slice], dtype=np.int64)
        if max_ctx is None:
            raise ShapeError(
                f"the indices of {self} depend on the length of the axis. Give max_ctx."
            )
        return np.arange(max_ctx, dtype=np.int64)[self.slice]

    @classmethod
    def unwrap(cls, slice_input: Union["Slice", SliceInput]) -> "Slice":
        """A Slice as it is; anything else as a Slice that keeps the axis: an int becomes a list."""
        if isinstance(slice_input, Slice):
            return slice_input
        made = cls(slice_input)
        return cls([made.slice]) if isinstance(made.slice, int) else made

    def __repr__(self) -> str:
        return f"Slice: {self.slice} Mode: {self.mode} "


def whole_numbers(chosen: Any, name: str) -> list[int]:
    """Indices as ints: of a list, range, array or tensor of integers.

    Raises: ShapeError for anything else. Booleans are not read as 0 and 1, nor numbers cut off.
    """
    found: list[Any] = [None]
    if isinstance(chosen, np.ndarray | Tensor):
        found = chosen.tolist() if chosen.ndim == 1 else found
    elif isinstance(chosen, list | tuple | range):
        found = list(chosen)
    if any(isinstance(i, bool | np.bool_) or not isinstance(i, SupportsIndex) for i in found):
        raise ShapeError(
            f"{name}={chosen!r} ({type(chosen).__name__}): give a list of whole numbers, such as "
            f"[3] or [0, 5]."
        )
    return [int(i) for i in found]


def _invalid(input_slice: Any) -> ShapeError:
    return ShapeError(
        f"cannot slice with {input_slice!r} ({type(input_slice).__name__}). Give None, an int, a "
        "tuple (stop,), (start, stop) or (start, stop, step), or a list, array or tensor of "
        "integers or booleans."
    )
