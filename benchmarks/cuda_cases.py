"""The attention ops that `python -m benchmarks` times, and how results are judged before that."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cuda_work
from benchmarks.cuda_kernels import Choice, choices, using
from benchmarks.cuda_work import Work
from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule, visibility

Run = Callable[[], Any]
EAGER, SDPA, FLEX = "eager PyTorch", "SDPA", "FlexAttention"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}


@dataclass
class Case:
    """One op at one size: the truth, and who computes it.

    Attributes:
        truth: In float64, one tensor or several.
        eager: The specification in the case's own dtype, whose error sets the bound.
        contenders: Name -> function that returns what `truth` does. `EAGER` is among them.
        skipped: Who does not take part, and why.
        work: Compulsory operations and bytes.
        is_exact: Nothing but the very bits will do.
        tolerance: Error that is allowed in any case, over the largest number of the truth.
    """

    op: str
    title: str
    truth: Run
    eager: Run
    contenders: dict[str, Run]
    skipped: dict[str, str] = field(default_factory=dict)
    work: Work | None = None
    is_exact: bool = False
    tolerance: float = 0.0

    def judged(self, found: Any, eager: Any, truth: Any) -> tuple[float, float]:
        """The error of a result and what is allowed."""
        error, allowed = judged(found, eager, truth, is_exact=self.is_exact)
        return error, max(allowed, self.tolerance)


@dataclass(frozen=True)
class Setting:
    """Where, and how large: quick cases are tiny."""

    device: torch.device
    is_quick: bool = False


def tensors(found: Any) -> list[Tensor]:
    """A result's tensors, however many it has."""
    return [found] if isinstance(found, Tensor) else list(found)


def judged(found: Any, eager: Any, truth: Any, *, is_exact: bool = False) -> tuple[float, float]:
    """The largest error, and what is allowed: both over the largest number of the truth.

    Twice eager PyTorch's error in the same dtype and one rounding step, as every test of a kernel
    has it (tests/close.py); of the worst tensor if there are several. NaN counts as infinite.
    """
    worst = (0.0, 0.0)
    ratio = -1.0
    for one, plain, want in zip(*map(tensors, (found, eager, truth)), strict=True):
        if one.shape != want.shape or one.dtype != plain.dtype:
            return float("inf"), 0.0
        want = want.double()
        size = float(want.nan_to_num(0.0, 0.0, 0.0).abs().max()) if want.numel() else 0.0
        size = size or 1.0
        error = _difference(one.double(), want) / size
        allowed = 0.0
        if not is_exact:
            step = torch.finfo(plain.dtype).eps if plain.dtype.is_floating_point else 0.0
            allowed = 2 * _difference(plain.double(), want) / size + step
        if error / max(allowed, 1e-300) > ratio:
            ratio, worst = error / max(allowed, 1e-300), (error, allowed)
    return worst


