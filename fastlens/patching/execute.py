"""Runs a planned sweep, checks some of its runs another way, and hands back the scores."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from fastlens.errors import MetricError, SweepError
from fastlens.patching.evaluate import Evaluator, Values
from fastlens.patching.folder import SweepFolder
from fastlens.patching.hooked import HookedRuns, places_of
from fastlens.patching.metrics import Reading
from fastlens.patching.model import PatchableModel, walk
from fastlens.patching.plan import Chunk
from fastlens.patching.query import SweepPlan
from fastlens.patching.record import key_of, layout_of, plan_from_layout
from fastlens.patching.result import Outcome, refuse_if_wrong, scores_of, tolerance_of
from fastlens.patching.runs import Run
from fastlens.patching.strategy import ALONE, STACKED
from fastlens.patching.uses import uses_of
from fastlens.patching.wave import Wave
from fastlens.scores import Scores

Verify: TypeAlias = int | bool | Literal["all"] | None
# Part of the predicted work that checking may cost unless told.
VERIFY_SHARE = 0.05
VERIFY_SEED = 0


def execute(
    plan: SweepPlan,
    *,
    verify: Verify = None,
    progress: bool = True,
    out: str | Path | None = None,
) -> Scores:
    """Run a plan made by `plan`; see `sweep` for the arguments, result and errors."""
    _check_verify(verify)
    folder = None
    if out is not None:
        folder = SweepFolder.open(out, key_of(plan), layout_of(plan))
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(folder)
            plan = plan_from_layout(plan, folder.layout)
        stack.enter_context(_quiet(plan.model, plan.gradients))
        outcome = _Execution(plan, folder, progress).run()
        outcome.certificate.update(_certificate(plan, outcome, verify))
        scores = scores_of(plan, outcome)
        if folder is not None:
            scores.save(folder.path)
    refuse_if_wrong(scores)
    return scores


@dataclass
class _Execution:
    """One execution of one plan."""

    query: SweepPlan
    folder: SweepFolder | None
    progress: bool
    values: list[list[Tensor | None]] = field(default_factory=list)
    stems: list[Tensor] = field(default_factory=list)

    def run(self) -> Outcome:
        query = self.query
        self.values = [[None] * len(query.runs) for _ in query.readings]
        n_computed = len(query.plan.order) if query.strategy.is_wave else len(query.runs)
        # Nothing is shown before two seconds have passed.
        with tqdm(
            total=n_computed,
            desc=f"{', '.join(query.grid.named)} {query.direction}",
            unit="run",
            delay=2,
            disable=not self.progress,
        ) as bar:
            if query.strategy.is_wave:
                self._by_wave(bar)
            else:
                self._by_hooks(bar)
        base = [one[0] for one in self.stems]
        for per_run, of_base in zip(self.values, base, strict=True):
            for number, value in enumerate(per_run):
                if value is not None:
                    continue
                first = query.plan.same_as[number]
                known = per_run[first] if first < number else None
                per_run[number] = of_base if known is None else known
        found = [[v for v in per_run if v is not None] for per_run in self.values]
        for reading, per_run, of_base in zip(query.readings, found, base, strict=True):
            if any(value.shape != of_base.shape for value in per_run):
                raise MetricError(
                    f"the metric {reading.name!r} returned a scalar for some runs and [batch] for "
                    f"others. It must return one of them."
                )
        other = [one[1] if len(one) > 1 else one[0] for one in self.stems]
        return Outcome(found, base, other, {})

    # -- the wave ----------------------------------------------------------------------------

    def _by_wave(self, bar: Any) -> None:
        query = self.query
        # Without any run to compute, base run and other prompt are still wanted.
        chunks = query.plan.chunks or [Chunk([], 0, 0)]
        finished = set() if self.folder is None else set(self.folder.finished())
        again: list[int] = []
        wave = self._wave(query, len(chunks) - len(finished) > 1)
        for number, chunk in enumerate(chunks):
            if number in finished:
                assert self.folder is not None
                found, redo = _unpacked(self.folder.read(number), len(query.readings))
            else:
                found, redo = _one_chunk(query, wave, chunk)
                if self.folder is not None:
                    self.folder.write(number, _packed(found, redo))
            if number == 0:
                self.stems = [values.stems for values in found]
            again += [chunk.runs[i] for i in redo]
            for per_run, values in zip(self.values, found, strict=True):
                for run, value in zip(chunk.runs, values.runs, strict=True):
                    per_run[run] = value
            bar.update(len(chunk.runs))
        if again or any(bool(stem.isnan().any()) for stem in self.stems):
            self._again(again)

    def _again(self, numbers: list[int]) -> None:
        """Runs whose metric read a row that was not kept, with every row kept."""
        full = self.query.keeping_all(numbers)
        wave = self._wave(full, len(full.plan.chunks) > 1)
        known: dict[int, int] = {}
        for number, chunk in enumerate(full.plan.chunks or [Chunk([], 0, 0)]):
            found, redo = _one_chunk(full, wave, chunk)
            assert not redo
            if number == 0:
                self.stems = [values.stems for values in found]
            for per_run, values in zip(self.values, found, strict=True):
                for run, value in zip(chunk.runs, values.runs, strict=True):
                    per_run[numbers[run]] = value
                    known[run] = numbers[run]
        for i, number in enumerate(numbers):
            if i not in known:
                for per_run, stems in zip(self.values, self.stems, strict=True):
                    per_run[number] = stems[0]

    @staticmethod
    def _wave(query: SweepPlan, keep_streams: bool) -> Wave:
        return Wave(
            *(query.model, query.plan.frame, query.stem, query.sources, query.prompts.n_pos),
            keep_streams=keep_streams,
        )

    # -- with hooks --------------------------------------------------------------------------

    def _by_hooks(self, bar: Any) -> None:
        query = self.query
        how = hooked_runs(query, query.runs)
        base_logits = query.model(query.base, **_masked(query))
        other_logits = base_logits
        if query.other is not None:
            other_logits = query.model(query.other, **_masked(query))
        is_denoising = query.direction == "denoising"
        clean_logits = other_logits if is_denoising else base_logits
        readings = [reading.with_clean(clean_logits) for reading in query.readings]
        self.stems = []
        for reading in readings:
            values = [reading.of_logits(base_logits, "the base run")]
            if query.other is not None:
                values.append(reading.of_logits(other_logits, "the other prompt's run"))
            self.stems.append(torch.stack(values))
        names = [query.grid.name(run) for run in query.runs]
        if query.strategy.name == ALONE:
            for number, run in enumerate(query.runs):
                self._read(readings, number, how.alone(run), names[number])
                bar.update(1)
            return
        size = how.runs_per_stack(base_logits.element_size())
        for numbers, logits in how.stacked(query.runs, size):
            for number, one in zip(numbers, logits, strict=True):
                self._read(readings, number, one, names[number])
            bar.update(len(numbers))

    def _read(self, readings: Sequence[Reading], number: int, logits: Tensor, name: str) -> None:
        for per_run, reading in zip(self.values, readings, strict=True):
            per_run[number] = reading.of_logits(logits, name)


def _one_chunk(query: SweepPlan, wave: Wave, chunk: Chunk) -> tuple[list[Values], list[int]]:
    use = uses_of(query.plan, chunk)
    final = wave.run(use, chunk.first_layer)
    is_noising = query.direction == "noising"
    evaluator = Evaluator(
        *(query.model, query.readings, query.wants, query.prompts.n_pos),
        clean_branch=0 if is_noising else query.plan.frame.batch,
    )
    names = [query.grid.name(query.runs[number]) for number in chunk.runs]
    return evaluator.values(final, use, names)


def _packed(found: list[Values], redo: list[int]) -> dict[str, Tensor]:
    packed = {"again": torch.tensor(redo, dtype=torch.long)}
    for i, values in enumerate(found):
        packed |= {f"stems.{i}": values.stems, f"runs.{i}": values.runs}
    return packed


def _unpacked(tensors: dict[str, Tensor], n: int) -> tuple[list[Values], list[int]]:
    found = [Values(tensors[f"stems.{i}"], tensors[f"runs.{i}"]) for i in range(n)]
    return found, tensors["again"].tolist()


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
            query.other, names_filter=names, stop_at_layer=last + 1, **_masked(query)
        )
        other = {name: cache[name] for name in names if name in set(cache.keys())}
    for name in names:
        if name not in other:
            raise SweepError(
                f"nothing passes the hook point {name!r} in this model, so nothing can be patched "
                f"there. A config flag may switch it off."
            )
    return HookedRuns(model, query.base, query.prompts.mask, query.sources, other)


def _clean_tokens(query: SweepPlan) -> Tensor:
    """Of the clean run; without another prompt the base is all there is."""
    is_other = query.direction == "denoising" and query.other is not None
    return query.other if is_other else query.base  # type: ignore[return-value]


def _masked(query: SweepPlan) -> dict[str, Tensor]:
    return {} if query.prompts.mask is None else {"attention_mask": query.prompts.mask}


# -- checking ------------------------------------------------------------------------------------


def _certificate(query: SweepPlan, outcome: Outcome, verify: Verify) -> dict[str, Any]:
    """Some runs made again one at a time with hooks, scores and patterns in full, and compared."""
    numbers = _runs_to_verify(query, outcome, verify)
    certificate: dict[str, Any] = {
        "method": "the same run alone, by run_with_hooks, patterns materialised",
        "runs": len(numbers),
        "checked": [query.grid.name(query.runs[i]) for i in numbers][:100],
        "tolerance": tolerance_of(query, outcome, 0),
    }
    if not numbers:
        return certificate
    how = hooked_runs(query, [query.runs[i] for i in numbers])
    readings = query.readings
    if any(reading.needs_clean for reading in readings):
        clean_logits = query.model(_clean_tokens(query), **_masked(query))
        readings = [reading.with_clean(clean_logits) for reading in readings]
    differences = [0.0] * len(readings)
    for number in numbers:
        logits = how.alone(query.runs[number], materialise=_is_small(query))
        for m, reading in enumerate(readings):
            again = reading.of_logits(logits, query.grid.name(query.runs[number]))
            difference = _difference(outcome.values[m][number], again)
            # Written so that NaN counts.
            differences[m] = difference if not difference <= differences[m] else differences[m]
    certificate["max_difference"] = differences[0]
    if len(readings) > 1:
        certificate["by_metric"] = [
            {"max_difference": difference, "tolerance": tolerance_of(query, outcome, m)}
            for m, difference in enumerate(differences)
        ]
        certificate |= max(
            certificate["by_metric"], key=lambda one: one["max_difference"] / one["tolerance"]
        )
    return certificate


def _is_small(query: SweepPlan) -> bool:
    """Whether one layer's patterns are small enough to be made in full."""
    cfg = query.model.cfg
    return query.prompts.batch * cfg.n_heads * query.prompts.n_pos**2 <= 2**24


