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

from fastlens.errors import SweepError
from fastlens.patching.codes import evaluating
from fastlens.patching.evaluate import BASE_RUN, Evaluator, Values
from fastlens.patching.folder import SweepFolder
from fastlens.patching.hooked import HookedRuns, places_of
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
        make = _Waves(query) if query.strategy.is_wave else _Forwards(query)
        again: list[int] = []
        for at, chunk in enumerate(chunks):
            if folder is not None and at in finished:
                found, redo = _unpacked(folder.read(at), len(query.readings))
            else:
                found, redo = make(chunk)
                if folder is not None:
                    folder.write(at, _packed(found, redo))
            if BASE_RUN in redo:
                return None
            if at == 0:
                self.stems = [values.stems for values in found]
            again += [numbers[chunk.runs[i]] for i in redo]
            for per_run, values in zip(self.values, found, strict=True):
                for run, value in zip(chunk.runs, values.runs, strict=True):
                    per_run[numbers[run]] = value
            if bar is not None:
                bar.update(len(chunk.runs))
        return again

    def _fill(self, query: SweepPlan, numbers: Sequence[int]) -> None:
        """Runs that were not computed: as an equal run, or as the base run."""
        for per_run, stems in zip(self.values, self.stems, strict=True):
            for i, number in enumerate(numbers):
                if per_run[number] is None:
                    same = per_run[numbers[query.plan.same_as[i]]]
                    per_run[number] = stems[0] if same is None else same


class _Waves:
    """Chunks made by the wave, which keeps the stems' streams from one to the next."""

    def __init__(self, query: SweepPlan):
        self.query = query
        self.wave = Wave(
            *(query.model, query.plan.frame, query.stem, query.sources, query.prompts.n_pos),
            keep_streams=len(query.plan.chunks) > 1,
            codes=query.codes,
        )
        is_noising = query.direction == "noising"
        self.evaluator = Evaluator(
            *(query.model, query.readings, query.wants, query.prompts.n_pos),
            clean_branch=0 if is_noising else query.plan.frame.batch,
        )

    def __call__(self, chunk: Chunk) -> tuple[list[Values], list[int]]:
        query = self.query
        use = uses_of(query.plan, chunk)
        final = self.wave.run(use, chunk.first_layer)
        names = [query.grid.name(query.runs[number]) for number in chunk.runs]
        return self.evaluator.values(final, use, names)


class _Forwards:
    """Chunks made by hooked forwards, one for each run or several stacked in the batch."""

    def __init__(self, query: SweepPlan):
        self.query = query
        self.how = hooked_runs(query, query.runs)
        base_logits = query.model(query.base, **_masked(query))
        named = [("the base run", base_logits)]
        if query.other is not None:
            named.append(("the other prompt's run", query.model(query.other, **_masked(query))))
        clean_logits = named[-1 if query.direction == "denoising" else 0][1]
        self.itemsize = base_logits.element_size()
        self.readings = [reading.with_clean(clean_logits) for reading in query.readings]
        self.stems = [
            torch.stack([reading.of_logits(logits, name) for name, logits in named])
            for reading in self.readings
        ]

    def __call__(self, chunk: Chunk) -> tuple[list[Values], list[int]]:
        query = self.query
        runs = [query.runs[number] for number in chunk.runs]
        names = [query.grid.name(run) for run in runs]
        values: dict[int, list[Tensor]] = {}
        if query.strategy.name == ALONE:
            for i, run in enumerate(runs):
                values[i] = self._read(self.how.alone(run), names[i])
        else:
            size = self.how.runs_per_stack(self.itemsize)
            for numbers, logits in self.how.stacked(runs, size):
                for i, one in zip(numbers, logits, strict=True):
                    values[i] = self._read(one, names[i])
        in_order = [values[i] for i in range(len(runs))]
        found = [
            Values(stems, reading.stacked([stems[0], *(one[m] for one in in_order)])[1:])
            for m, (stems, reading) in enumerate(zip(self.stems, self.readings, strict=True))
        ]
        return found, []

    def _read(self, logits: Tensor, name: str) -> list[Tensor]:
        return [reading.of_logits(logits, name) for reading in self.readings]


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
    return HookedRuns(model, query.base, query.prompts.mask, query.sources, other, query.codes)


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
