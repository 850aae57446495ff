"""Attention patterns and full caches: what they cost in time and memory, on GPT-2-small's shape.

    python benchmarks/patterns.py            measure and print
    python benchmarks/patterns.py --write    and write the results file
    python benchmarks/patterns.py --time     measure the times alone, the rest from the results file
    python benchmarks/patterns.py --readme   rewrite README's table from the results file
    python benchmarks/patterns.py --smoke    a tiny model: does the script run?

Memory is the process's resident peak over what it held right before (after a run of 8 tokens, which
loads code), each case in a process of its own; what is held, after the C library gave back what it
had free. Both libraries run with MALLOC_MMAP_THRESHOLD_ at 1 MiB, so that holes in the heap do not
count. Random weights, batch 1, float32, gradients off.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.forward import transformer_lens_twin
from benchmarks.timing import alternating, machine
from fastlens import HookedTransformer, HookedTransformerConfig

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "cpu-2-cores" / "patterns.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks/patterns.py: begin -->", "<!-- benchmarks/patterns.py: end -->"
HEAD = 5
FULL = {"n_layers": 12, "d_model": 768, "d_head": 64, "n_heads": 12, "d_vocab": 50257}
TINY = {"n_layers": 2, "d_model": 64, "d_head": 8, "n_heads": 8, "d_vocab": 100}
LENGTHS = {"pattern": 2048, "caches": [1024, 4096], "rows": 8192}
TINY_LENGTHS = {"pattern": 64, "caches": [32, 64], "rows": 256}
CASES = ("fastlens forward", "fastlens", "TransformerLens forward", "TransformerLens")
MB = 1e6
# Tensors of a megabyte and more are mapped one by one: holes in the heap are not counted.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def model_of(sizes: dict[str, int], n_ctx: int) -> HookedTransformer:
    """A model of random weights."""
    cfg = HookedTransformerConfig(
        **sizes, n_ctx=n_ctx, act_fn="gelu_new", normalization_type="LNPre", seed=0
    )
    return HookedTransformer(cfg).eval()


def tokens_of(model: Any, length: int) -> torch.Tensor:
    """One prompt."""
    torch.manual_seed(1)
    return torch.randint(0, model.cfg.d_vocab, (1, length))


def is_pattern(name: str) -> bool:
    """Every layer's pattern."""
    return name.endswith("hook_pattern")


# -- memory: each function below runs in a process of its own --------------------------------------


class Peak:
    """The resident memory of this process, sampled, over what it was at the start."""

    def __enter__(self) -> "Peak":
        give_back()
        self.start = self.highest = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
        self.highest = max(self.highest, resident())
        give_back()
        self.end = resident()

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.highest = max(self.highest, resident())


def give_back() -> None:
    """Let glibc return free memory to the system; elsewhere do nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident() -> int:
    """Bytes of this process in memory."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * 4096


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Growth in MB at the peak, and what is held while the result lives."""
    with torch.no_grad(), Peak() as peak:
        kept = work()
    held = peak.end - peak.start
    del kept
    return {"peak": (peak.highest - peak.start) / MB, "held": held / MB}


def memory_of_pattern(
    sizes: dict[str, int], lengths: dict[str, Any], whose: str
) -> dict[str, float]:
    """One head's pattern in each layer (TransformerLens keeps all heads: it cannot choose)."""
    ours = model_of(sizes, lengths["pattern"])
    tokens = tokens_of(ours, lengths["pattern"])
    model = transformer_lens_twin(ours) if "TransformerLens" in whose else ours
    with torch.no_grad():
        model(tokens[:, :8])
    if whose.endswith("forward"):
        return measured(lambda: model(tokens, return_type=None))
    chosen = {} if model is not ours else {"heads": [HEAD]}
    return measured(
        lambda: model.run_with_cache(tokens, names_filter=is_pattern, return_type=None, **chosen)
    )


def memory_of_cache(
    sizes: dict[str, int], lengths: dict[str, Any], length: int
) -> dict[str, float]:
    """A full cache, beside the logits."""
    model = model_of(sizes, length)
    tokens = tokens_of(model, length)
    with torch.no_grad():
        model(tokens[:, :8])
    found = measured(lambda: model.run_with_cache(tokens))
    logits = length * sizes["d_vocab"] * 4 / MB
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, return_type=None)
    return {**found, "held": found["held"] - logits, "nbytes": cache.nbytes / MB}


def rows_to_disk(sizes: dict[str, int], lengths: dict[str, Any]) -> dict[str, float]:
    """Every head's whole pattern of one layer to a file, 256 rows of one head at a time."""
    length, layer = lengths["rows"], sizes["n_layers"] // 2
    model = model_of({**sizes, "n_layers": layer + 1}, length)
    tokens = tokens_of(model, length)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "pattern.f32"
        with Peak() as capture:
            _, cache = model.run_with_cache(
                tokens, names_filter=f"blocks.{layer}.attn.hook_pattern", return_type=None
            )
        began = time.perf_counter()
        with Peak() as peak, path.open("wb") as file:
            for head in range(sizes["n_heads"]):
                for row in range(0, length, 256):
                    block = cache.pattern_rows(layer, [head], range(row, min(row + 256, length)))
                    file.write(block.numpy().tobytes())
        seconds = time.perf_counter() - began
        size = path.stat().st_size
        expected = sizes["n_heads"] * length * length * 4
        if size != expected:
            raise SystemExit(f"the file has {size} bytes, not {expected}")
    return {
        "capture": (capture.highest - capture.start) / MB,
        "peak": (peak.highest - peak.start) / MB,
        "one_head": length * length * 4 / MB,
        "file": size / MB,
        "seconds": seconds,
    }


