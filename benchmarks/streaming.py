"""Models larger than memory: peaks of fresh processes, and times of sweeps and loads.

    python benchmarks/streaming.py            measure and print (writes 2 GB to a temporary folder)
    python benchmarks/streaming.py --write    and write the results file and the table of the docs
    python benchmarks/streaming.py --folder F keep the checkpoint there, and use it if it is there
    python benchmarks/streaming.py --smoke    a small model: does the script run?

Resident memory counts mapped pages of files, and is taken over what `import fastlens` (and, for
SmolLM2, its tokenizer) held. Times come from alternating runs in one process, results compared
first, files in the system's page cache. Random weights in Llama's shape, float32, gradients off.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.peers.llama_checkpoint import SMALL, TWO_GIGABYTES, write_llama
from benchmarks.timing import alternating, machine
from fastlens import HookedTransformer
from fastlens.patching import logit_diff, sweep

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "cpu-2-cores" / "streaming.json"
DOCS = ROOT / "docs" / "large-models.md"
BEGIN, END = "<!-- benchmarks/streaming.py: begin -->", "<!-- benchmarks/streaming.py: end -->"
SITE = "blocks.7.hook_resid_post"
TEXTS = (
    "When John and Mary went to the shop, John gave a bottle to",
    "When John and Mary went to the shop, Mary gave a bottle to",
)
SMOLLM2, SMOLLM2_LIMIT, PACKED_BYTES = "smollm2-135m", 350_000_000, 98_000_000

# One process: what it holds after `import fastlens`, then everything else under watch.
PROBE = """
import json, sys, threading, time
import torch
import fastlens
from fastlens import HookedTransformer
from fastlens.memory import resident_bytes
from fastlens.patching import logit_diff, sweep
from fastlens.weights.source import open_source

name, out, options, clean, corrupted, site = json.loads(sys.argv[1])
if isinstance(clean, str):
    options["tokenizer"] = open_source(name).tokenizer()
    options["tokenizer"]("once")
before = peak = resident_bytes()

def watch():
    global peak
    while True:
        peak = max(peak, resident_bytes())
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
torch.set_grad_enabled(False)
model = HookedTransformer.from_pretrained(name, verbose=False, **options)
loaded = resident_bytes() - before
if not isinstance(clean, str):
    clean, corrupted = torch.tensor([clean]), torch.tensor([corrupted])
