"""Chunks of runs are made: by the wave, in the order that was chosen, or by hooked forwards."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlens.errors import SweepError
from fastlens.memory import said_bytes
from fastlens.patching.evaluate import Evaluator, Values
from fastlens.patching.hooked import STACK_BYTES, HookedRuns, places_of
from fastlens.patching.plan import Chunk
from fastlens.patching.query import SweepPlan
from fastlens.patching.runs import Run
from fastlens.patching.spill import InMemory, OnDisk, Waiting
from fastlens.patching.strategy import ALONE
from fastlens.patching.traffic import IN_MEMORY, ON_DISK
from fastlens.patching.uses import ChunkUse, uses_of
from fastlens.patching.wave import ChunkState, Final, Wave

# Number of a chunk, its values by metric, and which of its runs must be made again.
Made = tuple[int, list[Values], list[int]]


class WaveRuns:
    """Chunks made by the wave; the base runs' stream is kept from one to the next.

    Args:
        query: What is made.
        folder: Where rows wait that go to a disk; None is the system's folder for such files.
    """

    def __init__(self, query: SweepPlan, folder: Path | None = None):
        self.query = query
        self.folder = folder
        plan = query.plan
        self.wave = Wave(
            *(query.model, plan.frame, query.stem, query.sources, query.prompts.n_pos),
            codes=query.codes,
            blocks=plan.blocks,
        )
        is_noising = query.direction == "noising"
        self.evaluator = Evaluator(
            *(query.model, query.readings, query.wants, query.prompts.n_pos),
            clean_branch=0 if is_noising else plan.frame.batch,
            logit_bytes=plan.blocks.logits,
        )
        # Rows that a chunk may have since one of more did not fit on the device.
        self._most_rows: int | None = None

    def __call__(self, group: Sequence[tuple[int, Chunk]], bar: Any = None) -> Iterator[Made]:
        """Each chunk of a group, in order; of several none before all are through the layers."""
        made: dict[int, tuple[list[Values], list[int]] | None] = {}
        small = [(at, chunk) for at, chunk in group if not self._is_large(chunk)]
        if len(small) > 1:
            made = self._together(small, bar)
        for at, chunk in group:
            found = made.pop(at) if at in made else None
            if found is None:
                # Alone, or what did not fit on the device in its group.
                found = self._alone(chunk, failed=(len(small) > 1 and (at, chunk) in small))
            yield at, *found

    # -- one chunk ---------------------------------------------------------------------------

    def _alone(self, chunk: Chunk, failed: bool = False) -> tuple[list[Values], list[int]]:
        """One chunk; where the device has too little memory, its halves."""
        if not failed and not self._is_large(chunk):
            use = uses_of(self.query.plan, chunk)
            try:
                return self._values(self.wave.run(use, chunk.first_layer), use, chunk)
            except torch.OutOfMemoryError as error:
                said = str(error)
            # Behind the handler: the error keeps every tensor of the chunk alive.
            self._note(chunk, said)
        middle = len(chunk.runs) // 2
        parts = [
            self._alone(self.query.plan.part(runs))
            for runs in (chunk.runs[:middle], chunk.runs[middle:])
        ]
        (first, redo), (second, more) = parts
        values = [
            Values(a.stems, torch.cat([a.runs, b.runs])) for a, b in zip(first, second, strict=True)
        ]
        return values, redo + [middle + i for i in more if i >= 0] + [i for i in more if i < 0]

    def _values(self, final: Final, use: ChunkUse, chunk: Chunk) -> tuple[list[Values], list[int]]:
        query = self.query
        names = [query.grid.name(query.runs[number]) for number in chunk.runs]
        return self.evaluator.values(final, use, names)

    def _is_large(self, chunk: Chunk) -> bool:
        is_large = self._most_rows is not None and chunk.rows > self._most_rows
        return is_large and len(chunk.runs) > 1

    def _note(self, chunk: Chunk, said: str) -> None:
        """A chunk did not fit on the device.

        Raises: SweepError if it cannot be made smaller.
        """
        self.wave.forget_stems()
        _free_device()
        if len(chunk.runs) < 2:
            held = said_bytes(self.query.plan.fixed_bytes + chunk.held)
            raise SweepError(
                f"the device is out of memory even with a single run under way (predicted {held}): "
                f"{said} Free memory on the device, take shorter or fewer prompts at a time, a "
                f"model in a smaller dtype, or device='cpu'."
            )
        before, self._most_rows = self._most_rows, chunk.rows // 2
        if before is None:
            warnings.warn(
                f"the device ran out of memory with {len(chunk.runs):,} runs under way, so the "
                f"sweep goes on with half as many at a time. Give memory= below "
                f"{said_bytes(self.query.plan.fixed_bytes + chunk.held)} to begin with fewer. "
                f"({said})",
                stacklevel=2,
            )

    # -- several, layer by layer -------------------------------------------------------------

    def _together(
        self, group: Sequence[tuple[int, Chunk]], bar: Any
    ) -> dict[int, tuple[list[Values], list[int]] | None]:
        """Chunks that share each layer's weights; None for one that did not fit on the device."""
        wave, n_layers = self.wave, self.query.plan.frame.n_layers
        chunks = dict(group)
        found: dict[int, tuple[list[Values], list[int]] | None] = {}

        def attempt(at: int, what: Any, *args: Any) -> None:
            try:
                what(at, *args)
                return
            except torch.OutOfMemoryError as error:
                said = str(error)
            found[at] = None
            waiting.drop(at)
            self._note(chunks[at], said)

        with self._waiting(list(chunks.values())) as waiting:
            for at, chunk in group:
                waiting.put_use(at, uses_of(self.query.plan, chunk))

            def advance(at: int, layer: int) -> None:
                use = waiting.use(at)
                if chunks[at].first_layer == layer:
                    state = wave.begun(use, layer)
                else:
                    state = ChunkState.unpacked(wave, use, layer, waiting.take(at))
                state.advance(wave.model.blocks[layer])
                waiting.put(at, state.packed())

            def finish(at: int) -> None:
                use = waiting.use(at)
                final = ChunkState.unpacked(wave, use, n_layers, waiting.take(at)).final()
                found[at] = self._values(final, use, chunks[at])
                waiting.drop(at)

            for layer in range(min(chunk.first_layer for _, chunk in group), n_layers):
                for at, chunk in group:
                    if at not in found and chunk.first_layer <= layer:
                        attempt(at, advance, layer)
                if any(at not in found and chunk.first_layer > layer for at, chunk in group):
                    # While the layer's weights are here.
                    wave.stems_at(layer + 1)
                if bar is not None:
                    bar.set_postfix_str(f"layer {layer + 1} of {n_layers}")
            # Behind the last layer, so that its weights and the unembedding take no turns.
            for at, _ in group:
                if at not in found:
                    attempt(at, finish)
        return found

    @contextlib.contextmanager
    def _waiting(self, chunks: Sequence[Chunk]) -> Iterator[Waiting]:
        plan, where = self.query.plan, self.query.passes.where
        waiting: Waiting
        if where == ON_DISK:
            waiting = OnDisk(self.folder, sum(plan.waiting(chunk) for chunk in chunks))
        else:
            waiting = InMemory(None if where == IN_MEMORY else torch.device("cpu"))
        with contextlib.closing(waiting):
            yield waiting


