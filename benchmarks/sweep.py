"""Patching sweeps of a GPT-2-small shape: fastlens' wave against what users run today.

    python benchmarks/sweep.py               measure and print
    python benchmarks/sweep.py --write       and write the results file
    python benchmarks/sweep.py --readme      rewrite README's table from the results file
    python benchmarks/sweep.py --smoke       a tiny model, two rounds: does the script run?
    python benchmarks/sweep.py --only NAME   one sweep (may be given more than once)
    --tl4-python PATH                        the interpreter of an environment with transformer-lens 4

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
from benchmarks.timing import Timing, alternating, machine
from fastlens import HookedTransformer
from fastlens.patching import get_act_patch, logit_diff, plan, sweep
from fastlens.patching.plan import KEYS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "cpu-2-cores" / "sweep.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks/sweep.py: begin -->", "<!-- benchmarks/sweep.py: end -->"
# Largest |difference of a value|: so many times max(1, |gap|), DESIGN section 8's bound, and never
# more than this part of the values' range, or a contender that patches nothing might pass.
TOLERANCE, TOLERANCE_OF_RANGE = 1e-4, 1e-2

OURS, AGAIN, VERIFIED = "fastlens", "fastlens again", "fastlens verified"
FUNCTION, PLANNING = "fastlens get_act_patch", "fastlens planning"
ALONE, BY_HAND = "fastlens, one forward per site", "fastlens, stacked by hand"
HF, HF_FORWARD = "hf stacked by hand", "hf one forward"
TL3, TL4 = "transformer_lens 3.9", "transformer_lens 4"
# Timed runs of the slow ones; every one has run once before, when values were compared.
SLOW_RUNS = {HF: 4, BY_HAND: 3, ALONE: 1, TL3: 2, TL4: 2}
# DESIGN section 9, of the machine that the targets were set on.
REFERENCE_FORWARD, REFERENCE_RATE = 0.060, 204e9
EXPLAIN_BEYOND = 1.15
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
    """Most rows of any layer of a plan."""
    return int((planned.counts + planned.base_counts())[:, KEYS].max())


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


# -- what the measurements say ---------------------------------------------------------------------


def seconds_of(row: dict, name: str) -> float | None:
    """Median seconds for all sites, or None where it was not timed."""
    if name not in row["seconds"]:
        return None
    return row["seconds"][name]["median"] * row["scale"].get(name, 1.0)


def ratio(row: dict, name: str, to: str = OURS) -> float | None:
    """Median over median, or None where one was not timed."""
    one, other = seconds_of(row, name), seconds_of(row, to)
    return None if one is None or other is None else one / other


def rate(row: dict) -> float:
    """The machine's fp32 matrix rate in this run, FLOP/s: the best of the wave's shapes."""
    return max(row["flops_per_second"].values())


def ideal(row: dict) -> float:
    """Seconds that the plan's FLOPs take at the matrix rate."""
    return row["plan"]["flops"] / rate(row)


def machine_factors(row: dict) -> tuple[float, float]:
    """How much slower this machine is than DESIGN section 9's: a forward, and matrix products."""
    return row["seconds"][HF_FORWARD]["median"] / REFERENCE_FORWARD, REFERENCE_RATE / rate(row)


def slower_baselines(row: dict) -> list[str]:
    """A sentence for every baseline that took much longer than DESIGN section 9 says."""
    forward, multiply = machine_factors(row)
    found = []
    for name, reference in row["reference"].items():
        seconds = seconds_of(row, name)
        if seconds is None or seconds <= EXPLAIN_BEYOND * reference:
            continue
        factor = seconds / reference
        explained = factor <= EXPLAIN_BEYOND * max(forward, multiply)
        found.append(
            f"{name} takes {seconds:.3g} s, {factor:.2f} x the {reference:.3g} s of DESIGN "
            f"section 9; on this machine a Hugging Face forward of 16 tokens takes {forward:.2f} x "
            f"and matrix products {multiply:.2f} x as long"
            + ("" if explained else ", which does NOT explain it")
        )
    return found


def described(row: dict) -> list[str]:
    """One row as lines of text: first what puts its ratios in doubt."""
    ours = seconds_of(row, OURS)
    lines = [
        f"{row['name']}: {row['sites']} sites, {row['tokens']} tokens, "
        f"first difference at {row['first_difference']}",
        *(f"  note: {sentence}" for sentence in slower_baselines(row)),
        f"  {OURS} {ours:.3f} s; ideal {ideal(row):.3f} s ({row['plan']['flops'] / 1e9:.1f} GFLOP "
        f"at {rate(row) / 1e9:.0f} GFLOP/s), ratio {ours / ideal(row):.2f}",
    ]
    for name in row["seconds"]:
        if name != OURS:
            timing, scale = row["seconds"][name], row["scale"].get(name, 1.0)
            drawn = "" if scale == 1 else f", from 1/{scale:.3g} of the sites"
            lines.append(
                f"  {name} {seconds_of(row, name):.3f} s, {ratio(row, name):.2f} x "
                f"({timing['runs']} {'run' if timing['runs'] == 1 else 'runs'}{drawn})"
            )
    against = ratio(row, TL3, FUNCTION)
    if against is not None:
        lines.append(f"  {TL3} / {FUNCTION} {against:.1f} x")
    return lines


