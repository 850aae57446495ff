"""Plain forward and `run_with_cache` against Hugging Face's SDPA forward, on identical weights.

    python benchmarks/forward.py             measure and print
    python benchmarks/forward.py --write     and write the results file
    python benchmarks/forward.py --readme    rewrite README's table from the results file
    python benchmarks/forward.py --smoke     tiny models, two rounds: does the script run?

Random weights, batch 1, float32, no processing. Logits are compared first; nothing is timed if they
differ. TransformerLens is timed too where it is installed.
"""

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.cuda_devices import problem_of
from benchmarks.timing import alternating, machine, relative_difference
from fastlens import HookedTransformer

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "cpu-2-cores" / "forward.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks/forward.py: begin -->", "<!-- benchmarks/forward.py: end -->"
TOKENS = (16, 128, 1024)
# Largest |difference of logits| over their range: DESIGN section 8's bound for real models.
TOLERANCE = 2e-4

HF, HF_AGAIN = "hf", "hf again"
OURS, OURS_CACHE = "fastlens", "fastlens cache"
THEIRS, THEIRS_CACHE = "transformer_lens", "transformer_lens cache"


@dataclass(frozen=True)
class Shape:
    """A model's architecture and sizes, as transformers' config takes them."""

    name: str
    architecture: str
    sizes: dict[str, int]

    def build(self) -> Any:
        """A transformers model with random weights and SDPA attention."""
        import transformers

        config = getattr(transformers, f"{self.architecture}Config")(
            **self.sizes, attn_implementation="sdpa", use_cache=False
        )
        torch.manual_seed(0)
        suffix = "LMHeadModel" if self.architecture == "GPT2" else "ForCausalLM"
        return getattr(transformers, f"{self.architecture}{suffix}")(config).eval()


