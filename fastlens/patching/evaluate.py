"""From the last rows of a wave to the metrics of its runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.rows import logits_of, normalized
from fastlens.errors import MetricError
from fastlens.patching.lazy_logits import LazyLogits, LogitSource, Reads, plain, reads_of
from fastlens.patching.metrics import Metric, Reading
from fastlens.patching.uses import ChunkUse
from fastlens.patching.wave import Final

# Logits that are held at once, bytes.
LOGIT_BYTES = 64 * 2**20


# In a list of runs: the base run, or the other prompt's.
BASE_RUN = -1


class RowDroppedError(Exception):
    """A metric asked for logits of a row that was not kept: its reads were predicted wrongly."""


@dataclass(frozen=True)
class Wants:
    """What a metric is expected to read.

    Attributes:
        positions: Positions of any example; None is all.
        columns: Token ids, rising; None is the whole vocabulary.
    """

    positions: tuple[int, ...] | None
    columns: Int[Tensor, " column"] | None


def wants_of(
    reading: Reading, n_pos: int, d_vocab: int, dtype: torch.dtype, device: torch.device
) -> Wants:
    """What a metric will read, found without running the model.

    Raises: MetricError if the metric returns neither a scalar nor ``[batch]``.
    """
    metric = reading.metric
    if isinstance(metric, Metric):
        assert reading.positions is not None
        columns = None
        if metric.is_of_answers:
            columns = torch.cat([torch.as_tensor(answer) for answer in metric.answers]).unique()
        return Wants(tuple(sorted(set(reading.positions))), columns)
    reads, value = reads_of(metric, reading.batch, n_pos, d_vocab, dtype, device)
    if not isinstance(reads, Reads):
        if isinstance(value, MetricError):
            raise value
        return Wants(None, None)
    reading.check_shape(value, "zero logits, before anything was run")
    if not len(reads.rows):
        # It looked at nothing, which no metric does on real logits.
        return Wants(None, None)
    return Wants(tuple((reads.rows % n_pos).unique().tolist()), reads.columns)


@dataclass
class Evaluator:
    """Reads the metrics of a chunk's runs.

    Attributes:
        model: Its final norm and unembedding are used.
        readings: The metrics.
        wants: What each is expected to read.
        n_pos: Positions of the prompts.
        clean_branch: The first branch of the clean runs: 0 where they are the base.
        logit_bytes: Logits that are held at once, and what the metrics make of them.
    """

    model: Any
    readings: Sequence[Reading]
    wants: Sequence[Wants]
    n_pos: int
    clean_branch: int
    logit_bytes: int = LOGIT_BYTES

    @property
    def _most(self) -> int:
        return min(LOGIT_BYTES, self.logit_bytes)

    def values(
        self, final: Final, use: ChunkUse, names: Sequence[str]
    ) -> tuple[list["Values"], list[int]]:
        """Of each metric, the values of base run, other prompt and the chunk's runs.

        Args:
            names: What to call the runs in messages.

        Returns: the values, and which runs must be made again with every row kept; `BASE_RUN` among
            them if the base run or the other prompt's must.
        """
        x = final.x
        if self.model.cfg.normalization_type is not None:
            x = normalized(self.model.ln_final, x)
        batch = use.branch_of.shape[1]
        branch_of = torch.from_numpy(use.branch_of)
        branches = torch.where(branch_of >= 0, branch_of + final.n_stems, torch.arange(batch))
        stems = torch.arange(final.n_stems).view(-1, batch)
        every = torch.cat([stems, branches])
        labels = ["the base run", "the other prompt's run"][: len(stems)] + list(names)
        again: set[int] = set()
        found = []
        for reading, wants in zip(self.readings, self.wants, strict=True):
            if isinstance(reading.metric, Metric):
                values = self._at_once(x, final.table, every, reading, wants)
                reading.refuse_nan(values, labels)
            else:
                one_by_one = self._one_by_one(x, final.table, every, reading, wants, labels)
                dropped = {i - len(stems) for i, value in enumerate(one_by_one) if value is None}
                again |= {max(i, BASE_RUN) for i in dropped}
                known = next((value for value in one_by_one if value is not None), None)
                if known is None:
                    known = torch.full((), torch.nan)
                gap = torch.full_like(known, torch.nan)
                filled = [gap if value is None else value for value in one_by_one]
                values = reading.stacked(filled)
            found.append(Values(values[: len(stems)], values[len(stems) :]))
        return found, sorted(again)

    def _at_once(
        self, x: Tensor, table: Tensor, every: Tensor, reading: Reading, wants: Wants
    ) -> Float[Tensor, "run batch"]:
        """A `Metric` of all runs: one product for all their rows."""
        metric, device = reading.metric, x.device
        assert isinstance(metric, Metric) and reading.positions is not None
        batch = every.shape[1]
        positions = torch.tensor(reading.positions, device=device)
        examples = torch.arange(batch, device=device)
        rows = table[every.to(device), positions]  # [run, example]
        # Runs without rows of their own share the base run's: computed once.
        distinct, back = rows.flatten().unique(return_inverse=True)
        example = torch.empty_like(distinct)
        example[back] = examples.expand(rows.shape).flatten()
        if metric.needs_clean:
            clean = torch.arange(batch, device=device) + self.clean_branch
            clean_rows = x[table[clean, positions]]
            metric = metric.with_clean_rows(logits_of(self.model.unembed, clean_rows, None))
        columns = None if wants.columns is None else wants.columns.to(device)
        width = self.model.cfg.d_vocab_out if columns is None else len(columns)
        size = max(1, self._most // (4 * width * max(4, x.element_size())))
        values = []
        for part, whose in zip(distinct.split(size), example.split(size), strict=True):
            logits = logits_of(self.model.unembed, x[part], columns)
            values.append(metric.of_many(logits, whose, columns))
        return torch.cat(values)[back].view(rows.shape).cpu()

    def _one_by_one(
        self,
        x: Tensor,
        table: Tensor,
        every: Tensor,
        reading: Reading,
        wants: Wants,
        labels: Sequence[str],
    ) -> list[Tensor | None]:
        """A function of the logits, called once a run; None where a row it needs was dropped."""
        d_vocab = self.model.cfg.d_vocab_out
        width = d_vocab if wants.columns is None else len(wants.columns)
        batch = every.shape[1]
        needed = self.n_pos if wants.positions is None else len(wants.positions)
        size = max(1, self._most // (width * x.element_size() * batch * needed))
        values: list[Tensor | None] = []
        table = table.cpu()
        for start in range(0, len(every), size):
            source = _RunLogits(self.model.unembed, x, table, wants, self.n_pos)
            part = every[start : start + size]
            source.prepare(part)
            for branches, label in zip(part, labels[start : start + size], strict=True):
                source.branches = branches
                logits = LazyLogits(source, batch, self.n_pos, d_vocab)
                try:
                    values.append(reading.checked(plain(reading.metric(logits)), label))
                except RowDroppedError:
                    values.append(None)
        return values


@dataclass
class Values:
    """One metric's values: of base run and other prompt ``[stem]`` or ``[stem, batch]``, and of
    the runs ``[run]`` or ``[run, batch]``."""

    stems: Tensor
    runs: Tensor


class _RunLogits(LogitSource):
    """Logits of one run after the other, what is expected to be read computed for many at once."""

    def __init__(self, unembed: Any, x: Tensor, table: Tensor, wants: Wants, n_pos: int):
        self.dtype, self.device = x.dtype, x.device
        self.unembed = unembed
        self.x = x
        self.table = table
        self.wants = wants
        self.n_pos = n_pos
        self.branches = torch.empty(0, dtype=torch.long)

    def prepare(self, every: Int[Tensor, "run batch"]) -> None:
        """Compute what runs of these branches are expected to be asked for."""
        rows = self.table[every]
        if self.wants.positions is not None:
            rows = rows[..., list(self.wants.positions)]
        self.ready = rows[rows >= 0].unique()
        self.place = torch.full((len(self.x),), -1, dtype=torch.long)
        self.place[self.ready] = torch.arange(len(self.ready))
        self.logits = logits_of(
            self.unembed, self.x[self.ready.to(self.device)], self.wants.columns
        )

    def block(
        self, rows: Int[Tensor, " row"], columns: Int[Tensor, " column"] | None
    ) -> Float[Tensor, "row column"]:
        """Logits of the present run; see `LogitSource`."""
        pos = rows % self.n_pos
        if bool((pos >= self.table.shape[1]).any()):
            raise RowDroppedError
        packed = self.table[self.branches[rows // self.n_pos], pos]
        if bool((packed < 0).any()):
            raise RowDroppedError
        place = self.place[packed]
        wanted = self._columns(columns)
        if bool((place < 0).any()) or wanted is None:
            return logits_of(self.unembed, self.x[packed.to(self.device)], columns)
        place = place.to(self.device)
        return self.logits[place] if columns is None else self.logits[place[:, None], wanted]

    def _columns(self, columns: Tensor | None) -> Tensor | None:
        """Where the columns stand among those computed; None if some are not."""
        ready = self.wants.columns
        if columns is None:
            return None if ready is not None else torch.empty(0)
        if ready is None:
            return columns.to(self.device)
        place = torch.searchsorted(ready, columns).clamp(max=len(ready) - 1)
        found = bool((ready[place] == columns).all())
        return place.to(self.device) if found else None


def merged(wants: Sequence[Wants], n_pos: int, d_vocab: int) -> tuple[tuple[int, ...], int]:
    """Positions that any metric reads, and how many columns at most."""
    if any(want.positions is None for want in wants):
        positions = tuple(range(n_pos))
    else:
        positions = tuple(sorted({p for want in wants for p in want.positions or ()}))
    columns = max(d_vocab if w.columns is None else len(w.columns) for w in wants)
    return positions, columns


def keeping_all(wants: Sequence[Wants]) -> list[Wants]:
    """The same, with no position left out."""
    return [replace(want, positions=None) for want in wants]
