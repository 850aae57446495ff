"""Where new values come from: the other prompt, another example, a mean, a number, a tensor."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.patching.sites import SITES
from fastlens.patching.uses import Entries

# Axes that come last where they come: nothing but an index of numbers.
WITHOUT_WIDTH = ("neuron", "feature", "key_pos")


@runtime_checkable
class Activations(Protocol):
    """Whole activations by hook name: a dict, an `ActivationCache`, TransformerLens' own."""

    def __getitem__(self, key: str, /) -> Any:
        """The activation of one hook."""
        ...

    def __contains__(self, key: object, /) -> bool:
        """Whether there is one."""
        ...

    def __iter__(self) -> Iterator[str]:
        """Names of hooks."""
        ...

    def keys(self) -> Any:
        """Names of hooks."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """One source of new values.

    Attributes:
        kind: ``"other"`` (the other prompt, same example, same place), ``"resample"`` (the other
            prompt of another example), ``"mean"`` (over the examples of the other prompt),
            ``"number"``, ``"tensor"`` (broadcast over what a patch covers), or ``"cache"``
            (whole activations by hook name).
        name: What to call it.
        number, tensor, cache: The value, of those three kinds.
        permutation: For ``"resample"``: whose other prompt each example takes.
    """

    kind: str
    name: str
    number: float = 0.0
    tensor: Tensor | None = None
    cache: Activations | None = None
    permutation: Int[Tensor, " batch"] | None = None

    @property
    def reads_other(self) -> bool:
        """Whether the other prompt must have been run."""
        return self.kind in ("other", "resample", "mean")

    def of_examples(
        self,
        read: Callable[[Int[Tensor, " entry"]], Tensor],
        example: Int[Tensor, " entry"],
        n: int,
    ) -> Float[Tensor, "entry ..."]:
        """The value where it comes from the other prompt.

        Args:
            read: The other prompts' values at the entries, given each entry's example.
            example: Of each entry.
            n: Examples.
        """
        if self.kind == "other":
            return read(example)
        if self.kind == "resample":
            assert self.permutation is not None
            return read(self.permutation.to(example.device)[example])
        total = read(torch.zeros_like(example))
        for one in range(1, n):
            total = total + read(torch.full_like(example, one))
        return total / n

    def of_entries(
        self,
        site: str,
        layer: int,
        entries: Entries,
        example: Int[Tensor, " entry"],
        sizes: Mapping[str, int],
        like: Tensor,
        axes: tuple[str, ...] | None = None,
    ) -> Any:
        """The value where it is a number, a tensor or a cache: a number, or one row an entry.

        Args:
            example: Of each entry.
            sizes: Length of every axis of the site, and ``"width"``.
            like: A tensor of the dtype and device wanted.
            axes: Of what is patched, where they are not the site's own.
        """
        if self.kind == "number":
            return self.number
        axes = axes or SITES[site].axes
        if self.kind == "tensor":
            assert self.tensor is not None
            n_pos, n_columns, n_keys = entries.selected
            chosen = {"pos": n_pos, "query_pos": n_pos, "key_pos": n_keys}
            chosen |= dict.fromkeys(("head", "neuron", "feature"), n_columns)
            shape = [chosen[axis] or sizes[axis] for axis in axes]
            if axes[-1] not in WITHOUT_WIDTH:
                shape.append(sizes["width"])
            region = self.tensor.to(like).expand(sizes["batch"], *shape)
            pos, column = entries.pos_rank, entries.column_rank
        else:
            assert self.cache is not None
            region = self.cache[SITES[site].hook_name(layer)].to(like)
            pos, column = entries.pos, entries.column
        at = torch.from_numpy(pos).to(region.device)
        if column is None:
            return region[example.to(region.device), at]
        columns = torch.from_numpy(column).to(region.device)
        if axes[0] == "head":
            return region[example, columns, at]
        return region[example, at, columns]


def applied(old: Tensor, new: Any, mode: str) -> Any:
    """The value after a patch."""
    if mode == "add":
        return old + new
    return old * new if mode == "scale" else new
