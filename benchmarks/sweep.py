"""Patching sweeps of a GPT-2-small shape: fastlens' wave against what users run today.

    python benchmarks/sweep.py               measure and print
    python benchmarks/sweep.py --write       and write the results file
    python benchmarks/sweep.py --readme      rewrite README's table from the results file
    python benchmarks/sweep.py --smoke       a tiny model, two rounds: does the script run?
    python benchmarks/sweep.py --only NAME   one sweep (may be given more than once)
    --tl4-python PATH    the interpreter of an environment with transformer-lens 4

Random weights, the same for all; batch 1, float32, no gradients. Values are compared first; nothing
is timed if they differ. Quick contenders run between the slow ones, which run a few times only.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.forward import SHAPES, TINY, transformer_lens_twin
from benchmarks.peers import loops, stacked, transformer_lens_4
from benchmarks.sweep_report import (
    AGAIN,
    ALONE,
    BY_HAND,
    FUNCTION,
    HF,
    HF_FORWARD,
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
SLOW_RUNS = {HF: 4, BY_HAND: 3, ALONE: 1, TL3: 2, TL4: 2}
# Of the 64-token sweep, of which one run takes as long as a whole round of the others.
ROUNDS_OF_LONG = 5


@dataclass(frozen=True)
class Case:
    """One sweep.

    Attributes:
        site, by: As `sweep` takes them.
        tokens: Length of the prompts, which agree before ``differ`` and nowhere after.
        stack: Sites that are stacked by hand.
        share: Part of the sites that the loops run, as whole stacks drawn at random.
        loops: Whether others than fastlens run it.
        reference: Seconds on the machine of DESIGN section 9.
    """

    name: str
    title: str
    site: str
    by: tuple[str, ...]
    tokens: int
    differ: int
    stack: int = 16
    share: float = 1.0
    loops: bool = True
    reference: Mapping[str, float] | None = None

    def prompts(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Clean and corrupted tokens."""
        generator = torch.Generator().manual_seed(0)
        clean = torch.randint(vocabulary, (1, self.tokens), generator=generator)
        corrupted = clean.clone()
        corrupted[:, self.differ :] = (corrupted[:, self.differ :] + 7) % vocabulary
        return clean, corrupted

    def indices(self, n_layers: int, n_heads: int) -> list[tuple[int, ...]]:
        """Every site, in the order of the values."""
        lengths = {"layer": n_layers, "pos": self.tokens, "head": n_heads}
        return list(itertools.product(*(range(lengths[axis]) for axis in self.by)))

    def drawn(self, n: int) -> list[int]:
        """Which of the ``n`` sites the loops run."""
        stacks = [range(start, min(start + self.stack, n)) for start in range(0, n, self.stack)]
        count = max(1, round(self.share * len(stacks)))
        return sorted(itertools.chain(*random.Random(0).sample(stacks, count)))


LAYER_POS, LAYER_HEAD = ("layer", "pos"), ("layer", "head")
LAYER_POS_HEAD = ("layer", "pos", "head")
CASES = (
    Case(
        *("resid_pre", "`resid_pre`, layer x position, generic pair", "resid_pre", LAYER_POS),
        *(16, 1),
        reference={TL3: 31.0, TL4: 13.5, HF: 3.7},
    ),
    Case(
        *("resid_pre-minimal", "the same, minimal pair", "resid_pre", LAYER_POS),
        *(15, 10),
        reference={TL3: 28.0},
    ),
    Case(
        *("z", "`z`, layer x head, generic pair", "z", LAYER_HEAD),
        *(16, 1, 12),
        reference={TL3: 23.8, HF: 2.7},
    ),
    Case(
        *("z-minimal", "`z`, layer x position x head, minimal pair", "z", LAYER_POS_HEAD),
        *(15, 10, 12, 0.1),
        reference={TL3: 356.0, HF: 40.0},
    ),
    Case(
        *("resid_pre-64", "`resid_pre`, layer x position, generic pair", "resid_pre", LAYER_POS),
        *(64, 1),
        loops=False,
    ),
)
SMOKE_CASES = (
    Case("resid_pre", "`resid_pre`, generic pair", "resid_pre", LAYER_POS, 6, 1),
    Case("resid_pre-minimal", "the same, minimal pair", "resid_pre", LAYER_POS, 6, 4, 5),
    Case("z", "`z`, layer x head", "z", LAYER_HEAD, 6, 1, 3),
    Case("z-minimal", "`z`, layer x position x head", "z", LAYER_POS_HEAD, 6, 4, 4, 0.3),
    Case("resid_pre-64", "`resid_pre`, generic pair", "resid_pre", LAYER_POS, 12, 1, loops=False),
)


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
    """One set of weights in every library; None where one is not there."""

    hf: Any
    ours: HookedTransformer
    tl3: Any
    tl4: transformer_lens_4.Peer | None = None


