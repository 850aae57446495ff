"""Inputs of attention that are easy to get wrong, for its reference, kernels and ops."""

from collections.abc import Iterator

import torch

from fastlens.kernels.masks import AttentionRule

RULES = {
    "causal": AttentionRule(3.0),
    "bidirectional": AttentionRule(3.0, causal=False),
    "window": AttentionRule(3.0, window=5),
    "window both ways": AttentionRule(3.0, causal=False, window=4),
    "soft cap": AttentionRule(0.5, soft_cap=2.0),
    "alibi": AttentionRule(3.0, alibi=True),
    "everything": AttentionRule(0.5, window=6, soft_cap=2.0, alibi=True),
}
# Queries, keys, position of the first query, KV heads of 4 query heads.
SIZES = {
    "one": (1, 1, 0, 4),
    "square": (11, 11, 0, 2),
    "continued": (3, 12, 9, 1),
    "unaligned": (7, 12, 2, 2),
    "one of many": (1, 9, 8, 4),
    "beyond the keys": (12, 3, 4, 2),
}
HEADS = 4


def qkv(
    n_queries: int,
    n_keys: int,
    kv_heads: int,
    dtype: torch.dtype = torch.float64,
    d_head: int = 8,
    strides: str = "sliced",
) -> list[torch.Tensor]:
    """q, k and v of two examples: slices at odd offsets, or with positions innermost."""
    shapes = (n_queries, HEADS), (n_keys, kv_heads), (n_keys, kv_heads)
    if strides == "sliced":
        made = [torch.randn(2, n, heads, d_head + 3)[..., 1 : d_head + 1] for n, heads in shapes]
    else:
        made = [torch.randn(2, d_head, heads, n).permute(0, 3, 2, 1) for n, heads in shapes]
    return [x.to(dtype) for x in made]


def padding(n_keys: int) -> torch.Tensor:
    """Left padding in one example, so that its first rows see no key; holes in the other."""
    mask = torch.ones(2, n_keys, dtype=torch.bool)
    mask[0, : (n_keys + 1) // 2] = False
    mask[1, 1::3] = False
    return mask


def biases(n_queries: int, n_keys: int) -> dict[str, torch.Tensor | None]:
    """None, T5's for all examples, a padding mask for all queries, and one with hidden keys."""
    hidden = torch.randn(2, HEADS, n_queries, n_keys, dtype=torch.float64)
    hidden[0, 1, n_queries // 2] = -torch.inf
    hidden[1, :, :, 0] = -torch.inf
    return {
        "none": None,
        "of heads": torch.randn(1, HEADS, n_queries, n_keys, dtype=torch.float64),
        "of keys": torch.randn(2, 1, 1, n_keys, dtype=torch.float64).expand(-1, -1, n_queries, -1),
        "hiding": hidden,
    }


def added(
    n_queries: int, n_keys: int
) -> Iterator[tuple[torch.Tensor | None, str, torch.Tensor | None]]:
    """Key mask, name of the bias, and bias: each alone and some together."""
    mask, every = padding(n_keys), biases(n_queries, n_keys)
    yield None, "none", None
    for name, bias in every.items():
        yield (None if name == "hiding" else mask), name, bias