def in_a_process(job: list[str], is_smoke: bool) -> dict[str, float]:
    """Run one memory case alone and read what it prints."""
    command = [sys.executable, __file__, "--job", json.dumps(job), *(["--smoke"] * is_smoke)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MAPPED})
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


JOBS: dict[str, Callable[..., dict[str, float]]] = {
    "pattern": memory_of_pattern,
    "cache": memory_of_cache,
    "rows": rows_to_disk,
}


# -- time ------------------------------------------------------------------------------------------


def time_of_pattern(sizes: dict[str, int], lengths: dict[str, Any], **options: Any) -> dict:
    """A forward with one head's pattern captured in each layer, over one without."""
    model = model_of(sizes, lengths["pattern"])
    tokens = tokens_of(model, lengths["pattern"])

    def capture() -> Any:
        return model.run_with_cache(tokens, names_filter=is_pattern, heads=[HEAD])

    with torch.no_grad():
        runs: dict[str, Callable[[], Any]] = {
            "forward": lambda: model(tokens),
            "forward again": lambda: model(tokens),
            "captured": capture,
        }
        difference = pattern_difference(model, tokens, capture()[1])
        if not difference <= 1e-6:
            raise SystemExit(f"the pattern differs from TransformerLens' by {difference:.1e}")
        timings = alternating(runs, **options)
    return {
        "max_difference": difference,
        "seconds": {name: timing.record() for name, timing in timings.items()},
    }


def pattern_difference(model: HookedTransformer, tokens: torch.Tensor, cache: Any) -> float:
    """The largest difference of a captured pattern from TransformerLens' own."""
    theirs = transformer_lens_twin(model)
    if theirs is None:
        raise SystemExit("transformer-lens is not installed: nothing to compare patterns with")
    worst = 0.0

    def read(pattern: torch.Tensor, hook: Any) -> None:
        nonlocal worst
        worst = max(worst, float((pattern[:, HEAD] - cache[hook.name][:, 0]).abs().max()))

    theirs.run_with_hooks(tokens, return_type=None, fwd_hooks=[(is_pattern, read)])
    return worst


def measure(is_smoke: bool, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every figure; those of memory as they were ``before``, if that is given."""
    sizes, lengths = (TINY, TINY_LENGTHS) if is_smoke else (FULL, LENGTHS)
    options = {"seconds": 0.1, "min_rounds": 2} if is_smoke else {"seconds": 60.0, "min_rounds": 9}
    record: dict[str, Any] = {"machine": machine("cpu"), "lengths": lengths}
    record["time"] = time_of_pattern(sizes, lengths, **options)
    if before is not None:
        return {**before, **record}
    record["pattern"] = {whose: in_a_process(["pattern", whose], is_smoke) for whose in CASES}
    record["caches"] = {
        str(length): in_a_process(["cache", str(length)], is_smoke) for length in lengths["caches"]
    }
    record["rows"] = in_a_process(["rows"], is_smoke)
    return record


def table(record: dict[str, Any]) -> str:
    """README's lines."""
    seconds = record["time"]["seconds"]
    ratio = seconds["captured"]["median"] / seconds["forward"]["median"]
    noise = seconds["forward again"]["median"] / seconds["forward"]["median"]
    pattern, rows = record["pattern"], record["rows"]
    length, n = record["lengths"]["pattern"], record["lengths"]["rows"]
    lines = [
        "| on GPT-2 small's shape | fastlens | TransformerLens 3.9 |",
        "|---|---|---|",
        f"| one head's pattern in each layer, 1 x {length}: time over a forward without | "
        f"{ratio:.2f} x (a forward again: {noise:.2f} x) | |",
        f"| the same: peak memory growth | {pattern['fastlens']['peak']:,.0f} MB "
        f"(without capture {pattern['fastlens forward']['peak']:,.0f}) | "
        f"{pattern['TransformerLens']['peak']:,.0f} MB |",
    ]
    stored = {"1024": "1,930 MB", "4096": "21,000 MB"}
    for tokens, cache in record["caches"].items():
        lines.append(
            f"| full `run_with_cache`, 1 x {tokens}: held beside the logits | "
            f"{cache['held']:,.0f} MB | {stored.get(tokens, '')} |"
        )
    lines.append(
        f"| all patterns of one layer at {n:,} tokens to disk ({rows['file']:,.0f} MB): peak "
        f"growth | {rows['peak']:,.0f} MB | |"
    )
    found = record["machine"]
    lines += [
        "",
        f"The patterns differ from TransformerLens' by at most "
        f"{record['time']['max_difference']:.0e}; float32, {found['threads']} threads, "
        f"{found['name']}, torch {found['torch']}.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("--write", "--readme", "--smoke", "--time"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--job")
    args = parser.parse_args(arguments)
    sizes, lengths = (TINY, TINY_LENGTHS) if args.smoke else (FULL, LENGTHS)
    if args.job:
        name, *rest = json.loads(args.job)
        found = JOBS[name](sizes, lengths, *(int(x) if x.isdigit() else x for x in rest))
        print(json.dumps(found))
        return
    before = None
    if args.readme or args.time:
        before = json.loads(RESULTS.read_text(encoding="utf-8"))
    if args.readme and before is not None:
        record = before
    else:
        record = measure(args.smoke, before)
        print(table(record))
    if args.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.write or args.readme:
        text = README.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        README.write_text(f"{before}{BEGIN}\n{table(record)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