def our_contenders(models: Models, case: Case) -> dict[str, Contender]:
    """fastlens' own ways to run the whole sweep; `sweep` runs the clean prompt as well."""
    ours = models.ours
    clean, corrupted = case.prompts(ours.cfg.d_vocab)
    metric = logit_diff(loops.ANSWER, loops.WRONG)

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
    function = loops.FUNCTIONS[case.site, case.by]
    return {
        OURS: Contender(swept(False)),
        AGAIN: Contender(swept(False)),
        VERIFIED: Contender(swept(None)),
        FUNCTION: Contender(lambda: loops.patched(get_act_patch, function, ours, corrupted, cache)),
    }


def slow_contenders(models: Models, case: Case) -> dict[str, Contender]:
    """What users run today, and what they could write by hand.

    TransformerLens' loops are handed a clean cache, as their functions want; what is stacked by
    hand runs the clean prompt itself.
    """
    ours = models.ours
    clean, corrupted = case.prompts(ours.cfg.d_vocab)
    every = case.indices(ours.cfg.n_layers, ours.cfg.n_heads)
    drawn = case.drawn(len(every))
    rows = None if len(drawn) == len(every) else drawn
    indices = [every[row] for row in drawn]
    stacks = stacked.stacks_of(indices, case.by, case.stack)
    alone = stacked.stacks_of(indices, case.by, 1)
    prompts = (case.site, clean, corrupted)
    found = {
        HF: Contender(lambda: stacked.hugging_face(models.hf, *prompts, stacks), rows),
        BY_HAND: Contender(lambda: stacked.fastlens_hooks(ours, *prompts, stacks), rows),
        ALONE: Contender(lambda: stacked.fastlens_hooks(ours, *prompts, alone), rows),
    }
    if models.tl3 is not None:
        from transformer_lens import patching

        with torch.no_grad():
            _, cache = models.tl3.run_with_cache(clean)
        function = loops.FUNCTIONS[case.site, case.by]
        some = None if rows is None else indices
        found[TL3] = Contender(
            lambda: loops.patched(patching, function, models.tl3, corrupted, cache, some), rows
        )
    if models.tl4 is not None:
        peer = models.tl4
        found[TL4] = Contender(lambda: peer.run(case.name), rows)
    return found


def jobs_of(cases: Sequence[Case], cfg: Any) -> dict[str, Any]:
    """What TransformerLens 4's process must know."""
    found = {}
    for case in cases:
        if case.loops:
            clean, corrupted = case.prompts(cfg.d_vocab)
            every = case.indices(cfg.n_layers, cfg.n_heads)
            drawn = case.drawn(len(every))
            found[case.name] = {
                "function": loops.FUNCTIONS[case.site, case.by],
                "clean": clean.tolist(),
                "corrupted": corrupted.tolist(),
                "indices": None if len(drawn) == len(every) else [every[row] for row in drawn],
            }
    return found


