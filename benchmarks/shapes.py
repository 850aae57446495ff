"""Whether the wave is as fast as its plan says on other shapes than GPT-2's.

    python benchmarks/shapes.py            measure and print
    python benchmarks/shapes.py --smoke    tiny models, one round: does the script run?
    python benchmarks/shapes.py --only NAME

Sweeps of `resid_pre`, layer x position, of models with random weights: Llama with grouped heads,
GPT-NeoX with parallel blocks, Gemma 2 with norms before and after, windows and soft-caps. The peer
is transformers with forward hooks, the last position's logits only, 16 or 32 sites stacked in the
batch, whichever is faster. Values are compared first.

The last column is (times faster than the peer) / (times less work, as `explain()` predicts it):
1 means that the wave's floating-point operations are as fast as the peer's.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.peers import loops, stacked
from benchmarks.sweep import TOLERANCE
from benchmarks.sweep_cases import Case
from benchmarks.timing import alternating
from fastlens import HookedTransformer
from fastlens.patching import logit_diff, plan, sweep

COMMON = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
}
SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama, 12 heads in 4 groups": (
        "LlamaConfig",
        {**COMMON, "vocab_size": 32000, "intermediate_size": 2048, "num_key_value_heads": 4},
    ),
    "GPT-NeoX, parallel blocks": (
        "GPTNeoXConfig", {**COMMON, "vocab_size": 50304, "intermediate_size": 3072},
    ),
    "Gemma 2, post-norms and windows": (
        "Gemma2Config",
        {**COMMON, "vocab_size": 32000, "intermediate_size": 2304, "num_key_value_heads": 4,
         "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8},
    ),
}  # fmt: skip
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
STACKS = (16, 32)
OURS, AGAIN = "fastlens", "fastlens again"


def models_of(name: str, is_tiny: bool) -> tuple[Any, HookedTransformer]:
    """The same random weights as transformers has them and as fastlens has them."""
    import transformers

    config_class, sizes = SHAPES[name]
    sizes = {**sizes, **(TINY if is_tiny else {})}
    torch.manual_seed(0)
    # transformers' default attention: SDPA, but for Gemma 2, whose soft-caps it cannot do.
    config = getattr(transformers, config_class)(**sizes)
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    ours = HookedTransformer.from_pretrained_no_processing(name, hf_model=hf, verbose=False)
    return hf, ours.eval()


def measure(name: str, *, is_tiny: bool = False, tokens: int = 16, rounds: int = 5) -> dict:
    """One shape: seconds of each contender, the work predicted, and how the two compare."""
    hf, ours = models_of(name, is_tiny)
    case = Case(name, name, "resid_pre", ("layer", "pos"), tokens, 1)
    clean, corrupted = case.prompts(ours)
    answers = case.answers(ours)
    metric, difference = logit_diff(*answers), loops.difference_of(*answers)
    sites = case.indices(ours.cfg.n_layers, ours.cfg.n_heads)

    def wave() -> torch.Tensor:
        found = sweep(
            *(ours, clean, corrupted), sites=case.site, by=case.by, metric=metric,
            verify=False, progress=False,
        )  # fmt: skip
        return found.values.flatten()

    def by_hand(size: int) -> torch.Tensor:
        stacks = stacked.stacks_of(sites, case.by, size)
        return stacked.hugging_face(hf, case.site, clean, corrupted, difference, stacks)

    runs = {OURS: wave, AGAIN: wave}
    runs |= {f"{size} stacked": lambda size=size: by_hand(size) for size in STACKS}
    truth = wave()
    gap = float((truth.max() - truth.min()).abs())
    for peer, run in runs.items():
        worst = float((run() - truth).abs().max())
        if worst > TOLERANCE * max(1.0, gap):
            raise SystemExit(f"{name}: {peer} differs by {worst:.1e}; nothing was timed.")
    query = plan(ours, clean, corrupted, sites=case.site, by=case.by, metric=metric)
    work = query.summary()
    with torch.no_grad():
        timings = alternating(runs, seconds=0.0, min_rounds=rounds, warm_ups=1)
    seconds = {peer: timing.median for peer, timing in timings.items()}
    best = min(seconds[f"{size} stacked"] for size in STACKS)
    predicted = work["flops_one_by_one"] / work["flops"]
    return {
        "name": name,
        "strategy": query.strategy.name,
        "sites": len(sites),
        "seconds": seconds,
        "faster": best / seconds[OURS],
        "less work": predicted,
        "efficiency": best / seconds[OURS] / predicted,
    }


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models, one round")
    parser.add_argument("--only", choices=list(SHAPES), help="this shape")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    small: dict[str, Any] = {"is_tiny": True, "tokens": 6, "rounds": 1} if options.smoke else {}
    rows = []
    for name in [options.only] if options.only else SHAPES:
        row = measure(name, **({"rounds": options.rounds} | small))
        rows.append(row)
        times = ", ".join(f"{peer} {s:.3f} s" for peer, s in row["seconds"].items())
        print(
            f"{name} ({row['sites']} sites, {row['strategy']}): {times}; "
            f"{row['faster']:.2f} x faster, {row['less work']:.2f} x less work: "
            f"{row['efficiency']:.2f}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