class Forwards:
    """Chunks made by hooked forwards, one for each run or several stacked in the batch."""

    def __init__(self, query: SweepPlan):
        self.query = query
        self.how = hooked_runs(query, query.runs)
        base_logits = query.model(query.base, **masked(query))
        named = [("the base run", base_logits)]
        if query.other is not None:
            named.append(("the other prompt's run", query.model(query.other, **masked(query))))
        clean_logits = named[-1 if query.direction == "denoising" else 0][1]
        self.itemsize = base_logits.element_size()
        self.readings = [reading.with_clean(clean_logits) for reading in query.readings]
        self.stems = [
            torch.stack([reading.of_logits(logits, name) for name, logits in named])
            for reading in self.readings
        ]
        self._most: int | None = None

    def __call__(self, group: Sequence[tuple[int, Chunk]], bar: Any = None) -> Iterator[Made]:
        """Each chunk of a group, in order."""
        for at, chunk in group:
            yield at, self._chunk(chunk), []

    def _chunk(self, chunk: Chunk) -> list[Values]:
        query = self.query
        runs = [query.runs[number] for number in chunk.runs]
        names = [query.grid.name(run) for run in runs]
        values: dict[int, list[Tensor]] = {}
        if query.strategy.name == ALONE:
            for i, run in enumerate(runs):
                values[i] = self._read(self.how.alone(run), names[i])
        else:
            self._stacked(runs, names, values)
        in_order = [values[i] for i in range(len(runs))]
        return [
            Values(stems, reading.stacked([stems[0], *(one[m] for one in in_order)])[1:])
            for m, (stems, reading) in enumerate(zip(self.stems, self.readings, strict=True))
        ]

    def _stacked(
        self, runs: Sequence[Run], names: Sequence[str], values: dict[int, list[Tensor]]
    ) -> None:
        """Runs in stacks, of half the size where the device has too little memory."""
        most = min(self.query.memory, STACK_BYTES)
        size = self._most or self.how.runs_per_stack(self.itemsize, most)
        while len(values) < len(runs):
            left = [i for i in range(len(runs)) if i not in values]
            try:
                for numbers, logits in self.how.stacked([runs[i] for i in left], size):
                    for i, one in zip(numbers, logits, strict=True):
                        values[left[i]] = self._read(one, names[left[i]])
                return
            except torch.OutOfMemoryError as error:
                if size < 2:
                    raise
                said = str(error)
            _free_device()
            if self._most is None:
                warnings.warn(
                    f"the device ran out of memory with {size} runs stacked in a forward, so the "
                    f"sweep goes on with half as many. ({said})",
                    stacklevel=2,
                )
            size = self._most = size // 2

    def _read(self, logits: Tensor, name: str) -> list[Tensor]:
        return [reading.of_logits(logits, name) for reading in self.readings]


def _free_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def hooked_runs(query: SweepPlan, runs: Sequence[Run]) -> HookedRuns:
    """What hooked runs are made from: the other prompt's activations, run no further than needed.

    Raises: SweepError if nothing passes a place that is patched.
    """
    model = query.model
    names = places_of(runs, query.sources)
    other: dict[str, Tensor] = {}
    if names:
        assert query.other is not None
        last = max(patch.layer for run in runs for patch in run.patches)
        _, cache = model.run_with_cache(
            query.other, names_filter=names, stop_at_layer=last + 1, **masked(query)
        )
        other = {name: cache[name] for name in names if name in set(cache.keys())}
    for name in names:
        if name not in other:
            raise SweepError(
                f"nothing passes the hook point {name!r} in this model, so nothing can be patched "
                f"there. A config flag may switch it off."
            )
    return HookedRuns(model, query.base, query.prompts.mask, query.sources, other, query.codes)


def masked(query: SweepPlan) -> dict[str, Tensor]:
    """The attention mask as models take it, if there is one."""
    return {} if query.prompts.mask is None else {"attention_mask": query.prompts.mask}