# Whose number of runs is told.
COUNTED = (
    (OURS, "fastlens"),
    (HF, "Hugging Face"),
    (TL3, "TransformerLens 3.9"),
    (TL4, "TransformerLens 4.3"),
)


def table(record: dict | None) -> str:
    """The README's table, from a results file."""
    if record is None:
        return "Not measured yet: `python benchmarks/sweep.py --write` on a quiet machine."
    columns = [
        ("sweep", lambda row: row["title"]),
        ("tokens", lambda row: str(row["tokens"])),
        ("sites", lambda row: f"{row['sites']:,}"),
        ("fastlens", lambda row: _seconds(seconds_of(row, OURS))),
        ("noise: fastlens again", lambda row: _times(row, AGAIN)),
        ("with the default check", lambda row: _times(row, VERIFIED)),
        ("TransformerLens 3.9", lambda row: _times(row, TL3)),
        ("TransformerLens 4.3", lambda row: _times(row, TL4)),
        ("Hugging Face, hooks, stacked", lambda row: _times(row, HF)),
        ("TransformerLens 3.9 / `get_act_patch_*`", lambda row: _times(row, TL3, FUNCTION)),
        ("fastlens / ideal", lambda row: f"{seconds_of(row, OURS) / ideal(row):.2f}"),
    ]
    about = record["machine"]
    drawn = any(scale > 1 for row in record["rows"] for scale in row["scale"].values())
    counts = {
        said: [row["seconds"][name]["runs"] for row in record["rows"] if name in row["seconds"]]
        for name, said in COUNTED
    }
    runs = ", ".join(f"{said} {_range(found)}" for said, found in counts.items() if found)
    factors = [machine_factors(row) for row in record["rows"]]
    forward, multiply = (sorted(f)[len(f) // 2] for f in zip(*factors, strict=True))
    others = " and ".join(record["peers"].values()) or "no other library"
    lines = [
        f"| {' | '.join(title for title, _ in columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(cell(row) for _, cell in columns)} |" for row in record["rows"]),
        "",
        "GPT-2-small shape, random weights, the same in all; float32, batch 1. The other libraries' "
        "columns are multiples of fastlens's time (`patching.sweep(..., verify=False)`), of medians "
        "of alternating runs; values were compared first. TransformerLens runs its own "
        "`get_act_patch_*`, one forward per site; Hugging Face runs 16 sites (12 for `z`) stacked "
        "in the batch by hand, SDPA, last logits only. "
        + ("Of the largest sweep the others ran a random tenth. " if drawn else "")
        + f"Runs of each sweep: {runs}. "
        + "Ideal: the plan's FLOPs at the fp32 matrix rate measured in the same run. "
        f"{about['threads']} threads, {about['name']}, torch {about['torch']}, transformers "
        f"{about['transformers']}, {others}. Against the machine that the targets were set on, a "
        f"Hugging Face forward of 16 tokens took {forward:.2f} x and matrix products "
        f"{multiply:.2f} x as long.",
    ]
    return "\n".join(lines)


def _range(counts: Sequence[int]) -> str:
    few, many = min(counts), max(counts)
    return str(few) if few == many else f"{few} to {many}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} s"


def _times(row: dict, name: str, to: str = OURS) -> str:
    value = ratio(row, name, to)
    if value is None:
        return "-"
    return f"{value:.2f} x" if value < 2 else f"{value:.1f} x" if value < 100 else f"{value:.0f} x"


def read_results(path: Path = RESULTS) -> dict | None:
    """The results file, or None before the first measurement."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def merged(old: dict | None, new: dict) -> dict:
    """A new record, with the old one's rows for sweeps that were not measured again.

    Raises: SystemExit if the old rows are of another machine or other versions.
    """
    names = {row["name"] for row in new["rows"]}
    kept = [] if old is None else [row for row in old["rows"] if row["name"] not in names]
    if (
        kept
        and old is not None
        and (old["machine"], old["peers"]) != (new["machine"], new["peers"])
    ):
        raise SystemExit("the results file is of another machine or versions: measure every sweep")
    order = [case.name for case in CASES]
    rows = sorted(kept + new["rows"], key=lambda row: order.index(row["name"]))
    return {**new, "rows": rows}


def with_table(text: str, record: dict | None) -> str:
    """The text with everything between its two markers replaced by the table."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"the text lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"


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
        text = json.dumps(merged(read_results(), record), indent=1)
        RESULTS.write_text(text + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
