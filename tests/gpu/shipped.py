"""Every configuration that the launchers can ask for, as a call that asks for it."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastlens.kernels.masks import AttentionRule, KeyGroup
from fastlens.kernels.spans import Span
from tests.gpu.judged import padding

# The leanest kernel and the one with every switch on.
RULES = {
    "causal": AttentionRule(8.0),
    "everything": AttentionRule(8.0, window=128, soft_cap=30.0, alibi=True),
}
D_HEADS = (16, 32, 64, 80, 128, 256)
MATRIX_D_HEADS = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# One for each number of bytes in the tables of blocks.
ROW_DTYPES = (torch.bfloat16, torch.float32)
NORM_SIZES = (64, 768, 4096, 12288, 16384)


def attention(
    d_head: int, dtype: torch.dtype, rule: str, *, is_biased: bool = False
) -> Callable[[], Any]:
    """A launch of fused attention, with a key mask if every other switch is on."""

    def call() -> Any:
        from fastlens.kernels.triton_attention_lse import attention_lse

        q, k, mask, bias = _attention_inputs(d_head, dtype, rule)
        return attention_lse(q, k, k, RULES[rule], 0, mask, bias if is_biased else None)

    return call


def summary(d_head: int, dtype: torch.dtype, rule: str) -> Callable[[], Any]:
    """Launches of the pattern's summary: of entropy alone, or of all it can sum over."""

    def call() -> Any:
        from fastlens.kernels.triton_attention_summary import attention_summary

        q, k, mask, bias = _attention_inputs(d_head, dtype, rule)
        if rule == "causal":
            return attention_summary(q, k, RULES[rule])
        labels = torch.zeros(2, 130, dtype=torch.int64)
        # One group more than a launch takes, so that one with and one without lse is made.
        groups = [KeyGroup(labels, labels, strict) for strict in (True, False, True)]
        return attention_summary(q, k, RULES[rule], (3, 0), (0, 1), groups, 0, mask, bias)

    return call


def suffix_attention(d_head: int, dtype: torch.dtype, rule: str, n_rows: int) -> Callable[[], Any]:
    """Launches over a shared prefix and own keys, of branches that want so many rows each."""

    def call() -> Any:
        from fastlens.kernels.triton_suffix_attention import suffix_attention as launcher

        n_branches, n_pos = 40, 130
        start = n_pos - n_rows
        table = torch.arange(start).repeat(n_branches, 1)
        own = torch.arange(start, start + n_branches * n_rows).view(n_branches, n_rows)
        table = torch.cat([table, own], 1)
        q, k = (torch.randn(int(table.max()) + 1, heads, d_head).to(dtype) for heads in (4, 2))
        mask = torch.ones(n_branches, n_pos, dtype=torch.bool) if rule == "everything" else None
        spans = [Span(torch.arange(n_branches), start, n_pos)]
        return launcher(q, k, k, table, spans, RULES[rule], mask)

    return call


def biased() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Fused attention with a bias, of each row of its tables of blocks."""
    for d_head, dtype, rule in itertools.product(MATRIX_D_HEADS, ROW_DTYPES, RULES):
        call = attention(d_head, dtype, rule, is_biased=True)
        yield f"attention with bias {d_head} {dtype} {rule}", call


def summaries() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Of each row of the summary's table of blocks."""
    for d_head, dtype, rule in itertools.product(MATRIX_D_HEADS, ROW_DTYPES, RULES):
        yield f"summary {d_head} {dtype} {rule}", summary(d_head, dtype, rule)
    yield "summary 80 float16", summary(80, torch.float16, "everything")


def suffix() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Of each row of the suffix kernel's tables of blocks, with many rows and with one."""
    crossed = itertools.product(MATRIX_D_HEADS, ROW_DTYPES, RULES, (17, 1))
    for d_head, dtype, rule, n_rows in crossed:
        call = suffix_attention(d_head, dtype, rule, n_rows)
        yield f"suffix {d_head} {dtype} {rule} {n_rows} rows", call
    yield "suffix 80 float16", suffix_attention(80, torch.float16, "everything", 17)


def _attention_inputs(
    d_head: int, dtype: torch.dtype, rule: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """q, k, a key mask where every other switch is on, and a bias of each head."""
    q = torch.randn(2, 130, 4, d_head).to(dtype)
    k = torch.randn(2, 130, 2, d_head).to(dtype)
    mask = padding(130) if rule == "everything" else None
    return q, k, mask, torch.randn(2, 4, 130, 130).to(dtype)


def others() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The kernels without matrix products."""
    from fastlens.kernels import triton_layer_norm, triton_rotary
    from fastlens.kernels.triton_attention_pattern_rows import attention_pattern_rows

    for d_head in (16, 80, 256):
        q = torch.randn(2, 130, 4, d_head).bfloat16()
        bias = torch.randn(2, 1, 130, 130).bfloat16()
        sites, lse = torch.zeros(3, 3, dtype=torch.int64), torch.zeros(2, 4, 130)
        for name, rule in RULES.items():
            given = q, q, rule, sites, 0, padding(130)
            yield (
                f"pattern_rows {d_head} {name}",
                lambda given=given, lse=lse, b=bias: attention_pattern_rows(*given, lse, bias=b),
            )
            yield (
                f"pattern_rows {d_head} {name} without lse",
                lambda given=given: attention_pattern_rows(*given),
            )
    for d in NORM_SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            x, w = torch.randn(3, d).to(dtype), torch.randn(d).to(dtype)
            yield (
                f"layer_norm {d} {dtype}",
                lambda x=x, w=w: triton_layer_norm.layer_norm_with_scale(x, w, w, 1e-5),
            )
            yield (
                f"rms_norm {d} {dtype}",
                lambda x=x, w=w: triton_layer_norm.rms_norm_with_scale(x, w, 1e-5),
            )
    for d_head, rotary_dim in ((64, 64), (80, 32), (256, 256)):
        x, table = torch.randn(2, 5, 12, d_head).bfloat16(), torch.randn(1, 5, rotary_dim)
        for adjacent_pairs in (True, False):
            yield (
                f"rotary {d_head} {rotary_dim} {adjacent_pairs}",
                lambda x=x, t=table, a=adjacent_pairs: triton_rotary.rotary(x, t, t, a),
            )
