"""`ActivationLoader`: shuffled batches of a dataset of activations, as SAE training wants them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.errors import ShapeError
from fastlens.ops.outlier_rows import Int8OutlierRows
from fastlens.store.folder import PART, Store

# Rows read from disk together: their order within an epoch's is random, the order inside is not
# until the buffer mixes it.
PIECE = 256


@dataclass(frozen=True)
class Piece:
    """Neighbouring rows of one shard; of these, how many are kept."""

    shard: int
    start: int
    stop: int
    kept: int


class ActivationLoader:
    """An endless iterator of ``[batch, d]`` activations in random order.

    >>> batches = ActivationLoader(Store.open("acts"), "blocks.8.hook_resid_post", 4096)
    >>> SAETrainer(sae=sae, data_provider=batches, ...)

    It is SAELens' ``DataProvider``, an iterator of tensors. An epoch yields every row once, in an
    order that follows from seed and epoch: pieces of 256 neighbouring rows are shuffled over the
    whole dataset, and rows are shuffled within a buffer. Rows are ``(row, position)`` of the text;
    there is no padding among them, and axes behind (heads) are flattened into ``d``.

    Args:
        store: Of `capture_text`.
        name: Hook name of the entry.
        batch_size: Rows in a batch.
        seed: Of the order.
        buffer: Rows in memory, rounded up to whole batches; the more, the better mixed.
        epochs: StopIteration after so many; None goes on for ever, as SAELens' trainer expects.
        drop_last: Leave out what is short of a batch at an epoch's end, other rows in each epoch;
            False yields it as a shorter batch.
        exclude_tokens: Rows of these tokens (BOS, for one) are never yielded.
        dtype, device: Of batches.

    Cost: each row is read once in an epoch, 256 neighbours together; memory is the buffer.
    Raises: SourceError if the store has no such entry or a shard cannot be read; ShapeError if rows
        are not all of one width (patterns), or if there are fewer than a batch.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        batch_size: int,
        *,
        seed: int = 0,
        buffer: int = 2**16,
        epochs: int | None = None,
        drop_last: bool = True,
        exclude_tokens: Iterable[int] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if batch_size < 1 or buffer < 1:
            raise ShapeError(f"batch_size={batch_size}, buffer={buffer}: at least one row each.")
        self.store, self.name, self.batch_size = store, name, batch_size
        self.seed, self.epochs, self.drop_last = seed, epochs, drop_last
        self.dtype, self.device = dtype, device
        self._window = -(-buffer // batch_size) * batch_size
        self._excluded = torch.tensor(sorted(set(exclude_tokens)), dtype=torch.int32)
        self._pieces = self._cut()
        self.n_rows = sum(piece.kept for piece in self._pieces)
        if len(self) == 0:
            raise ShapeError(f"{self.n_rows} rows of {name!r} make no batch of {batch_size}.")
        self.epoch = 0
        self.batch = 0
        self._held: tuple[tuple[int, int], Tensor] | None = None
        self._order: tuple[int, list[Piece]] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return (
            self.n_rows // self.batch_size if self.drop_last else -(-self.n_rows // self.batch_size)
        )

    def __iter__(self) -> Iterator[Float[Tensor, "batch d"]]:
        return self

    def __next__(self) -> Float[Tensor, "batch d"]:
        if self.batch == len(self):
            self.epoch, self.batch = self.epoch + 1, 0
        if self.epochs is not None and self.epoch >= self.epochs:
            raise StopIteration
        at = self.batch * self.batch_size
        number, start = divmod(at, self._window)
        rows = self._rows_of_window(number)[start : start + self.batch_size]
        self.batch += 1
        # A copy: the buffer's rows are not the caller's to write into.
        return rows.to(self.device, self.dtype, copy=True)

    def state_dict(self) -> dict[str, Any]:
        """The position, small enough for a checkpoint."""
        return {"epoch": self.epoch, "batch": self.batch, **self._about()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position: the next batch is the one that was next then.

        Raises: ShapeError if the state is of a loader with another order, saying what differs.
        """
        for name, here in self._about().items():
            if state.get(name) != here:
                raise ShapeError(
                    f"the position is of a loader with {name}={state.get(name)!r}; this one has "
                    f"{here!r}. Make the loader with the same arguments."
                )
        self.epoch, self.batch = state["epoch"], state["batch"]

    def _about(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "buffer": self._window,
            "n_rows": self.n_rows,
            "drop_last": self.drop_last,
        }

    def _cut(self) -> list[Piece]:
        pieces, widths = [], set()
        for number in self.store.where(self.name):
            shape = self._shape(number)
            if len(shape) < 3:
                raise ShapeError(f"{self.name!r} has shape {list(shape)}: no (row, pos, d).")
            widths.add(shape[2:])
            n = shape[0] * shape[1]
            keep = self._keep(number, 0, n)
            for start in range(0, n, PIECE):
                stop = min(start + PIECE, n)
                kept = stop - start if keep is None else int(keep[start:stop].sum())
                pieces.append(Piece(number, start, stop, kept))
        if len(widths) > 1:
            raise ShapeError(
                f"rows of {self.name!r} differ in width from shard to shard: {sorted(widths)}."
            )
        return pieces

    def _shape(self, number: int) -> tuple[int, ...]:
        places = self.store.shards[number].places
        return (places.get(self.name) or places[f"{self.name}{PART}values"]).shape

    def _keep(self, number: int, start: int, stop: int) -> Tensor | None:
        """Which rows are not of an excluded token."""
        if not len(self._excluded):
            return None
        tokens = self._part(number, "tokens", start, stop)
        return ~torch.isin(tokens, self._excluded)

    def _part(self, number: int, tensor: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor of a shard, with rows and positions as one axis."""
        shard = self.store.sound(number)
        rows, pos, *rest = shard.places[tensor].shape
        return shard.read(tensor, [slice(start, stop)], shape=(rows * pos, *rest))

    def _read(self, piece: Piece) -> Tensor:
        number, start, stop = piece.shard, piece.start, piece.stop
        if self.name in self.store.shards[number].places:
            rows = self._part(number, self.name, start, stop)
        else:
            parts = [f"{self.name}{PART}{field}" for field in Int8OutlierRows._fields]
            rows = Int8OutlierRows(*(self._part(number, p, start, stop) for p in parts)).read()
        keep = self._keep(number, start, stop)
        return (rows if keep is None else rows[keep]).flatten(1)

    def _generator(self, *what: int) -> torch.Generator:
        seed = 0
        for number in (self.seed, *what):
            # Any mixing will do that keeps neighbouring seeds apart.
            seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
        return torch.Generator().manual_seed(seed)

    def _epoch_order(self) -> list[Piece]:
        if self._order is None or self._order[0] != self.epoch:
            order = torch.randperm(len(self._pieces), generator=self._generator(self.epoch))
            self._order = self.epoch, [self._pieces[i] for i in order.tolist()]
        return self._order[1]

    def _rows_of_window(self, number: int) -> Tensor:
        which = (self.epoch, number)
        if self._held is None or self._held[0] != which:
            # Let the old buffer go first.
            self._held = None
            first, last = number * self._window, (number + 1) * self._window
            found, at = [], 0
            for piece in self._epoch_order():
                if at < last and at + piece.kept > first:
                    found.append(self._read(piece)[max(0, first - at) : last - at])
                at += piece.kept
            rows = torch.cat(found)
            order = torch.randperm(len(rows), generator=self._generator(self.epoch, number, 1))
            self._held = which, rows[order]
        return self._held[1]
