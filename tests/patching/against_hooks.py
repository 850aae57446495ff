"""The wave held against one hooked forward per run: plans of every site, mode and source."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlens.components.rows import logits_of, normalized
from fastlens.patching import Patch, plan
from fastlens.patching.execute import hooked_runs
from fastlens.patching.plan import COUNTED
from fastlens.patching.query import SweepPlan
from fastlens.patching.sites import SITES, available_sites, n_heads
from fastlens.patching.uses import uses_of
from fastlens.patching.wave import Wave
from tests.models import prompts

MODES = ("replace", "add", "scale")
SOURCES = ("other", "zero", "number", "mean", "resample", "tensor", "cache")
PADDINGS = ("none", "left", "right")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


def pairs(batch: int, n_pos: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clean and corrupted tokens; every pair has a first difference of its own."""
    clean = prompts(batch, n_pos, seed)
    corrupted = clean.clone()
    for example in range(batch):
        first = min(2 + example, n_pos - 1)
        corrupted[example, first] = (corrupted[example, first] + 7) % 50
        late = max(n_pos - 1 - example % 2, 0)
        corrupted[example, late] = (corrupted[example, late] + 11) % 50
    return clean, corrupted


def mask_of(padding: str, batch: int, n_pos: int) -> Tensor | None:
    """Two tokens of padding in the first example, one in the second, none in the third, ..."""
    if padding == "none":
        return None
    mask = torch.ones(batch, n_pos, dtype=torch.long)
    for example in range(batch):
        n = (2, 1, 0)[example % 3]
        if n:
            mask[example, slice(0, n) if padding == "left" else slice(n_pos - n, None)] = 0
    return mask


def every_activation(model: Any, batch: int, n_pos: int, mask: Tensor | None = None) -> Any:
    """A cache of every site, of prompts that are neither of a sweep's."""
    sites = available_sites(model.cfg, model.hook_dict)
    layers = range(model.cfg.n_layers)
    found: dict[str, Tensor] = {}
    # attn_in is not passed where queries, keys and values have inputs of their own.
    for left_out in ("attn_in", "q_input k_input v_input"):
        names = [
            SITES[site].hook_name(layer)
            for site in sites
            for layer in layers
            if site not in left_out.split()
        ]
        masked = {} if mask is None else {"attention_mask": mask}
        with torch.no_grad():
            _, cache = model.run_with_cache(prompts(batch, n_pos, 5), names_filter=names, **masked)
        found |= {name: cache[name] for name in names}
    return found


def source_of(kind: str, seed: int, cache: Any, width: int = 1) -> Any:
    """Something for a patch's ``source``; a tensor broadcasts over all but its last axis."""
    if kind == "number":
        return 0.75
    if kind == "tensor":
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(width, generator=generator, dtype=torch.float64)
    return cache if kind == "cache" else kind


def width_of(model: Any, site: str) -> int:
    """Length of the axis of an activation that is never indexed; 1 where there is none."""
    if SITES[site].axes[-1] in ("neuron", "key_pos"):
        return 1
    in_heads = site in ("q", "k", "v", "z", "rot_q", "rot_k")
    if not in_heads:
        return model.cfg.d_model
    of_values = site in ("v", "z") and model.cfg.d_value
    return of_values or model.cfg.d_head


def random_patch(
    model: Any, n_pos: int, site: str, layer: int, mode: str, kind: str, rng: random.Random,
    cache: Any,
) -> Patch:  # fmt: skip
    """A patch of some random entries of the site."""
    cfg, axes = model.cfg, SITES[site].axes

    def some(size: int) -> Any:
        whole, one, two = None, rng.randrange(size), sorted(rng.sample(range(size), min(2, size)))
        return rng.choice([whole, one, two, two[::-1]])

    where: dict[str, Any] = {"pos": some(n_pos)}
    if "head" in axes:
        where["head"] = some(n_heads(SITES[site], cfg))
    if "neuron" in axes:
        where["neuron"] = some(cfg.d_mlp)
    if "key_pos" in axes:
        where["key_pos"] = some(n_pos)
    if site == "attn_scores" and mode == "scale" and kind not in ("number",):
        # -inf times zero or a negative number is no score.
        kind = "number"
    # Values along the activation's own last axis, or along its keys where all are patched.
    width = width_of(model, site)
    if axes[-1] == "key_pos":
        width = n_pos if where["key_pos"] is None else 1
    if axes[-1] == "neuron":
        width = cfg.d_mlp if where["neuron"] is None else 1
    source = source_of(kind, rng.randrange(2**30), cache, width)
    return Patch(site, layer, **where, source=source, mode=mode)


def go_together(patches: Sequence[Patch]) -> bool:
    """Whether one run may have all of them."""
    sites = {patch.site for patch in patches}
    return "attn_in" not in sites or sites.isdisjoint(("q_input", "k_input", "v_input"))