SHAPES = (
    Shape("GPT-2 small", "GPT2", {}),
    Shape(
        "SmolLM2-135M",
        "Llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
        },
    ),
)
TINY = (
    Shape(
        "tiny GPT-2",
        "GPT2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 100,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    Shape(
        "tiny Llama",
        "Llama",
        {
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
    ),
)


def is_residual(name: str) -> bool:
    """Every place of the residual stream: before, within and after each block."""
    return "resid" in name


def transformer_lens_twin(model: HookedTransformer) -> Any:
    """TransformerLens' model with the same config and weights, or None if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import transformer_lens
        except ImportError:
            return None
        known = transformer_lens.HookedTransformerConfig.__dataclass_fields__
        fields = {k: v for k, v in model.cfg.to_dict().items() if k in known}
        cfg = transformer_lens.HookedTransformerConfig(**{**fields, "tokenizer_name": None})
        twin = transformer_lens.HookedTransformer(cfg)
        twin.load_state_dict(model.state_dict(), strict=False)
    return twin.eval()


def contenders(hf: Any, ours: Any, theirs: Any, tokens: torch.Tensor) -> dict[str, Callable]:
    """What is timed: a forward that gives all logits, and one that keeps the residual stream."""
    found: dict[str, Callable] = {
        HF: lambda: hf(tokens).logits,
        HF_AGAIN: lambda: hf(tokens).logits,
        OURS: lambda: ours(tokens),
        OURS_CACHE: lambda: ours.run_with_cache(tokens, names_filter=is_residual),
    }
    if theirs is not None:
        found[THEIRS] = lambda: theirs(tokens)
        found[THEIRS_CACHE] = lambda: theirs.run_with_cache(tokens, names_filter=is_residual)
    return found


def checked_difference(runs: dict[str, Callable]) -> float:
    """The largest relative difference between Hugging Face's logits and any other's.

    Raises: SystemExit if it is beyond the tolerance: then no time would mean anything.
    """
    with torch.no_grad():
        expected = runs[HF]()
        worst = 0.0
        for name, run in runs.items():
            output = run()
            logits = output[0] if isinstance(output, tuple) else output
            difference = relative_difference(logits, expected)
            if not difference <= TOLERANCE:
                raise SystemExit(
                    f"{name} differs from Hugging Face by {difference:.1e} of the range"
                )
            worst = max(worst, difference)
    return worst


def measure(shape: Shape, lengths: Sequence[int], device: str, **options: Any) -> list[dict]:
    """One row for each length, with gradients off and on."""
    hf = shape.build().to(device)
    ours = HookedTransformer.from_pretrained_no_processing(
        shape.name, hf_model=hf, device=device, verbose=False
    ).eval()
    theirs = transformer_lens_twin(ours)
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    rows = []
    for length in lengths:
        tokens = torch.randint(0, hf.config.vocab_size, (1, length), device=device)
        runs = contenders(hf, ours, theirs, tokens)
        difference = checked_difference(runs)
        for grad in (False, True):
            gc.collect()
            with torch.set_grad_enabled(grad):
                timings = alternating(runs, synchronize=synchronize, **options)
            rows.append(
                {
                    "model": shape.name,
                    "tokens": length,
                    "grad": grad,
                    "max_difference": difference,
                    "seconds": {name: timing.record() for name, timing in timings.items()},
                }
            )
            print(described(rows[-1]), flush=True)
    return rows


def ratio(row: dict, name: str, to: str) -> float | None:
    """Median over median, or None where one was not timed."""
    seconds = row["seconds"]
    if name not in seconds or to not in seconds:
        return None
    return seconds[name]["median"] / seconds[to]["median"]


def described(row: dict) -> str:
    """One row as a line of text."""
    pairs = ((OURS, HF), (HF_AGAIN, HF), (OURS_CACHE, OURS), (THEIRS, HF), (THEIRS_CACHE, HF))
    ratios = [(name, to, ratio(row, name, to)) for name, to in pairs]
    text = "  ".join(f"{name}/{to} {value:.3f}" for name, to, value in ratios if value is not None)
    head = f"{row['model']}, {row['tokens']} tokens, grad {'on' if row['grad'] else 'off'}"
    return f"{head}: hf {row['seconds'][HF]['median'] * 1e3:.1f} ms  {text}"


def table(record: dict | None) -> str:
    """The README's table, from a results file."""
    if record is None:
        return "Not measured yet: `python benchmarks/forward.py --write` on a quiet machine."
    columns = [
        ("model", lambda row: row["model"]),
        ("tokens", lambda row: str(row["tokens"])),
        ("grad", lambda row: "on" if row["grad"] else "off"),
        ("Hugging Face, SDPA", lambda row: f"{row['seconds'][HF]['median'] * 1e3:.1f} ms"),
        ("fastlens", lambda row: _times(row, OURS, HF)),
        ("noise: HF again", lambda row: _times(row, HF_AGAIN, HF)),
        ("TransformerLens 3.9", lambda row: _times(row, THEIRS, HF)),
        ("fastlens, residuals cached", lambda row: _times(row, OURS_CACHE, HF)),
        ("TransformerLens, the same", lambda row: _times(row, THEIRS_CACHE, HF)),
    ]
    about = record["machine"]
    lines = [
        f"| {' | '.join(title for title, _ in columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(cell(row) for _, cell in columns)} |" for row in record["rows"]),
        "",
        f"Medians of alternating runs, as multiples of Hugging Face's time on the same random "
        f"weights; float32, batch 1, {about['threads']} threads, {about['name']}, "
        f"torch {about['torch']}, transformers {about['transformers']}.",
    ]
    return "\n".join(lines)


def _times(row: dict, name: str, to: str) -> str:
    value = ratio(row, name, to)
    return "-" if value is None else f"{value:.2f} x"


def read_results(path: Path = RESULTS) -> dict | None:
    """The results file, or None before the first measurement."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def with_table(text: str, record: dict | None) -> str:
    """The text with everything between its two markers replaced by the table."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"the text lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> dict | None:
    """The command line; returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--readme", action="store_true", help="only rewrite README's table")
    parser.add_argument("--smoke", action="store_true", help="tiny models, two rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="per length and grad mode")
    parser.add_argument("--rounds", type=int, default=7, help="at least (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.readme:
        README.write_text(
            with_table(README.read_text(encoding="utf-8"), read_results()), encoding="utf-8"
        )
        return None
    if arguments.smoke and arguments.write:
        parser.error("--smoke measures nothing worth writing")
    if arguments.write and arguments.device != "cpu":
        parser.error("--write is for the CPU's results: `python -m benchmarks` writes a GPU's")
    if (problem := problem_of(arguments.device)) is not None:
        raise SystemExit(problem)
    torch.set_num_threads(arguments.threads)
    shapes, lengths = SHAPES, TOKENS
    options = {"seconds": arguments.seconds, "min_rounds": arguments.rounds}
    if arguments.smoke:
        shapes, lengths, options = TINY, (5, 16), {"seconds": 0.0, "min_rounds": 2, "warm_ups": 1}
    record = {"machine": machine(arguments.device), "rows": []}
    for shape in shapes:
        record["rows"] += measure(shape, lengths, arguments.device, **options)
        gc.collect()
    if arguments.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
