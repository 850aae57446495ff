"""A sweep as a query: everything checked and planned, nothing run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastlens.errors import SweepError, did_you_mean
from fastlens.memory import said_bytes
from fastlens.patching.budget import allowed_bytes, means_of
from fastlens.patching.codes import Codes, PlacedCodes
from fastlens.patching.evaluate import Wants, keeping_all, merged, wants_of
from fastlens.patching.frame import NullTest
from fastlens.patching.framing import frame_of, stem_of
from fastlens.patching.grid import Grid, given_runs, grid_of
from fastlens.patching.metrics import Reading, reading_of
from fastlens.patching.model import PatchableModel, check_patchable
from fastlens.patching.patch import Patch, Sources, Value
from fastlens.patching.plan import COUNTED, MLP, QUERIES, Plan, plan_runs, unplanned
from fastlens.patching.prompts import Direction, Prompt, Prompts, prompt_record, prompts_of
from fastlens.patching.runs import Run, Selection
from fastlens.patching.sites import SITES
from fastlens.patching.sources import Source
from fastlens.patching.strategy import LAYER_SKIP, Strategy, strategy_of
from fastlens.patching.traffic import Passes, cut_and_ordered
from fastlens.patching.wave import Stem

Metrics: TypeAlias = Callable[[Any], Any] | Sequence[Callable[[Any], Any]] | Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class SweepPlan:
    """What a sweep will do. Made by `plan`, run by `execute`.

    Attributes:
        model, prompts, grid, sources, readings, direction: What was asked.
        wants: What each metric is expected to read.
        strategy: How the runs are made, and why not a better way.
        plan: Which runs are computed, in what order, and what it costs; of the wave.
        stem: Both prompts at the embedding.
        first_difference: Where the pairs differ first; the prompts' length where they do not.
        memory: Bytes that may be taken.
        seed: Of what is drawn at random.
        record: Prompts and options as they are kept with the scores.
        is_several: Whether metrics were given as a list or dict.
        has_other: Whether the other prompt is run.
        gradients: Whether the scores keep their graph.
        codes: What `PlannedPatch.codes` counts.
        passes: In which order chunks go through the layers, and what that reads and writes.
    """

    model: PatchableModel
    prompts: Prompts
    grid: Grid
    sources: list[Source]
    readings: list[Reading]
    wants: list[Wants]
    direction: Direction
    strategy: Strategy
    plan: Plan
    stem: Stem
    first_difference: list[int]
    memory: int
    seed: int
    record: dict[str, Any] = field(default_factory=dict)
    is_several: bool = False
    has_other: bool = True
    gradients: bool = False
    codes: Sequence[PlacedCodes] = ()
    passes: Passes = field(default_factory=lambda: Passes(()))

    @property
    def base(self) -> Tensor:
        """The tokens that are patched."""
        return self.prompts.base_and_source(self.direction)[0]

    @property
    def other(self) -> Tensor | None:
        """The tokens whose activations are put in."""
        return self.prompts.base_and_source(self.direction)[1] if self.has_other else None

    @property
    def runs(self) -> Sequence[Run]:
        """All runs, in the order of the scores."""
        return self.grid.runs

    def keeping_all(self, numbers: Sequence[int]) -> "SweepPlan":
        """Some of the runs, with the logits of every position kept."""
        frame = self.plan.frame
        n_pos = self.prompts.n_pos
        full = frame_of(
            *(self.model, self.first_difference, range(n_pos), self.model.cfg.d_vocab_out),
            n_pos,
            has_source=frame.has_source,
            keeps_later=True,
            nulls=frame.nulls,
            caches=frame.caches,
        )
        runs = [self.runs[number] for number in numbers]
        plan = plan_runs(full, runs)
        passes = cut_and_ordered(plan, self.memory, means_of(self.model))
        return replace(
            self,
            grid=replace(self.grid, runs=runs),
            wants=keeping_all(self.wants),
            plan=plan,
            passes=passes,
        )

    def summary(self) -> dict[str, Any]:
        """Numbers of the plan, as they are kept with the scores."""
        plan = self.plan
        reasons = list(plan.why_not.values())
        same = sum(first != number for number, first in enumerate(plan.same_as))
        summary: dict[str, Any] = {
            "strategy": self.strategy.name,
            "runs": len(self.runs),
            "computed": len(plan.order),
            "null": reasons.count("null"),
            "dead": reasons.count("dead"),
            "same": same,
        }
        if self.strategy.because:
            summary["because"] = self.strategy.because
        if not self.strategy.is_wave:
            return summary | {"computed": len(self.runs), "null": 0, "dead": 0, "same": 0}
        total = plan.total_counts()
        return summary | {
            "chunks": len(plan.chunks),
            **self.passes.summary(),
            "rows": {name: int(n) for name, n in zip(COUNTED, total.sum(0), strict=True)},
            "flops": int(plan.flops(total).sum()) + self.unembed_flops(),
            "flops_one_by_one": plan.plain_flops() * len(self.runs),
        }

    def unembed_flops(self) -> int:
        """Of the logits that are read."""
        frame = self.plan.frame
        stems = (1 + self.has_other) * max(1, len(self.plan.chunks))
        rows = (len(self.plan.order) + stems) * frame.batch * len(frame.needed)
        return 2 * frame.d_model * frame.columns * rows

    def explain(self) -> str:
        """What runs, what does not and why, and what it is predicted to cost, as text."""
        return explained(self)

    __str__ = __repr__ = explain


def explained(query: SweepPlan) -> str:
    """See `SweepPlan.explain`."""
    plan, frame, summary = query.plan, query.plan.frame, query.summary()
    sites = ", ".join(query.grid.named)
    lines = [
        f"{_counted(summary['runs'], 'run')} of {sites}, {query.direction}, "
        f"{_counted(frame.batch, 'pair')} of {_counted(query.prompts.n_pos, 'token')}",
        f"strategy: {query.strategy.name}"
        + (f", because {query.strategy.because}" if query.strategy.because else ""),
        *(f"codes: {codes.said}" for codes in query.codes),
    ]
    if not query.strategy.is_wave:
        return "\n".join(lines)
    lines.append(
        f"computed: {_counted(len(plan.order), 'run')} in {_counted(len(plan.chunks), 'chunk')}"
        + (
            " at most (a run that leaves all codes as they were takes no rows)"
            if query.codes
            else ""
        )
    )
    said = {
        "null": "the new values are the old ones (the prompts agree so far, or values are equal)",
        "dead": "no logit that is read can see them",
        "same": "equal to another run (resid_post is the next layer's resid_pre)",
    }
    lines += [
        f"skipped: {summary[key]:,} {key}: {why}" for key, why in said.items() if summary[key]
    ]
    if query.strategy.name != LAYER_SKIP:
        first = sorted(set(frame.first_difference))
        shown = ", ".join(map(str, first[:8])) + (" ..." if len(first) > 8 else "")
        lines.append(f"first difference of the pairs: position {shown}")
    read = "all" if len(frame.needed) == query.prompts.n_pos else ", ".join(map(str, frame.needed))
    lines.append(f"logits read: positions {read}; up to {frame.columns:,} vocabulary columns")
    total = plan.total_counts()
    lines.append("layer  joins  rows in attention  rows in MLP  GFLOP")
    joins = [0] * frame.n_layers
    for layer in plan.entries:
        joins[layer] += 1
    for layer, (row, flops) in enumerate(zip(total, plan.flops(total), strict=True)):
        lines.append(
            f"{layer:5}  {joins[layer]:5,}  {row[QUERIES]:17,}  {row[MLP]:11,}  {flops / 1e9:5.3g}"
        )
    ratio = summary["flops_one_by_one"] / max(1, summary["flops"])
    lines.append(
        f"work: {summary['flops'] / 1e9:,.3g} GFLOP; one forward per run would take "
        f"{summary['flops_one_by_one'] / 1e9:,.3g} ({ratio:.3g} x)"
    )
    lines += query.passes.lines()
    lines.append(
        f"memory: at most {said_bytes(query.passes.held)} predicted, of {said_bytes(query.memory)} "
        f"allowed"
    )
    return "\n".join(lines)


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def plan(
    model: PatchableModel,
    clean: Prompt,
    corrupted: Prompt,
    *,
    sites: str | Codes | Sequence[str | Codes] = "resid_pre",
    by: str | Sequence[str] | None = None,
    metric: Metrics,
    layers: Selection = None,
    positions: Selection = None,
    heads: Selection = None,
    neurons: Selection = None,
    features: Selection = None,
    key_positions: Selection = None,
    window: int = 1,
    source: Value = "other",
    mode: str = "replace",
    runs: Sequence[Patch | Sequence[Patch]] | Mapping[str, Patch | Sequence[Patch]] | None = None,
    direction: Direction = "denoising",
    normalize: bool | None = None,
    attention_mask: Any = None,
    memory: int | str | None = None,
    seed: int = 0,
    gradients: bool = False,
) -> SweepPlan:
    """Check and plan a sweep without running it; see `sweep` for the arguments.

    >>> print(plan(model, clean, corrupted, sites="z", metric=logit_diff(" Paris", " Rome")))

    Cost: the embedding of both prompts, and a few microseconds a run.
    """
    check_patchable(model)
    if direction not in ("denoising", "noising"):
        raise SweepError(
            f"direction={direction!r} must be 'denoising' or 'noising'."
            f"{did_you_mean(direction, ('denoising', 'noising'))}"
        )
    prompts = prompts_of(model, clean, corrupted, attention_mask)
    listed, is_several = _listed(metric)
    readings = [
        replace(
            reading_of(one, model, prompts.n_pos, prompts.batch),
            **({} if name is None else {"name": name}),
        )
        for name, one in listed
    ]
    for reading in readings:
        if reading.positions is not None:
            prompts.check_not_padding(reading.positions)
    if normalize is not None:
        readings = [replace(reading, normalize=normalize) for reading in readings]
    sources = Sources(prompts.batch, prompts.n_pos, seed, keeps_graph=gradients)
    if runs is not None:
        restricted = {"by": by, "layers": layers, "positions": positions, "heads": heads,
                      "neurons": neurons, "features": features,
                      "key_positions": key_positions}  # fmt: skip
        for name, given in restricted.items():
            if given is not None:
                raise SweepError(f"{name}= goes with sites=; with runs= each Patch says its own.")
        grid = given_runs(model, runs, sources)
    else:
        restrictions = {"layer": layers, "pos": positions, "head": heads, "neuron": neurons,
                        "feature": features, "key_pos": key_positions}  # fmt: skip
        grid = grid_of(
            *(model, prompts, sites, by, restrictions, sources),
            source=source,
            mode=mode,
            window=window,
        )
    record = {"clean": prompt_record(clean), "corrupted": prompt_record(corrupted)}
    return framed(
        *(model, prompts, grid, sources.list, readings, direction),
        memory=memory,
        seed=seed,
        record=record,
        is_several=is_several,
        gradients=gradients,
        codes=sources.codes,
    )


def framed(
    model: PatchableModel,
    prompts: Prompts,
    grid: Grid,
    sources: list[Source],
    readings: list[Reading],
    direction: Direction,
    *,
    memory: int | str | None = None,
    seed: int = 0,
    record: dict[str, Any] | None = None,
    is_several: bool = False,
    has_other: bool = True,
    nulls: Mapping[int, NullTest] | None = None,
    gradients: bool = False,
    codes: Sequence[PlacedCodes] = (),
) -> SweepPlan:
    """The plan of runs whose patches are already integers.

    Raises: SweepError if the memory is too small for one run; MetricError if a metric's result
        cannot be used.
    """
    device = torch.device(model.cfg.device)
    cfg = model.cfg
    wants = [
        wants_of(reading, prompts.n_pos, cfg.d_vocab_out, cfg.dtype, device) for reading in readings
    ]
    positions, columns = merged(wants, prompts.n_pos, cfg.d_vocab_out)
    strategy = strategy_of(model, needs_gradients=gradients, codes=codes)
    base, other = prompts.base_and_source(direction)
    with torch.no_grad():
        stem, first = stem_of(model, base, other if has_other else None, prompts.mask)
    looks_ahead = any(
        patch.value != 0 and SITES[patch.site].axes[-1] == "key_pos"
        for run in grid.runs
        for patch in run.patches
    )
    frame = frame_of(
        *(model, first, positions, columns, prompts.n_pos),
        has_source=has_other,
        keeps_later=looks_ahead,
        nulls=nulls,
        caches=[number for number, source in enumerate(sources) if source.kind == "cache"],
    )
    allowed = allowed_bytes(model, memory)
    passes = Passes(())
    if strategy.is_wave:
        made = plan_runs(frame, grid.runs)
        passes = cut_and_ordered(made, allowed, means_of(model))
    else:
        made = unplanned(frame, grid.runs)
    return SweepPlan(
        *(model, prompts, grid, sources, readings, wants, direction, strategy, made, stem, first),
        memory=allowed,
        seed=seed,
        record=record or {},
        is_several=is_several,
        has_other=has_other,
        gradients=gradients,
        codes=codes,
        passes=passes,
    )


def _listed(metric: Metrics) -> tuple[list[tuple[str | None, Any]], bool]:
    """Names and metrics, and whether several were given."""
    if isinstance(metric, Mapping):
        found: list[tuple[str | None, Any]] = [(str(name), one) for name, one in metric.items()]
    elif isinstance(metric, list | tuple):
        found = [(None, one) for one in metric]
    else:
        return [(None, metric)], False
    if not found:
        raise SweepError("metric= is empty. Give at least one.")
    return found, True
