"""What a launcher gives, on inputs that are easy to get wrong, against the specification.

The launcher is called as on a GPU; whoever calls these functions decides what a launch means:
Triton's interpreter, or the compiled PTX.
"""

from collections.abc import Callable

import torch

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from tests.close import assert_close_to, assert_no_worse

RULES = {
    "causal": AttentionRule(3.0),
    "bidirectional": AttentionRule(3.0, causal=False),
    "window": AttentionRule(3.0, window=5),
    "window both ways": AttentionRule(3.0, causal=False, window=40),
    "soft cap": AttentionRule(0.5, soft_cap=2.0),
    "large soft cap": AttentionRule(3.0, soft_cap=50.0),
    "alibi": AttentionRule(3.0, alibi=True),
    "everything": AttentionRule(3.0, window=70, soft_cap=5.0, alibi=True),
}
Place = Callable[[torch.Tensor], torch.Tensor]


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    """No other placement in memory."""
    return tensor


def inputs(
    n_queries: int,
    n_keys: int,
    heads: int,
    kv_heads: int,
    d_head: int,
    dtype: torch.dtype,
    strides: str,
) -> list[torch.Tensor]:
    """q, k and v: whole, slices of one tensor at odd offsets, or with positions innermost."""
    torch.manual_seed(n_queries * 1000 + n_keys * 10 + d_head)
    q = torch.randn(2, n_queries, heads, d_head)
    k, v = torch.randn(2, 2, n_keys, kv_heads, d_head).unbind(0)
    if strides == "sliced":
        return [torch.cat([x, x, x], -1).to(dtype)[..., 1 : d_head + 1] for x in (q, k, v)]
    if strides == "transposed":
        return [x.to(dtype).permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1) for x in (q, k, v)]
    return [x.to(dtype) for x in (q, k, v)]


def padding(n_keys: int) -> torch.Tensor:
    """Left padding in one example, so that its first rows see no key; holes in the other."""
    mask = torch.ones(2, n_keys, dtype=torch.bool)
    mask[0, : n_keys // 2] = False
    mask[1, ::3] = False
    return mask


def check_attention(
    rule: str = "causal",
    dtype: torch.dtype = torch.float32,
    n_queries: int = 5,
    n_keys: int = 5,
    heads: int = 2,
    kv_heads: int = 2,
    d_head: int = 16,
    strides: str = "whole",
    is_padded: bool = False,
    place: Place = as_it_is,
) -> None:
    """Values, log-sum-exp and chosen rows of the pattern and the scores."""
    from fastlens.kernels import triton_attention

    given = [place(x) for x in inputs(n_queries, n_keys, heads, kv_heads, d_head, dtype, strides)]
    mask = place(padding(n_keys)) if is_padded else None
    rest = RULES[rule], max(0, n_keys - n_queries), mask
    before = [x.clone() for x in given]
    z, lse = triton_attention.attention_with_lse(*given, *rest)
    for now, then in zip(given, before, strict=True):
        assert torch.equal(now, then), "an input was written to"
    wide = [x.double() for x in given]
    truth = reference.attention(*wide, *rest)
    assert_no_worse(z, reference.attention(*given, *rest), truth, name=f"{rule} {dtype}")

    q, k = given[:2]
    middle = [0, heads // 2, n_queries // 2]
    sites = torch.tensor([[0, 0, 0], [1, heads - 1, n_queries - 1], middle])
    rows = triton_attention.pattern_rows(q, k, lse, sites, *rest)
    score_rows = triton_attention.pattern_rows(q, k, lse, sites, *rest, scores=True)

    # These are float32 whatever the dtype: so is plain PyTorch's own error that they are held to.
    scores = reference.attention_scores(*wide[:2], *rest)
    eager_scores = reference.attention_scores(q.float(), k.float(), *rest)
    pattern = reference.attention_pattern(scores)
    eager_pattern = reference.attention_pattern(eager_scores)
    chosen = tuple(sites.T)
    # One rounding step of float32 at the size of what is summed, since orders of summation differ.
    summed = reference.attention_scores(
        wide[0].abs(), wide[1].abs(), AttentionRule(RULES[rule].scale, causal=False)
    )
    step = torch.finfo(torch.float32).eps * (1 + float(summed.max()))
    for name, found, eager, true in (
        ("log-sum-exp", lse, eager_scores.logsumexp(-1), scores.logsumexp(-1)),
        ("rows of the pattern", rows, eager_pattern, pattern),
        ("rows of the scores", score_rows, eager_scores, scores),
    ):
        error = (eager - true).abs().nan_to_num(nan=0.0).max()
        expected = true if name == "log-sum-exp" else true[chosen]
        assert_close_to(found, expected, atol=2 * float(error) + step, name=name)


def check_norm(
    op: str = "layer_norm",
    d: int = 31,
    dtype: torch.dtype = torch.float32,
    is_affine: bool = True,
    is_transposed: bool = False,
    place: Place = as_it_is,
) -> None:
    """Values and the scale, on slices, far from zero mean."""
    from fastlens.kernels import triton_layer_norm as launcher

    torch.manual_seed(d)
    big = torch.randn(3, 7, d + 3) * 3 + 1
    x = big[..., 1 : d + 1].to(dtype)
    x = place(x.transpose(0, 1).contiguous().transpose(0, 1) if is_transposed else x)
    w, b = (place(torch.randn(d).to(dtype)) if is_affine else None for _ in range(2))
    factors = (w, b) if op == "layer_norm" else (w,)
    kernel = getattr(launcher, f"{op}_with_scale")
    spec = getattr(reference, op)
    with torch.no_grad():
        out, scale = kernel(x, *factors, 1e-5)
    wide = [None if f is None else f.double() for f in factors]
    truth = spec(x.double(), *wide, 1e-5)
    assert_no_worse(out, spec(x, *factors, 1e-5), truth, name=f"{op} {dtype}")
    mean = x.double().mean(-1, keepdim=True) if op == "layer_norm" else 0.0
    true_scale = ((x.double() - mean).pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close_to(scale, true_scale, atol=0.0, rtol=1e-6, name="scale")


def check_rotary(
    rotary_dim: int = 8,
    d_head: int = 8,
    heads: int = 3,
    dtype: torch.dtype = torch.float32,
    adjacent_pairs: bool = False,
    is_transposed: bool = False,
    place: Place = as_it_is,
) -> None:
    """Values, with channels that pass, and tables shared by the examples."""
    from fastlens.kernels import triton_rotary

    torch.manual_seed(rotary_dim)
    x = torch.randn(2, 5, heads, d_head).to(dtype)
    x = place(x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if is_transposed else x)
    angles = torch.rand(1, 5, rotary_dim // 2, dtype=torch.float64) * 6
    angles = angles.repeat_interleave(2, -1) if adjacent_pairs else torch.cat([angles, angles], -1)
    tables = [place(table.to(dtype)) for table in (angles.cos(), angles.sin())]
    with torch.no_grad():
        out = triton_rotary.rotary(x, *tables, adjacent_pairs)
    truth = reference.rotary(x.double(), *(t.double() for t in tables), adjacent_pairs)
    eager = reference.rotary(x, *tables, adjacent_pairs)
    assert_no_worse(out, eager, truth, name=f"rotary {dtype}")
