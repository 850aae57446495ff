"""What benchmarks/sweep.py's measurements say: ratios, notes on slow baselines, README's table."""

import json
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "cpu-2-cores" / "sweep.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks/sweep.py: begin -->", "<!-- benchmarks/sweep.py: end -->"

OURS, AGAIN, VERIFIED = "fastlens", "fastlens again", "fastlens verified"
FUNCTION, PLANNING = "fastlens get_act_patch", "fastlens planning"
ALONE, BY_HAND = "fastlens, one forward per site", "fastlens, stacked by hand"
HF, HF_FORWARD = "hf stacked by hand", "hf one forward"
TL3, TL4 = "transformer_lens 3.9", "transformer_lens 4"
NNSIGHT = "nnsight, stacked"
# DESIGN section 9, of the machine that the targets were set on.
REFERENCE_FORWARD, REFERENCE_RATE = 0.060, 204e9
EXPLAIN_BEYOND = 1.15


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
    if not row["reference"]:
        return []
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
    (NNSIGHT, "nnsight"),
)


def table(record: dict | None) -> str:
    """The README's table, from a results file."""
    if record is None:
        return "Not measured yet."
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
        ("nnsight, stacked", lambda row: _times(row, NNSIGHT)),
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
    real = any(HF_FORWARD not in row["seconds"] for row in record["rows"])
    factors = [machine_factors(row) for row in record["rows"] if HF_FORWARD in row["seconds"]]
    others = " and ".join(record["peers"].values()) or "no other library"
    lines = [
        f"| {' | '.join(title for title, _ in columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(cell(row) for _, cell in columns)} |" for row in record["rows"]),
        "",
        "GPT-2-small shape with random weights, the same in all; "
        + ("SmolLM2-135M has its own, and a pair of sentences; " if real else "")
        + "float32, batch 1. Columns in x are "
        "multiples of the time of `patching.sweep(..., verify=False)`, ratios of medians of "
        "alternating runs; values were compared first. TransformerLens runs its own "
        "`get_act_patch_*`, one forward per site; Hugging Face runs 16 sites (12 for `z`) stacked "
        "in the batch by hand, SDPA, last logits only; nnsight as many invokes of one trace. A "
        "generic pair differs from its second token on, a minimal pair from its eleventh on. "
        + ("Of the largest sweep the others ran a random tenth. " if drawn else "")
        + f"Runs of each sweep: {runs}. "
        + "Ideal: the plan's FLOPs at the fp32 matrix rate measured in the same run. "
        f"{about['threads']} threads, {about['name']}, torch {about['torch']}, transformers "
        f"{about['transformers']}, {others}." + _against_reference(factors),
    ]
    return "\n".join(lines)


def _against_reference(factors: Sequence[tuple[float, float]]) -> str:
    if not factors:
        return ""
    forward, multiply = (sorted(f)[len(f) // 2] for f in zip(*factors, strict=True))
    return (
        " Against the machine that the targets were set on, a Hugging Face forward of 16 tokens "
        f"took {forward:.2f} x and matrix products {multiply:.2f} x as long."
    )


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


def merged(old: dict | None, new: dict, order: Sequence[str]) -> dict:
    """A new record, with the old one's rows for sweeps that were not measured again.

    Args:
        order: Names of all sweeps as they stand in the table.

    Raises: SystemExit if the old rows are of another machine or other versions.
    """
    peers = {} if old is None else old["peers"]
    same = peers | new["peers"] == new["peers"] | peers
    names = {row["name"] for row in new["rows"]}
    kept = [] if old is None else [row for row in old["rows"] if row["name"] not in names]
    if kept and old is not None and not (same and old["machine"] == new["machine"]):
        raise SystemExit("the results file is of another machine or versions: measure every sweep")
    rows = sorted(kept + new["rows"], key=lambda row: order.index(row["name"]))
    return {**new, "peers": {**(peers if kept else {}), **new["peers"]}, "rows": rows}


def with_table(text: str, record: dict | None) -> str:
    """The text with everything between its two markers replaced by the table."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"the text lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"
