"""Whole models for `python -m benchmarks`: forwards, caches, sweeps, by each family of kernels."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda_cases import BF16, FP32, NAMES, Case, Run, Setting, of_fastlens
from benchmarks.forward import HF, SHAPES, TINY, Shape, is_residual
from benchmarks.peers import loops, stacked
from benchmarks.sweep_cases import CASES, SMOKE_CASES
from benchmarks.sweep_cases import Case as Sweep
from fastlens import HookedTransformer
from fastlens.ops import dispatch
from fastlens.patching import logit_diff, sweep

# Largest |difference of logits| over their range, and of a sweep's values over max(1, |gap|):
# DESIGN section 8's bounds in float32. In 16 bits nothing but eager PyTorch's own error says.
LOGITS, VALUES = 2e-4, 1e-4

LLAMA = Shape(
    "a Llama of 1.1 billion",
    "Llama",
    {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    },
)
FORWARDS = ((SHAPES[0], 1, 1024, FP32), (SHAPES[0], 8, 1024, BF16), (LLAMA, 1, 2048, BF16))
QUICK_FORWARDS = ((TINY[0], 2, 12, FP32), (TINY[1], 1, 16, FP32))
# Places that an analysis of one position keeps.
LAST_POSITIONS = 16


def pair_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """The same random weights in transformers and here."""
    with device:
        hf = shape.build()
    cast(hf, dtype)
    ours = HookedTransformer.from_pretrained_no_processing(
        shape.name, hf_model=hf, device=str(device), dtype=dtype, verbose=False
    )
    return hf, ours.eval()


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Weights only: tables of rotary frequencies stay in float32, as when a model is loaded."""
    for leaf in model.parameters():
        leaf.data = leaf.data.to(dtype)


def every_op() -> list[str]:
    """All that a model may dispatch."""
    return list(dispatch.kernels())


def forward_cases(setting: Setting) -> Iterator[Case]:
    """Logits of a forward, alone and with more and less cached; the logits are what is compared."""
    for shape, batch, n_pos, dtype in QUICK_FORWARDS if setting.is_quick else FORWARDS:
        pair = pair_of(shape, dtype, setting.device)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(pair[0].config.vocab_size, (batch, n_pos), generator=generator)
        yield _forward(shape.name, pair, tokens.to(setting.device), dtype, setting)


def _forward(
    name: str, pair: tuple[Any, Any], tokens: Tensor, dtype: torch.dtype, setting: Setting
) -> Case:
    hf, ours = pair

    def theirs() -> Tensor:
        return hf(tokens).logits

    last = (-min(LAST_POSITIONS, tokens.shape[1]), None)
    ways: dict[str, Run] = {
        "forward": lambda: ours(tokens),
        "residual stream cached": lambda: ours.run_with_cache(tokens, names_filter=is_residual)[0],
        f"its last {LAST_POSITIONS} positions cached": lambda: ours.run_with_cache(
            tokens, names_filter=is_residual, pos_slice=last
        )[0],
        "everything cached": lambda: ours.run_with_cache(tokens)[0],
    }
    contenders: dict[str, Run] = {HF: theirs}
    skipped: dict[str, str] = {}
    for way, run in ways.items():
        served, refused = of_fastlens(every_op(), setting, dtype, run)
        contenders |= {f"{family(who)}, {way}": one for who, one in served.items()}
        skipped |= refused
    batch, n_pos = tokens.shape
    return Case(
        op="model",
        title=f"{name}, {batch} x {n_pos}, {NAMES[dtype]}",
        truth=lambda: in_float64(hf, tokens),
        eager=theirs,
        contenders=contenders,
        skipped=skipped,
        tolerance=LOGITS if dtype == FP32 else 0.0,
    )


def family(label: str) -> str:
    """Kernels of a whole model in a few words: naming each would fill lines."""
    for word, said in (("triton", "Triton"), ("CUDA C++", "csrc/")):
        if word in label:
            return f"fastlens with {said}"
    return "fastlens with torch"


@torch.no_grad()
def in_float64(hf: Any, tokens: Tensor) -> Tensor:
    """The model's logits, its weights widened and narrowed again."""
    dtype = next(hf.parameters()).dtype
    cast(hf, torch.float64)
    try:
        return hf(tokens).logits
    finally:
        # The weights were exact in float64: nothing is lost.
        cast(hf, dtype)


# -- sweeps ----------------------------------------------------------------------------------------

SWEPT = ("resid_pre-minimal", "z-minimal", "resid_pre-64")


def sweep_cases(setting: Setting) -> Iterator[Case]:
    """A patching sweep, and the hooked loops that it replaces."""
    listed = SMOKE_CASES[:4] if setting.is_quick else [c for c in CASES if c.name in SWEPT]
    shape = TINY[0] if setting.is_quick else SHAPES[0]
    pair = pair_of(shape, FP32, setting.device)
    for case in listed:
        yield _sweep(case, pair, setting)


def _sweep(case: Sweep, pair: tuple[Any, Any], setting: Setting) -> Case:
    hf, ours = pair
    clean, corrupted = (tokens.to(setting.device) for tokens in case.prompts(ours))
    answers = case.answers(ours)
    asked = (case.site, clean, corrupted, loops.difference_of(*answers))
    every = case.indices(ours.cfg.n_layers, ours.cfg.n_heads)
    by_stack = stacked.stacks_of(every, case.by, case.stack)

    def swept() -> Tensor:
        metric = logit_diff(*answers)
        options = {"sites": case.site, "by": case.by, "metric": metric}
        found = sweep(ours, clean, corrupted, **options, verify=False, progress=False)
        return found.values.flatten().to(setting.device, FP32)

    contenders, skipped = of_fastlens(every_op(), setting, FP32, swept)
    contenders = {f"{family(who)}, sweep": run for who, run in contenders.items()}
    by_hand: dict[str, Callable[[], Tensor]] = {
        f"hf, {case.stack} stacked by hand": lambda: stacked.hugging_face(hf, *asked, by_stack),
        f"fastlens hooks, {case.stack} stacked": lambda: stacked.fastlens_hooks(
            ours, *asked, by_stack
        ),
    }
    if len(every) <= 200:
        alone = stacked.stacks_of(every, case.by, 1)
        by_hand["fastlens hooks, one forward a site"] = lambda: stacked.fastlens_hooks(
            ours, *asked, alone
        )
    first = next(iter(by_hand.values()))
    with torch.no_grad():
        gap = float(asked[-1](ours(clean)) - asked[-1](ours(corrupted)))
        spread = float(first().abs().max())
    return Case(
        op="sweep",
        title=f"{case.title}, {case.tokens} tokens, {len(every)} sites, fp32",
        truth=lambda: first().double(),
        eager=first,
        contenders={**contenders, **by_hand},
        skipped=skipped,
        tolerance=VALUES * max(1.0, abs(gap)) / spread,
    )