def _difference(found: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0
    same = (found == want) | (found.isnan() & want.isnan())
    difference = (found - want).abs().masked_fill(same, 0.0)
    return float(difference.nan_to_num(torch.inf, torch.inf, torch.inf).max())


def of_fastlens(
    ops: Sequence[str], setting: Setting, dtype: torch.dtype, run: Run
) -> tuple[dict[str, Run], dict[str, str]]:
    """``run`` with each family of kernels that serves these ops there, and who is left out."""
    served, skipped = choices(ops, setting.device, dtype)

    def with_kernels(choice: Choice) -> Run:
        def chosen() -> Any:
            with using(choice, setting.device, dtype):
                return run()

        return chosen

    return {name: with_kernels(choice) for name, choice in served.items()}, skipped


# -- attention -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """An attention layer's sizes and rule.

    Attributes:
        padded: The first example has so many keys of padding in front.
    """

    title: str
    batch: int
    n_queries: int
    n_keys: int
    heads: int
    kv_heads: int
    d_head: int
    window: int | None = None
    soft_cap: float = -1.0
    padded: int = 0

    @property
    def rule(self) -> AttentionRule:
        """As GPT-2 and Llama scale; causal."""
        return AttentionRule(self.d_head**0.5, window=self.window, soft_cap=self.soft_cap)

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.n_keys - self.n_queries

    def inputs(self, setting: Setting, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
        """q, k, v and the key mask."""
        generator = torch.Generator(setting.device).manual_seed(0)

        def drawn(n_pos: int, heads: int) -> Tensor:
            shape = (self.batch, n_pos, heads, self.d_head)
            return torch.randn(shape, generator=generator, device=setting.device).to(dtype)

        keys = (self.n_keys, self.kv_heads)
        qkv = [drawn(self.n_queries, self.heads), drawn(*keys), drawn(*keys)]
        if not self.padded:
            return qkv, None
        mask = torch.ones(self.batch, self.n_keys, dtype=torch.bool, device=setting.device)
        mask[0, : self.padded] = False
        return qkv, mask

    def work(self, dtype: torch.dtype) -> Work:
        """By formula; padding is counted as if it were not."""
        sizes = (self.n_queries, self.n_keys, self.heads, self.kv_heads, self.d_head)
        rest = {"window": self.window, "is_capped": self.soft_cap > 0}
        return cuda_work.attention(self.batch, *sizes, dtype.itemsize, **rest)


GPT2, LLAMA = "GPT-2 small", "Llama-7B"
ATTENTION = (
    (Heads(f"{GPT2}, 1 x 1024", 1, 1024, 1024, 12, 12, 64), (FP32, BF16, FP16)),
    (Heads(f"{GPT2}, 16 x 128", 16, 128, 128, 12, 12, 64), (BF16,)),
    (Heads(f"{GPT2}, 4 x 512, left padding", 4, 512, 512, 12, 12, 64, padded=200), (BF16,)),
    (Heads(f"{LLAMA}, 1 x 4096", 1, 4096, 4096, 32, 32, 128), (FP32, BF16)),
    (Heads("Llama-3-8B, 1 x 4096", 1, 4096, 4096, 32, 8, 128), (BF16,)),
    (Heads("Gemma-2-2B, 1 x 4096", 1, 4096, 4096, 8, 4, 256, 2048, 50.0), (BF16,)),
    (Heads(f"{LLAMA}, 1 query on 4096 keys", 1, 1, 4096, 32, 32, 128), (BF16,)),
)
QUICK_ATTENTION = (
    (Heads("tiny, 2 x 63", 2, 63, 63, 4, 4, 16), (FP32, BF16)),
    (Heads("tiny, padded", 2, 33, 33, 4, 2, 16, padded=7), (FP32,)),
    (Heads("tiny, window and cap", 1, 40, 40, 4, 2, 32, 9, 5.0), (FP32,)),
    (Heads("tiny, 1 query on 65 keys", 1, 1, 65, 4, 4, 16), (FP32,)),
)


def in_groups(spec: Callable[..., Tensor], q: Tensor, *kv: Tensor) -> Tensor:
    """The specification one KV head at a time, in float64: the scores of all would not fit."""
    n_kv = kv[0].shape[2]
    queries = q.chunk(n_kv, 2)
    parts = [
        spec(queries[h].double(), *(x[:, :, h : h + 1].double() for x in kv)) for h in range(n_kv)
    ]
    return torch.cat(parts, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: Heads, key_mask: Tensor | None) -> Run | str:
    """PyTorch's own, with the mask ready made where it needs one; or why it cannot."""
    rule = heads.rule
    if rule.soft_cap > 0:
        return "it has no soft cap"
    is_plain = key_mask is None and rule.window is None and heads.offset == 0
    sees_all = heads.n_queries == 1 and key_mask is None and rule.window is None
    mask = None
    if not is_plain and not sees_all:
        order = torch.arange(heads.n_keys, device=q.device)
        mask = visibility(rule, order[heads.offset :], order, key_mask)
        assert mask is not None
        # A row that sees nothing would be NaN: it may see itself, and is zeroed.
        blind = ~mask.any(-1, keepdim=True)
        mask = mask | blind

    def run() -> Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        causal = is_plain and not sees_all
        grouped = q.shape[2] != k.shape[2]
        out = F.scaled_dot_product_attention(
            *turned, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        ).transpose(1, 2)
        return out if mask is None else out.masked_fill(blind.transpose(1, 2), 0.0)

    return run


def flex(q: Tensor, k: Tensor, v: Tensor, heads: Heads, key_mask: Tensor | None) -> Run | str:
    """FlexAttention with the rule as its mask and score functions, compiled on CUDA."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rule, offset = heads.rule, heads.offset

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        seen = key <= row + offset
        if rule.window is not None:
            seen = seen & (key > row + offset - rule.window)
        return seen if key_mask is None else seen & key_mask[b, key]

    def capped(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return rule.soft_cap * torch.tanh(score / rule.soft_cap)

    is_cuda = q.device.type == "cuda"
    if is_cuda:
        # Of one function the compiler keeps a few sizes only, and runs further ones uncompiled.
        torch._dynamo.reset()
    batch = None if key_mask is None else len(q)
    sizes = (heads.n_queries, heads.n_keys)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blocks = create_block_mask(sees, batch, None, *sizes, device=q.device)
    call = torch.compile(flex_attention, dynamic=False) if is_cuda else flex_attention
    score_mod = capped if rule.soft_cap > 0 else None

    def run() -> Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        with warnings.catch_warnings():
            # On a CPU it is not compiled, and says so.
            warnings.simplefilter("ignore")
            out = call(*turned, score_mod, blocks, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)

    return run


def _added(case: Case, name: str, made: Run | str) -> None:
    if isinstance(made, str):
        case.skipped[name] = made
    else:
        case.contenders[name] = made


def attention_cases(setting: Setting) -> Iterator[Case]:
    """Fused attention without the pattern."""
    for heads, dtypes in QUICK_ATTENTION if setting.is_quick else ATTENTION:
        for dtype in dtypes:
            yield _attention(heads, dtype, setting)


def _attention(heads: Heads, dtype: torch.dtype, setting: Setting) -> Case:
    from fastlens.ops.attention import attention

    (q, k, v), mask = heads.inputs(setting, dtype)
    given = (heads.rule, heads.offset, mask)

    def spec(*inputs: Tensor) -> Tensor:
        return reference.attention(*inputs, *given)

    ours, skipped = of_fastlens(["attention"], setting, dtype, lambda: attention(q, k, v, *given))
    case = Case(
        op="attention",
        title=f"{heads.title}, {NAMES[dtype]}",
        truth=lambda: in_groups(spec, q, k, v),
        eager=lambda: spec(q, k, v),
        contenders={**ours, EAGER: lambda: spec(q, k, v)},
        skipped=skipped,
        work=heads.work(dtype),
    )
    for name, make in ((SDPA, sdpa), (FLEX, flex)):
        made = make(q, k, v, heads, mask)
        if isinstance(made, str):
            case.skipped[name] = made
        else:
            case.contenders[name] = made
    return case


def several(setting: Setting) -> Iterator[tuple[Heads, torch.dtype]]:
    """Sizes at which patterns are asked for."""
    for heads, dtypes in QUICK_ATTENTION[:2] if setting.is_quick else (ATTENTION[0], ATTENTION[3]):
        for dtype in dtypes:
            yield heads, dtype


# Whose pattern is kept.
KEPT_HEAD = 1


def pattern_cases(setting: Setting) -> Iterator[Case]:
    """Attention, and the whole pattern of one head beside it."""
    for heads, dtype in several(setting):
        yield _pattern(heads, dtype, setting)


def _pattern(heads: Heads, dtype: torch.dtype, setting: Setting) -> Case:
    from fastlens.ops.attention import attention_with_lse
    from fastlens.ops.attention_pattern import attention_pattern

    (q, k, v), mask = heads.inputs(setting, dtype)
    given = (heads.rule, heads.offset, mask)
    kv_head = KEPT_HEAD // (heads.heads // heads.kv_heads)

    def kept(q: Tensor, k: Tensor) -> Tensor:
        one = q[:, :, KEPT_HEAD : KEPT_HEAD + 1], k[:, :, kv_head : kv_head + 1]
        return reference.pattern_of(reference.attention_scores(*one, *given))

    def fused() -> tuple[Tensor, Tensor]:
        z, lse = attention_with_lse(q, k, v, *given)
        rest = (heads.rule, [KEPT_HEAD], None, heads.offset, mask)
        return z, attention_pattern(q, k, *rest, lse=lse)

    def eager() -> tuple[Tensor, Tensor]:
        """As a hooked model does it: every head's pattern, of which one is kept."""
        pattern = reference.pattern_of(reference.attention_scores(q, k, *given))
        z = reference.attention_with_pattern(pattern, v)
        return z, pattern[:, KEPT_HEAD : KEPT_HEAD + 1].clone()

    def truth() -> tuple[Tensor, Tensor]:
        z = in_groups(lambda *inputs: reference.attention(*inputs, *given), q, k, v)
        return z, kept(q.double(), k.double())

    ops = ["attention_lse", "attention_pattern"]
    ours, skipped = of_fastlens(ops, setting, dtype, fused)
    plain = sdpa(q, k, v, heads, mask)
    if not isinstance(plain, str):
        ours[f"{SDPA}, then that head"] = lambda: (plain(), kept(q, k))
    return Case(
        op="attention + pattern",
        title=f"{heads.title}, 1 head's pattern, {NAMES[dtype]}",
        truth=truth,
        eager=eager,
        contenders={**ours, EAGER: eager},
        skipped=skipped,
    )


def summary_cases(setting: Setting) -> Iterator[Case]:
    """Entropy and mass on the previous token of every head, without the pattern."""
    for heads, dtype in several(setting):
        yield _summary(heads, dtype, setting)


def _summary(heads: Heads, dtype: torch.dtype, setting: Setting) -> Case:
    from fastlens.ops.attention_summary import attention_summary

    (q, k, _), mask = heads.inputs(setting, dtype)
    given = (heads.rule, heads.offset, mask)
    size = heads.heads // heads.kv_heads

    def summed() -> tuple[Tensor, Tensor]:
        rest = {"offset": heads.offset, "key_mask": mask}
        found = attention_summary(q, k, heads.rule, offsets=(1,), **rest)
        return found.entropy, found.offset_mass[0]

    def by_pattern(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        pattern = reference.pattern_of(reference.attention_scores(x, y, *given))
        entropy = -torch.special.xlogy(pattern, pattern).sum(-1)
        mass = torch.zeros_like(entropy)
        before = pattern.diagonal(heads.offset - 1, -2, -1)
        mass[..., mass.shape[-1] - before.shape[-1] :] = before
        return entropy, mass

    def truth() -> tuple[Tensor, ...]:
        def one(h: int) -> tuple[Tensor, Tensor]:
            key = h // size
            return by_pattern(q[:, :, h : h + 1].double(), k[:, :, key : key + 1].double())

        parts = [one(h) for h in range(heads.heads)]
        return tuple(torch.cat(group, 1) for group in zip(*parts, strict=True))

    def eager() -> tuple[Tensor, Tensor]:
        """In float32, as the op's results are."""
        return by_pattern(q.float(), k.float())

    ours, skipped = of_fastlens(["attention_summary"], setting, dtype, summed)
    sizes = (heads.n_keys, heads.heads, heads.kv_heads, heads.d_head, dtype.itemsize)
    return Case(
        op="attention_summary",
        title=f"{heads.title}, entropy and previous token, {NAMES[dtype]}",
        truth=truth,
        eager=eager,
        contenders={**ours, f"{EAGER} in fp32, every pattern": eager},
        skipped=skipped,
        work=cuda_work.attention_summary(heads.batch, *sizes, 1),
    )
