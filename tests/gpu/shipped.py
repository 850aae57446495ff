"""Every configuration that the launchers can ask for, as a call that asks for it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastlens.kernels.masks import AttentionRule
from tests.gpu.judged import padding

# The leanest kernel and the one with every switch on.
RULES = {
    "causal": AttentionRule(8.0),
    "everything": AttentionRule(8.0, window=64, soft_cap=30.0, alibi=True),
}
D_HEADS = (16, 32, 64, 80, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NORM_SIZES = (64, 768, 4096, 12288, 16384)


def attention(d_head: int, dtype: torch.dtype, rule: str) -> Callable[[], Any]:
    """A launch of fused attention, with a key mask if every other switch is on."""

    def call() -> Any:
        from fastlens.kernels.triton_attention import attention_with_lse

        q = torch.randn(2, 130, 4, d_head).to(dtype)
        k = torch.randn(2, 130, 2, d_head).to(dtype)
        mask = padding(130) if rule == "everything" else None
        return attention_with_lse(q, k, k, RULES[rule], 0, mask)

    return call


def others() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The kernels without matrix products."""
    from fastlens.kernels import triton_attention, triton_layer_norm, triton_rotary

    for d_head in (16, 80, 256):
        q = torch.randn(2, 130, 4, d_head).bfloat16()
        sites, lse = torch.zeros(3, 3, dtype=torch.int64), torch.zeros(2, 4, 130)
        for name, rule in RULES.items():
            yield (
                f"pattern_rows {d_head} {name}",
                lambda q=q, lse=lse, sites=sites, rule=rule: triton_attention.pattern_rows(
                    q, q, lse, sites, rule, 0, padding(130)
                ),
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