def _runs_to_verify(query: SweepPlan, outcome: Outcome, verify: Verify) -> list[int]:
    """The run furthest from the base run, then others at random: a null run proves nothing."""
    n = len(query.runs)
    if query.strategy.name == ALONE:
        return []
    if verify is None:
        summary = query.summary()
        share = VERIFY_SHARE * summary.get("flops", 0) / max(1, query.plan.plain_flops())
        count = min(n, max(1, int(share)))
    else:
        count = n if verify == "all" or verify is True else min(int(verify), n)
    if query.strategy.name == STACKED:
        # A module that mixes the rows of a batch would make stacks wrong.
        count = max(1, count)
    if count == 0:
        return []
    base = outcome.base[0].double()
    strengths = [float((v.double() - base).abs().mean()) for v in outcome.values[0]]
    first = max(range(n), key=strengths.__getitem__)
    others = [i for i in range(n) if i != first]
    return [first, *random.Random(VERIFY_SEED).sample(others, count - 1)]


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().masked_fill(a == b, 0.0).max())


def _check_verify(verify: Verify) -> None:
    if isinstance(verify, str) and verify != "all":
        raise SweepError(f"verify={verify!r} must be a number, True, False or 'all'.")
    if verify is not None and not isinstance(verify, str) and verify < 0:
        raise SweepError(f"verify={verify} must not be negative.")


@contextlib.contextmanager
def _quiet(model: PatchableModel, needs_gradients: bool) -> Iterator[None]:
    """No gradients and evaluation mode, put back as they were afterwards."""
    training = [module for _, module in walk(model) if module.training]  # type: ignore[arg-type]
    try:
        for module in training:
            module.training = False
        with torch.set_grad_enabled(needs_gradients):
            yield
    finally:
        for module in training:
            module.training = True