def checked_differences(contenders: Mapping[str, Contender], gap: float) -> dict[str, float]:
    """The largest difference between fastlens' values and each other contender's.

    Raises: SystemExit if it is beyond the tolerance: then no time would mean anything.
    """
    expected = contenders[OURS].run().double()
    spread = float(expected.max() - expected.min())
    tolerance = min(TOLERANCE * max(1.0, abs(gap)), TOLERANCE_OF_RANGE * spread)
    found = {}
    for name, contender in contenders.items():
        if name == OURS:
            continue
        rows = slice(None) if contender.rows is None else contender.rows
        values = contender.run().double()
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
    shapes = {
        "qkv": (cfg.d_model, 3 * heads),
        "o": (heads, cfg.d_model),
        "in": (cfg.d_model, cfg.d_mlp),
        "out": (cfg.d_mlp, cfg.d_model),
    }
    found = {}
    for name, (inner, outer) in shapes.items():
        x = torch.randn(rows, inner)
        # Other weights each time, as in a model's layers.
        weights = [torch.randn(outer, inner) for _ in range(4)]

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
) -> dict[str, Timing]:
    """Quick contenders in rounds before, between and after single runs of the slow ones.

    Args:
        rounds: Of the quick ones, at least; more until they have taken ``seconds``.
        slow_runs: How often each slow one runs.
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
        )
        if name is not None:
            several |= alternating({name: slow[name]}, min_rounds=1, max_rounds=1, warm_ups=0)
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
    clean, corrupted = case.prompts(ours.cfg.d_vocab)
    metric = logit_diff(loops.ANSWER, loops.WRONG)

    def planned() -> Any:
        return plan(ours, clean, corrupted, sites=case.site, by=case.by, metric=metric)

    query = planned()
    with torch.no_grad():
        gap = float(loops.metric(ours(clean)) - loops.metric(ours(corrupted)))
    whole = our_contenders(models, case)
    slow = slow_contenders(models, case) if case.loops else {}
    if not case.loops:
        whole = {name: whole[name] for name in (OURS, AGAIN)}
        options["rounds"] = min(options["rounds"], ROUNDS_OF_LONG)
    differences = checked_differences({**whole, **slow}, gap)
    multiplied = products(ours.cfg, min(MOST_ROWS, widest(query.plan)))
    forward = torch.arange(16)[None] % ours.cfg.d_vocab

    def one_forward() -> Any:
        with torch.no_grad():
            return models.hf(forward)

    quick: dict[str, Callable[[], Any]] = {
        **{name: contender.run for name, contender in whole.items()},
        PLANNING: planned,
        HF_FORWARD: one_forward,
        **{name: multiply for name, (multiply, _) in multiplied.items()},
    }
    timings = timed(quick, {name: one.run for name, one in slow.items()}, **options)
    n = len(query.runs)
    rates = {name: flops / timings[name].median for name, (_, flops) in multiplied.items()}
    row = {
        "name": case.name,
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
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--rounds", type=int, default=12, help="of the quick ones, at least")
    found.add_argument("--seconds", type=float, default=30.0, help="of the quick ones, a sweep")
    found.add_argument("--slow-runs", type=int, help="of each slow one, instead of 1 to 4")
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
    torch.set_num_threads(arguments.threads)
    shape, cases = (TINY[0], SMOKE_CASES) if arguments.smoke else (SHAPES[0], CASES)
    cases = [case for case in cases if not arguments.only or case.name in arguments.only]
    rounds = {"rounds": arguments.rounds, "seconds": arguments.seconds, "slow_runs": SLOW_RUNS}
    if arguments.smoke:
        rounds = {"rounds": 2, "seconds": 0.0, "slow_runs": dict.fromkeys(SLOW_RUNS, 1)}
    if arguments.slow_runs is not None:
        rounds["slow_runs"] = dict.fromkeys(SLOW_RUNS, arguments.slow_runs)
    hf = shape.build()
    ours = HookedTransformer.from_pretrained_no_processing(
        shape.name, hf_model=hf, device="cpu", verbose=False
    ).eval()
    models = Models(hf, ours, transformer_lens_twin(ours))
    peers = {}
    if models.tl3 is not None:
        peers[TL3] = f"transformer-lens {metadata.version('transformer-lens')}"
    else:
        print(f"{TL3} is left out: it is not installed here", flush=True)
    with contextlib.ExitStack() as stack:
        if arguments.tl4_python is not None:
            jobs = jobs_of(cases, ours.cfg)
            models.tl4 = stack.enter_context(
                transformer_lens_4.started(arguments.tl4_python, hf, jobs, arguments.threads)
            )
            version = models.tl4.about["transformer_lens"]
            if not version.startswith("4.") and not arguments.smoke:
                options.error(f"--tl4-python has transformer-lens {version}, not 4")
            peers[TL4] = f"transformer-lens {version}"
        else:
            print(f"{TL4} is left out: no --tl4-python is given", flush=True)
        record = {"machine": machine("cpu"), "peers": peers, "rows": []}
        record["rows"] = [measure(models, case, **rounds) for case in cases]
    if arguments.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(merged(read_results(), record, [case.name for case in CASES]), indent=1)
        RESULTS.write_text(text + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