def mixed_runs(model: Any, batch: int, n_pos: int, cache: Any, n_multi: int = 8, seed: int = 0):
    """Every site and, over them in turn, every mode and source; then runs of several patches."""
    rng = random.Random(seed)
    sites = available_sites(model.cfg, model.hook_dict)
    kinds = [kind for kind in SOURCES if batch > 1 or kind != "resample"]
    # Odd lengths, so that in time every site meets every mode and source.
    modes = ("replace", "replace", "add", "replace", "scale")
    runs: list[list[Patch]] = []
    # Half of the sites a second time, in another way.
    for number, site in enumerate([*sites, *sites[seed % 2 :: 2]]):
        layer = (number + number // len(sites)) % model.cfg.n_layers
        kind = "other" if number % 3 == 0 else kinds[number % len(kinds)]
        mode = modes[number % len(modes)]
        runs.append([random_patch(model, n_pos, site, layer, mode, kind, rng, cache)])
    while n_multi:
        patches = [
            random_patch(
                *(model, n_pos, rng.choice(sites), rng.randrange(model.cfg.n_layers)),
                *(rng.choice(MODES), rng.choice(kinds), rng, cache),
            )
            for _ in range(rng.randint(2, 4))
        ]
        if go_together(patches):
            runs.append(patches)
            n_multi -= 1
    # The same entries twice, each time in another way.
    site = rng.choice(("z", "resid_pre"))
    runs.append([Patch(site, 1, pos=3), Patch(site, 1, pos=3, source=0.5, mode="scale")])
    runs.append([Patch(site, 1, pos=3, source=0.5, mode="scale"), Patch(site, 1, pos=3)])
    return runs


def planned(
    model: Any,
    clean: Tensor,
    corrupted: Tensor,
    runs: Any,
    *,
    reads: Sequence[int] = (-1,),
    mask: Tensor | None = None,
    **options: Any,
) -> SweepPlan:
    """A plan of these runs whose metric reads all logits of the positions ``reads``."""

    def metric(logits: Tensor) -> Tensor:
        return logits[:, list(reads)].sum((1, 2))

    return plan(model, clean, corrupted, runs=runs, metric=metric, attention_mask=mask, **options)


def wave_logits(query: SweepPlan) -> Tensor:
    """Logits ``[run, batch, needed, d_vocab]`` by the wave; its work is held against the plan."""
    assert query.strategy.is_wave, query.strategy
    made, frame, model = query.plan, query.plan.frame, query.model
    wave = Wave(
        *(model, frame, query.stem, query.sources, query.prompts.n_pos),
        codes=query.codes,
        blocks=made.blocks,
    )
    found: dict[int, Tensor] = {}
    counts = torch.zeros(frame.n_layers, len(COUNTED), dtype=torch.long)
    executed = torch.zeros_like(counts)
    with torch.no_grad():
        base = model(query.base, **_masked(query))[:, list(frame.needed)]
        for chunk in made.chunks:
            use = uses_of(made, chunk)
            final = wave.run(use, chunk.first_layer)
            x = final.x
            if model.cfg.normalization_type is not None:
                x = normalized(model.ln_final, x)
            logits = logits_of(model.unembed, x, None)
            first = chunk.first_layer
            executed += final.counts
            counts += final.counts
            counts[first:] -= torch.from_numpy(made.base_counts())[first:]
            for i, run in enumerate(chunk.runs):
                branches = torch.from_numpy(use.branch_of[i])
                own = torch.where(
                    branches >= 0, branches + final.n_stems, torch.arange(frame.batch)
                )
                rows = final.table[own][:, list(frame.needed)]
                assert bool((rows >= 0).all())
                found[run] = logits[rows]
    if query.codes:
        # A run that leaves all codes as they were takes no rows, which no plan can know.
        assert bool((counts <= torch.from_numpy(made.counts)).all())
        return torch.stack([found.get(first, base) for first in made.same_as])
    assert torch.equal(counts, torch.from_numpy(made.counts)), (counts, made.counts)
    if made.chunks:
        # The stems' own pass, in front of the chunks.
        before = made.chunks[-1].first_layer
        executed[:before] += torch.from_numpy(made.base_counts())[:before]
        assert torch.equal(executed, torch.from_numpy(made.total_counts()))
    return torch.stack([found.get(first, base) for first in made.same_as])


def _masked(query: SweepPlan) -> dict[str, Tensor]:
    return {} if query.prompts.mask is None else {"attention_mask": query.prompts.mask}


def hooked_logits(query: SweepPlan) -> Tensor:
    """The same logits, one hooked forward a run."""
    with torch.no_grad():
        how = hooked_runs(query, query.runs)
        return torch.stack([how.alone(run)[:, list(query.plan.frame.needed)] for run in query.runs])


def gap_of(query: SweepPlan) -> float:
    """The largest difference in any logit that is read, between the two prompts."""
    with torch.no_grad():
        base, other = (
            query.model(tokens, **_masked(query))[:, list(query.plan.frame.needed)]
            for tokens in (query.base, query.other)
        )
    return max(1.0, float((base - other).abs().max()))


def assert_same(query: SweepPlan, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Every logit of every run, with the run in the message; NaN only where both have it."""
    difference = (got.double() - expected.double()).abs()
    difference[(got == expected) | (got.isnan() & expected.isnan())] = 0.0
    worst = difference.flatten(1).max(1).values.nan_to_num(nan=torch.inf)
    number = int(worst.argmax())
    assert float(worst[number]) <= tolerance, (
        f"run {number} differs by {float(worst[number]):.3g} > {tolerance:.3g}: "
        f"{query.runs[number].patches} (as {query.plan.same_as[number]}, "
        f"{query.plan.why_not.get(number, 'computed')}; {int((worst > tolerance).sum())} wrong)"
    )


def check(query: SweepPlan, expected: Tensor | None = None, tolerance: float | None = None):
    """The wave against hooked runs; gives back what the hooked runs gave."""
    if expected is None:
        expected = hooked_logits(query)
    if tolerance is None:
        tolerance = TOLERANCE[query.model.cfg.dtype] * gap_of(query)
    assert_same(query, wave_logits(query), expected, tolerance)
    return expected


def least_memory(query: SweepPlan) -> int:
    """The smallest budget that works."""
    return query.plan.least_bytes
