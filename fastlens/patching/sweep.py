"""`sweep`: the effect of patching every site, one at a time, on a metric."""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from fastlens.errors import MetricError, SweepError, did_you_mean
from fastlens.patching.grid import Grid, grid_of
from fastlens.patching.metrics import NORMALIZED_UNIT, Reading, reading_of
from fastlens.patching.model import PatchableModel, modules_with_hooks
from fastlens.patching.prompts import Direction, Prompt, Prompts, prompt_record, prompts_of
from fastlens.patching.runs import Selection
from fastlens.patching.stacked import run_alone, run_stacked, runs_per_stack
from fastlens.scores import Scores, writable_folder

# Largest |difference in the metric| between two ways to make a run, per unit of max(1, |gap|).
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 2.5e-1,
}
VERIFY_SEED = 0


def sweep(
    model: PatchableModel,
    clean: Prompt,
    corrupted: Prompt,
    *,
    sites: str | Sequence[str] = "resid_pre",
    by: str | Sequence[str] | None = None,
    metric: Callable[[Any], Any],
    layers: Selection = None,
    positions: Selection = None,
    heads: Selection = None,
    neurons: Selection = None,
    direction: Direction = "denoising",
    batch_size: int | None = None,
    verify: int | bool | Literal["all"] = 1,
    progress: bool = True,
    out: str | Path | None = None,
) -> Scores:
    """Patch every site, one at a time, and measure what that does: activation patching.

    Denoising runs the corrupted prompt with one activation replaced by the clean run's, and shows
    where the clean behaviour can be restored from; noising runs the clean prompt with one replaced
    by the corrupted run's, and shows what it cannot do without (Meng et al. 2202.05262; Heimersheim
    & Nanda 2404.15255).

    Args:
        model: A `HookedTransformer`.
        clean, corrupted: Text, a list of texts, or tokens ``[batch, pos]``; each pair must have the
            same number of tokens, so that positions correspond.
        sites: What is patched: ``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out``,
            ``mlp_out``, ``z``, ``q``, ``k``, ``v``, ``pattern``, ``mlp_post`` and the others of
            `fastlens.patching.sites.SITES`. A list gives scores with a first axis ``site``. Under
            grouped attention the heads of ``k`` and ``v`` are KV heads.
        by: The axes of the scores, ``layer`` among them; an axis of the activation that is not in
            ``by`` is patched whole. By default ``("layer", "pos")``, for per-head sites
            ``("layer", "head")``; ``pattern`` also has ``query_pos`` and ``key_pos``.
        metric: One of `logit_diff`, `answer_logit`, `answer_prob`, `kl_divergence`,
            `cross_entropy`, or a pure function of the logits ``[batch, pos, d_vocab]`` that returns
            a scalar or ``[batch]``.
        layers, positions, heads, neurons: Restrict the sweep: an index, several, or a slice;
            negative ones count from the end. For an axis outside ``by``, the patch covers only
            these. For ``pattern``, positions are query positions.
        direction: ``"denoising"`` or ``"noising"``.
        batch_size: Prompts per forward; by default what fits a fixed budget of memory.
        verify: How many runs are made again, one at a time with `run_with_hooks`, and compared: the
            strongest first, then drawn at random. ``"all"`` or True for all, 0 or False for none.
        progress: Show a bar if it takes longer than two seconds.
        out: A folder to save the scores in.

    Returns: `Scores` with ``values`` indexed by ``by``: the metric itself, or, for a metric with
    ``normalize=True``, the fraction of the clean-corrupted gap (0 corrupted, 1 clean).
    ``reference`` is the run that was not patched.

    Cost: one forward of the source prompt, and for each site one run from its layer on, stacked
    ``batch_size`` prompts at a time. If modules carry hooks of the user's, every run is a forward
    of its own, since a hook may look at the whole batch.

    Numerics: equal to one run at a time within 1e-4 (float32) or 1e-12 (float64) times
    ``max(1, |gap|)``; ``certificate`` says what was checked.

    Raises: SweepError, TokenError, MetricError or SourceError before any run for what can be known
        then; MetricError for a metric that gives NaN; SweepError, after saving, if a re-run
        differs by more than the tolerance (the scores are in its ``scores`` attribute).
    """
    _check_options(direction, batch_size, verify)
    prompts = prompts_of(model, clean, corrupted)
    reading = reading_of(metric, model, prompts.n_pos, prompts.batch)
    restrictions = {"layer": layers, "pos": positions, "head": heads, "neuron": neurons}
    grid = grid_of(model, prompts, sites, by, restrictions)
    folder = None if out is None else writable_folder(out)
    with _quiet(model):
        outcome = _run(model, prompts, reading, grid, direction, batch_size, verify, progress)
    scores = _scores(model, prompts, grid, outcome, direction)
    scores.meta |= {"clean": prompt_record(clean), "corrupted": prompt_record(corrupted)}
    if folder is not None:
        scores.save(folder)
    _refuse_if_wrong(scores)
    return scores


