"""Runs a planned sweep, checks some of its runs another way, and hands back the scores."""

import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from fastlens.errors import SweepError
from fastlens.patching.budget import reserved
from fastlens.patching.codes import evaluating
from fastlens.patching.evaluate import BASE_RUN, Values
from fastlens.patching.folder import SweepFolder
from fastlens.patching.making import Forwards, WaveRuns, hooked_runs, masked
from fastlens.patching.model import PatchableModel, walk
from fastlens.patching.plan import Chunk
from fastlens.patching.query import SweepPlan
from fastlens.patching.record import key_of, layout_of, plan_from_layout
from fastlens.patching.result import Outcome, refuse_if_wrong, scores_of, tolerance_of
from fastlens.patching.routing import router_gap
from fastlens.patching.strategy import ALONE, STACKED
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
        if plan.gradients:
            raise SweepError("out= keeps numbers, not graphs: leave it out, or gradients=True.")
        folder = SweepFolder.open(out, key_of(plan), layout_of(plan))
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(folder)
            plan = plan_from_layout(plan, folder.layout)
            # Sums are cut up by threads: another number of them gives other last bits.
            stack.enter_context(_threads(int(folder.layout["threads"])))
        stack.enter_context(_quiet(plan.model, plan.gradients))
        stack.enter_context(evaluating([m for codes in plan.codes for m in codes.modules()]))
        with reserved(plan.model, plan.strategy, plan.passes, plan.memory):
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
        # Nothing is shown before two seconds have passed.
        with tqdm(
            total=len(query.plan.order),
            desc=f"{', '.join(query.grid.named)} {query.direction}",
            unit="run",
            delay=2,
            disable=not self.progress,
        ) as bar:
            again = self._chunks(query, range(len(query.runs)), bar)
        if again is None:
            # Not even the base run read what was expected: no run can be left out by that.
            again = list(range(len(query.runs)))
        for per_run in self.values:
            for number in again:
                per_run[number] = None
        if again:
            full = query.keeping_all(again)
            none_left = self._chunks(full, again, None)
            assert none_left == []
            self._fill(full, again)
        self._fill(query, range(len(query.runs)))
        found = [
            reading.stacked([stems[0], *(v for v in per_run if v is not None)])[1:]
            for reading, stems, per_run in zip(query.readings, self.stems, self.values, strict=True)
        ]
        base = [stems[0] for stems in self.stems]
        other = [stems[-1] for stems in self.stems]
        return Outcome(found, base, other, {})

    def _chunks(self, query: SweepPlan, numbers: Sequence[int], bar: Any) -> list[int] | None:
        """Make all chunks of a plan of the runs ``numbers``.

        Returns: runs whose metric read a row that was not kept; None if the base run's did.
        """
        # Without any run to compute, base run and other prompt are still wanted.
        chunks = query.plan.chunks or [Chunk([], 0, 0)]
        # A second pass is not kept: it is rare, and small.
        folder = None if bar is None else self.folder
        finished = set() if folder is None else set(folder.finished())
        wave = query.strategy.is_wave
        groups = (query.passes.groups if wave else None) or [(i,) for i in range(len(chunks))]
        make = None
        again: list[int] = []
        for group in groups:
            waiting = [at for at in group if at not in finished]
            made: Iterator[tuple[int, list[Values], list[int]]] = iter(())
            if waiting:
                make = make or (WaveRuns(query, self._spill_folder()) if wave else Forwards(query))
                made = make([(at, chunks[at]) for at in waiting], bar)
            stored = (
                (at, *_unpacked(folder.read(at), len(query.readings)))
                for at in group
                if folder is not None and at in finished
            )
            for at, found, redo in itertools.chain(stored, made):
                if folder is not None and at not in finished:
                    folder.write(at, _packed(found, redo))
                if BASE_RUN in redo:
                    return None
                chunk = chunks[at]
                if at == 0:
                    self.stems = [values.stems for values in found]
                again += [numbers[chunk.runs[i]] for i in redo]
                for per_run, values in zip(self.values, found, strict=True):
                    for run, value in zip(chunk.runs, values.runs, strict=True):
                        per_run[numbers[run]] = value
                if bar is not None:
                    bar.update(len(chunk.runs))
        return again

    def _spill_folder(self) -> Path | None:
        return None if self.folder is None else self.folder.path

    def _fill(self, query: SweepPlan, numbers: Sequence[int]) -> None:
        """Runs that were not computed: as an equal run, or as the base run."""
        for per_run, stems in zip(self.values, self.stems, strict=True):
            for i, number in enumerate(numbers):
                if per_run[number] is None:
                    same = per_run[numbers[query.plan.same_as[i]]]
                    per_run[number] = stems[0] if same is None else same


def _packed(found: list[Values], redo: list[int]) -> dict[str, Tensor]:
    packed = {"again": torch.tensor(redo, dtype=torch.long)}
    for i, values in enumerate(found):
        packed |= {f"stems.{i}": values.stems, f"runs.{i}": values.runs}
    return packed


def _unpacked(tensors: dict[str, Tensor], n: int) -> tuple[list[Values], list[int]]:
    found = [Values(tensors[f"stems.{i}"], tensors[f"runs.{i}"]) for i in range(n)]
    return found, tensors["again"].tolist()


def _clean_tokens(query: SweepPlan) -> Tensor:
    """Of the clean run; without another prompt the base is all there is."""
    is_other = query.direction == "denoising" and query.other is not None
    return query.other if is_other else query.base  # type: ignore[return-value]


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
        clean_logits = query.model(_clean_tokens(query), **masked(query))
        readings = [reading.with_clean(clean_logits) for reading in readings]
    differences = [0.0] * len(readings)
    worst = numbers[0]
    for number in numbers:
        logits = how.alone(query.runs[number], materialise=_is_small(query))
        for m, reading in enumerate(readings):
            again = reading.of_logits(logits, query.grid.name(query.runs[number]))
            difference = _difference(outcome.values[m][number], again)
            # Written so that NaN counts.
            if not difference <= differences[m]:
                differences[m], worst = difference, number
    certificate["max_difference"] = differences[0]
    if len(readings) > 1:
        certificate["by_metric"] = [
            {"max_difference": difference, "tolerance": tolerance_of(query, outcome, m)}
            for m, difference in enumerate(differences)
        ]
        certificate |= max(
            certificate["by_metric"], key=lambda one: one["max_difference"] / one["tolerance"]
        )
    if not certificate["max_difference"] <= certificate["tolerance"]:
        nearest = router_gap(query.model, lambda: how.alone(query.runs[worst]))
        if nearest is not None:
            certificate["router_gap"] = nearest._asdict()
    return certificate


def _is_small(query: SweepPlan) -> bool:
    """Whether one layer's patterns are small enough to be made in full."""
    cfg = query.model.cfg
    numbers = query.prompts.batch * cfg.n_heads * query.prompts.n_pos**2
    # Scores, their mask and patterns are held at once.
    return numbers <= 2**24 and 4 * numbers * cfg.dtype.itemsize <= query.memory


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
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet(model: PatchableModel, needs_gradients: bool) -> Iterator[None]:
    """No gradients and evaluation mode, put back as they were afterwards."""
    modules = [module for _, module in walk(model)]  # type: ignore[arg-type]
    with evaluating(modules), torch.set_grad_enabled(needs_gradients):
        yield