scores = sweep(model, clean, corrupted, metric=logit_diff(5, 9), progress=False)
_, cache = model.run_with_cache(clean, names_filter=site, return_type=None)
torch.save((scores.values, cache[site]), out)
block = model.streaming.block_bytes[0]
print(json.dumps({"peak": peak - before, "loaded": loaded, "block": block}))
"""


def token_pair(n_pos: int) -> tuple[list[int], list[int]]:
    """Two prompts that differ at the first token."""
    clean = list(range(100, 100 + n_pos))
    return clean, [7, *clean[1:]]


def in_a_process(
    name: str, clean: Any, corrupted: Any, **options: Any
) -> tuple[dict[str, int], tuple[torch.Tensor, torch.Tensor]]:
    """A sweep of resid_pre and a cache of one layer: bytes taken, and the results."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.pt"
        job = json.dumps([name, str(out), options, clean, corrupted, SITE])
        done = subprocess.run(
            [sys.executable, "-c", PROBE, job],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        if done.returncode:
            raise SystemExit(f"the run of {name} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1]), torch.load(out)


@torch.no_grad()
def in_memory(name: str, clean: Any, corrupted: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of the model in memory."""
    model = HookedTransformer.from_pretrained(name, verbose=False)
    if not isinstance(clean, str):
        clean, corrupted = torch.tensor([clean]), torch.tensor([corrupted])
    scores = sweep(model, clean, corrupted, metric=logit_diff(5, 9), progress=False)
    _, cache = model.run_with_cache(clean, names_filter=SITE, return_type=None)
    return scores.values, cache[SITE]


def check_equal(want: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> None:
    """Stops where results differ by more than rounding does.

    Within a limit a sweep is cut into other chunks, and products of other sizes round otherwise.
    """
    for a, b in zip(want, found, strict=True):
        difference = float((a - b).abs().max())
        if not difference <= 1e-5 * max(1.0, float(a.abs().max())):
            raise SystemExit(f"streamed results differ by {difference:.1e}.")


def peaks(folder: Path, weights: int, n_pos: int) -> dict[str, Any]:
    """Memory of a model within a third of its weights, and of SmolLM2 from its packed file."""
    clean, corrupted = token_pair(n_pos)
    limit = weights // 3
    found, results = in_a_process(str(folder), clean, corrupted, max_memory=limit)
    check_equal(in_memory(str(folder), clean, corrupted), results)
    record: dict[str, Any] = {"llama": {**found, "limit": limit, "weights": weights}}
    want = in_memory(SMOLLM2, *TEXTS)
    for offload in ("disk", "cpu"):
        options = {"offload": offload, "max_memory": SMOLLM2_LIMIT}
        found, results = in_a_process(SMOLLM2, *TEXTS, **options)
        check_equal(want, results)
        record[offload] = {**found, "limit": SMOLLM2_LIMIT}
    return record


@torch.no_grad()
def sweep_times(folder: Path, limit: int, n_pos: int, rounds: int) -> dict[str, Any]:
    """A sweep of resid_pre, in memory and streamed."""
    clean, corrupted = (torch.tensor([tokens]) for tokens in token_pair(n_pos))
    models = {
        "in memory": HookedTransformer.from_pretrained(str(folder), verbose=False),
        "streamed": HookedTransformer.from_pretrained(str(folder), verbose=False, max_memory=limit),
    }

    def run(name: str) -> torch.Tensor:
        metric = logit_diff(5, 9)
        return sweep(models[name], clean, corrupted, metric=metric, progress=False).values

    check_equal([run("in memory")], [run("streamed")])
    contenders = {name: (lambda name=name: run(name)) for name in models}
    contenders["in memory again"] = contenders["in memory"]
    times = alternating(contenders, seconds=1, min_rounds=rounds, max_rounds=rounds, warm_ups=0)
    return {name: timing.record() for name, timing in times.items()}


def load_times(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds to load a folder; Hugging Face maps the files and reads no weights yet."""
    import transformers

    def theirs(reads: bool) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if reads:
            for parameter in model.parameters():
                parameter.detach().clone()

    def ours(**options: Any) -> None:
        HookedTransformer.from_pretrained(str(folder), verbose=False, **options)

    names = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    contenders = {
        "fastlens": ours,
        "fastlens, weights as they are": lambda: ours(**dict.fromkeys(names, False)),
        "fastlens, streamed": lambda: ours(offload="disk"),
        "Hugging Face": lambda: theirs(False),
        "Hugging Face, every weight read": lambda: theirs(True),
    }
    times = alternating(contenders, seconds=1, min_rounds=rounds, max_rounds=rounds, warm_ups=1)
    return {name: timing.record() for name, timing in times.items()}


def measure(folder: Path, is_smoke: bool) -> dict[str, Any]:
    """Everything."""
    weights = write_llama(folder, SMALL if is_smoke else TWO_GIGABYTES)
    record: dict[str, Any] = {"machine": machine("cpu"), "n_pos": 8 if is_smoke else 24}
    if not is_smoke:
        record["peaks"] = peaks(folder, weights, record["n_pos"])
    limit = weights // (2 if is_smoke else 3)
    rounds = 1 if is_smoke else 3
    record["sweep"] = sweep_times(folder, limit, record["n_pos"], rounds)
    record["load"] = load_times(folder, rounds)
    return record


def table(record: dict[str, Any]) -> str:
    """The docs' lines."""
    llama, seconds, load = record["peaks"]["llama"], record["sweep"], record["load"]
    ratio = seconds["streamed"]["median"] / seconds["in memory"]["median"]
    noise = seconds["in memory again"]["median"] / seconds["in memory"]["median"]
    lines = [
        "| | allowed | taken at most |",
        "|---|---|---|",
        f"| {llama['weights'] / 1e9:.1f} GB of float32 weights, `max_memory` a third of them: a "
        f"sweep of `resid_pre`, {record['n_pos']} tokens, and one layer's cache | "
        f"{llama['limit'] / 1e6:,.0f} MB | {llama['peak'] / 1e6:,.0f} MB |",
    ]
    for offload in ("disk", "cpu"):
        one = record["peaks"][offload]
        lines.append(
            f'| SmolLM2-135M from its packed GGUF file, `offload="{offload}"`: the same (after the '
            f"load {one['loaded'] / 1e6:,.0f} MB) | {one['limit'] / 1e6:,.0f} MB | "
            f"{one['peak'] / 1e6:,.0f} MB |"
        )
    lines += [
        "",
        f"The streamed sweep of the 2 GB model takes {ratio:.2f} x the time of the sweep in memory "
        f"(that again: {noise:.2f} x), files in the page cache. Loading it takes "
        + ", ".join(f"{one['median']:.2f} s ({name})" for name, one in load.items())
        + f". {record['machine']['threads']} threads, {record['machine']['name']}, torch "
        f"{record['machine']['torch']}.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        record = measure(args.folder or Path(temporary) / "llama", args.smoke)
    if args.smoke:
        print(json.dumps(record, indent=1))
        return
    print(table(record))
    if args.write:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        text = DOCS.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCS.write_text(f"{before}{BEGIN}\n{table(record)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