# -- running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    """Plain (not normalised) values, and how they were come by."""

    values: list[Tensor]
    clean: Tensor
    corrupted: Tensor
    reading: Reading
    plan: dict[str, Any]
    certificate: dict[str, Any]

    @property
    def gap(self) -> float:
        return float(self.clean.double().mean() - self.corrupted.double().mean())


def _run(
    model: PatchableModel,
    prompts: Prompts,
    reading: Reading,
    grid: Grid,
    direction: str,
    batch_size: int | None,
    verify: int | bool | str,
    progress: bool,
) -> _Outcome:
    base, source_tokens = prompts.base_and_source(direction)
    wanted = sorted({run.hook_name for run in grid.runs})
    source_logits, cache = model.run_with_cache(source_tokens, names_filter=wanted)
    passed = set(cache.keys())
    for name in wanted:
        if name not in passed:
            raise SweepError(
                f"nothing passes the hook point {name!r} in this model, so nothing can be patched "
                f"there. A config flag may switch it off."
            )
    source = {name: cache[name] for name in wanted}
    base_logits = model(base)
    clean_logits = source_logits if direction == "denoising" else base_logits
    corrupted_logits = base_logits if direction == "denoising" else source_logits
    reading = reading.with_clean(clean_logits)
    clean = reading.of_logits(clean_logits, "the clean run")
    corrupted = reading.of_logits(corrupted_logits, "the corrupted run")
    dtype = clean_logits.dtype
    del source_logits, base_logits, clean_logits, corrupted_logits
    if reading.normalize:
        _check_gap(clean, corrupted, reading)
    names = [grid.name(run) for run in grid.runs]
    hooked = modules_with_hooks(model)
    stack = _runs_per_stack(model, prompts, batch_size, reading, dtype)
    description = f"{', '.join(site.name for site in grid.sites)} {direction}"
    # Nothing is shown before two seconds have passed.
    with tqdm(
        total=len(grid.runs), desc=description, unit="run", delay=2, disable=not progress
    ) as bar:
        if hooked:
            values = []
            for run, name in zip(grid.runs, names, strict=True):
                values.append(run_alone(model, base, run, source, reading, name))
                bar.update(1)
        else:
            values = run_stacked(
                model, base, grid.runs, source, reading, names, stack=stack, progress=bar.update
            )
    plan = {
        "strategy": "stacked forwards from each layer",
        "runs": len(grid.runs),
        "runs_per_forward": stack,
    }
    if hooked:
        plan |= {
            "strategy": "one forward per run",
            "because": f"hooks are on {len(hooked)} modules, first {hooked[0]}",
            "runs_per_forward": 1,
        }
    outcome = _Outcome(values, clean, corrupted, reading, plan, {})
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32]) * max(1.0, abs(outcome.gap))
    again = [] if hooked else _runs_to_verify(outcome, direction, verify)
    differences = [
        _difference(values[i], run_alone(model, base, grid.runs[i], source, reading, names[i]))
        for i in again
    ]
    outcome.certificate.update(
        method="the same run alone, by run_with_hooks",
        runs=len(again),
        checked=[names[i] for i in again][:100],
        tolerance=tolerance,
    )
    if differences:
        outcome.certificate["max_difference"] = max(differences)
    return outcome


def _runs_per_stack(
    model: PatchableModel,
    prompts: Prompts,
    batch_size: int | None,
    reading: Reading,
    dtype: torch.dtype,
) -> int:
    if batch_size is not None:
        return max(1, batch_size // prompts.batch)
    return runs_per_stack(
        model,
        prompts.n_pos,
        prompts.batch,
        dtype.itemsize,
        all_logits=reading.position is None,
    )


def _runs_to_verify(outcome: _Outcome, direction: str, verify: int | bool | str) -> list[int]:
    """The run furthest from the base run, then others at random: a null run proves nothing."""
    n = len(outcome.values)
    count = n if verify == "all" or verify is True else min(int(verify), n)
    if count == 0:
        return []
    base = outcome.corrupted if direction == "denoising" else outcome.clean
    strengths = [float((v.double() - base.double()).abs().mean()) for v in outcome.values]
    first = max(range(n), key=strengths.__getitem__)
    others = [i for i in range(n) if i != first]
    return [first, *random.Random(VERIFY_SEED).sample(others, count - 1)]


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).abs().masked_fill(a == b, 0.0).max())


