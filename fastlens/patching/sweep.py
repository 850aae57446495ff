"""`sweep`: the effect of patching every site on a metric."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from fastlens.patching.codes import Codes
from fastlens.patching.equal import equality
from fastlens.patching.execute import Verify, execute
from fastlens.patching.grid import given_runs
from fastlens.patching.metrics import reading_of
from fastlens.patching.model import PatchableModel
from fastlens.patching.patch import Patch, Sources, Value
from fastlens.patching.prompts import Direction, Prompt, Prompts
from fastlens.patching.query import Metrics, framed, plan
from fastlens.patching.runs import Selection
from fastlens.scores import Scores


def sweep(
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
    verify: Verify = None,
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
            same number of tokens, so that positions correspond. Pairs of different lengths are
            padded on the left and masked: position -1 is each prompt's last token.
        sites: What is patched: ``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out``,
            ``mlp_out``, ``z``, ``q``, ``k``, ``v``, ``pattern``, ``mlp_post`` and the others of
            `fastlens.patching.sites.SITES`; or the `codes` of sparse autoencoders, feature by
            feature. A list gives scores with a first axis ``site``. Under grouped attention the
            heads of ``k`` and ``v`` are KV heads.
        by: The axes of the scores, ``layer`` among them; an axis of the activation that is not in
            ``by`` is patched whole. By default ``("layer", "pos")``, for per-head sites
            ``("layer", "head")``; ``pattern`` also has ``query_pos`` and ``key_pos``, MLP sites
            ``neuron``, codes ``feature``.
        metric: One of `logit_diff`, `answer_logit`, `answer_prob`, `kl_divergence`,
            `cross_entropy`, or a pure function of the logits ``[batch, pos, d_vocab]`` that returns
            a scalar or ``[batch]``. A list or dict of several gives a first axis ``metric``. Only
            the logits that a function looks at are computed.
        layers, positions, heads, neurons, features, key_positions: Restrict the sweep: an index,
            several, or a slice; negative ones count from the end. For an axis outside ``by``, the
            patch covers only these. For ``pattern``, positions are query positions.
        window: Layers patched together around each layer: 10 as Meng et al. do.
        source, mode: Where new values come from and what is done with them, as in `Patch`:
            ``source="zero"`` or ``"mean"`` ablates, a tensor with ``mode="add"`` steers.
        runs: Instead of ``sites``: the runs one by one, each a `Patch` or a list of patches that
            act together; a dict names them. The scores have one axis, ``run``.
        direction: ``"denoising"`` or ``"noising"``.
        normalize: Report each metric as a fraction of its clean-corrupted gap (0 corrupted, 1
            clean), whatever the metric says itself.
        attention_mask: 0 for padding, for tokens given as ``[batch, pos]``.
        memory: What the sweep may take beside model and results: bytes, or ``"2GiB"``; by default
            half of what is free, or what ``max_memory`` leaves beside streamed weights. The answer
            does not depend on it beyond rounding.
        seed: For ``source="resample"``.
        gradients: Keep the graph, so that ``scores.values`` can be differentiated with respect to
            source tensors and weights that require gradients. One forward per run, all kept.
        verify: How many runs are made again one at a time with `run_with_hooks` and compared, the
            strongest first, then drawn at random; ``"all"`` or True for all, 0 or False for none.
            By default one, or as many as cost 5 % of the work.
        progress: Show a bar if it takes longer than two seconds.
        out: A folder. Finished parts are written there as the sweep goes, and a sweep that was
            interrupted goes on from them; the scores are saved there. Where chunks go layer by
            layer (``plan(...).explain()`` says so) a group of them is finished at once.

    Returns: `Scores` with ``values`` indexed by ``by``: the metric itself, or its fraction of the
    gap. ``reference`` is the run that was not patched. ``per_example`` has the value of each pair
    where the metric gives one.

    Cost: one pass over the layers for all runs of a chunk (see `plan` for how much), in which a run
    costs only the layers from its patch on and the positions from its first difference on; runs
    that cannot change what is read cost nothing. Models with live hooks or foreign modules take
    slower exact ways; ``plan(...)`` says which.

    Numerics: equal to one run at a time within 1e-4 (float32) or 1e-12 (float64) times
    ``max(1, |gap|)``; ``certificate`` says what was checked. Runs that are skipped have the base
    run's value to the bit.

    Raises: SweepError, TokenError, MetricError or SourceError before any run for what can be known
        then; MetricError for a metric that gives NaN; SweepError, after saving, if a re-run
        differs by more than the tolerance (the scores are in its ``scores`` attribute).
    """
    query = plan(
        *(model, clean, corrupted),
        sites=sites,
        by=by,
        metric=metric,
        layers=layers,
        positions=positions,
        heads=heads,
        neurons=neurons,
        features=features,
        key_positions=key_positions,
        window=window,
        source=source,
        mode=mode,
        runs=runs,
        direction=direction,
        normalize=normalize,
        attention_mask=attention_mask,
        memory=memory,
        seed=seed,
        gradients=gradients,
    )
    return execute(query, verify=verify, progress=progress, out=out)


def patched_metrics(
    model: PatchableModel,
    tokens: Int[Tensor, "batch pos"],
    runs: Sequence[Sequence[Patch]],
    metric: Any,
    *,
    verify: Verify = 1,
    progress: bool = True,
) -> Float[Tensor, " run"] | Float[Tensor, "run batch"]:
    """The metric of each run, where new values come from caches and no other prompt is known.

    Args:
        tokens: The prompts that are patched.
        runs: The patches of each; a `Patch`'s source is a cache, a number or a tensor.
        metric, verify, progress: As in `sweep`.

    Cost: as `sweep`, and one forward of the prompts with their activations kept: a cached value
    that is equal to the run's own, bit by bit, changes nothing, and such runs are skipped.
    """
    prompts = Prompts(tokens, tokens)
    sources = Sources(prompts.batch, prompts.n_pos, seed=0)
    grid = given_runs(model, runs, sources)
    reading = reading_of(metric, model, prompts.n_pos, prompts.batch)
    query = framed(
        *(model, prompts, grid, sources.list, [reading], "denoising"),
        has_other=False,
        nulls=equality(model, tokens, grid.runs, sources.list),
        codes=sources.codes,
    )
    scores = execute(query, verify=verify, progress=progress)
    return scores.values if scores.per_example is None else scores.per_example.T.contiguous()