@contextlib.contextmanager
def _quiet(model: PatchableModel) -> Iterator[None]:
    """No gradients and evaluation mode, put back as they were afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


# -- the answer ----------------------------------------------------------------------------------


def _scores(
    model: PatchableModel, prompts: Prompts, grid: Grid, outcome: _Outcome, direction: str
) -> Scores:
    reading = outcome.reading
    base = outcome.corrupted if direction == "denoising" else outcome.clean
    if any(value.shape != base.shape for value in outcome.values):
        raise MetricError(
            f"the metric {reading.name!r} returned a scalar for some runs and [batch] for others. "
            f"It must return one of them."
        )
    values = torch.stack([value.double() for value in outcome.values])
    clean, corrupted = (float(x.double().mean()) for x in (outcome.clean, outcome.corrupted))
    reference = corrupted if direction == "denoising" else clean
    unit = reading.unit
    if reading.normalize:
        # Each example against its own corrupted run, over the mean gap, so that the mean over
        # examples is the ratio of means.
        values = (values - outcome.corrupted.double()) / outcome.gap
        reference = 0.0 if direction == "denoising" else 1.0
        clean, corrupted = 1.0, 0.0
        unit = NORMALIZED_UNIT
    is_per_example = base.ndim == 1
    rows = values.view(len(values), -1).T.reshape(-1, *grid.shape)
    keep = torch.float64 if any(v.dtype == torch.float64 for v in outcome.values) else torch.float32
    named = ", ".join(site.name for site in grid.sites)
    whose = "" if model.cfg.model_name == "custom" else f"{model.cfg.model_name}: "
    return Scores(
        values=rows.mean(0).to(keep),
        axes=grid.axes,
        labels=grid.labels,
        unit=unit,
        title=f"{whose}{direction} {named}, {reading.name}",
        per_example=rows.to(keep) if is_per_example else None,
        reference=reference,
        baselines={"clean": clean, "corrupted": corrupted},
        plan=outcome.plan,
        certificate=outcome.certificate,
        meta={
            "model": model.cfg.model_name,
            "sites": [site.name for site in grid.sites],
            "direction": direction,
            "metric": reading.name,
            "clean_metric": float(outcome.clean.double().mean()),
            "corrupted_metric": float(outcome.corrupted.double().mean()),
            "clean_tokens": prompts.clean.tolist(),
            "corrupted_tokens": prompts.corrupted.tolist(),
        },
    )


def _check_gap(clean: Tensor, corrupted: Tensor, reading: Reading) -> None:
    a, b = float(clean.double().mean()), float(corrupted.double().mean())
    rounding = 16 * torch.finfo(clean.dtype).eps * max(abs(a), abs(b))
    if not math.isfinite(a - b) or abs(a - b) <= rounding:
        raise MetricError(
            f"{reading.name} is {a:.6g} on the clean run and {b:.6g} on the corrupted one, so "
            f"fractions of their gap mean nothing. Use normalize=False or other prompts."
        )


def _refuse_if_wrong(scores: Scores) -> None:
    certificate = scores.certificate or {}
    difference = certificate.get("max_difference", 0.0)
    # Written so that NaN is refused too.
    if not difference <= certificate["tolerance"]:
        error = SweepError(
            f"a run made again by run_with_hooks differs by {difference:.3g} from the sweep's "
            f"(tolerance {certificate['tolerance']:.3g}). Something in the model depends on what "
            f"else is in the batch. The scores are in this error's .scores; batch_size="
            f"{len(scores.meta['clean_tokens'])} makes every run alone."
        )
        error.scores = scores  # type: ignore[attr-defined]
        raise error


def _check_options(direction: str, batch_size: int | None, verify: int | bool | str) -> None:
    directions = ("denoising", "noising")
    if direction not in directions:
        raise SweepError(
            f"direction={direction!r} must be one of {directions}."
            f"{did_you_mean(direction, directions)}"
        )
    if batch_size is not None and batch_size < 1:
        raise SweepError(f"batch_size={batch_size} must be at least 1.")
    if isinstance(verify, str) and verify != "all":
        raise SweepError(f"verify={verify!r} must be a number, True, False or 'all'.")
    if not isinstance(verify, str) and verify < 0:
        raise SweepError(f"verify={verify} must not be negative.")
