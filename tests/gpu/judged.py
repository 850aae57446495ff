"""What a launcher gives, on inputs that are easy to get wrong, against the specification.

The launcher is called as on a GPU; whoever calls these functions decides what a launch means:
Triton's interpreter, or the compiled PTX.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule, KeyGroup
from fastlens.kernels.spans import Span
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
    # Apart in memory: a step past the keys must not land on the values.
    return [x.to(dtype, copy=True) for x in (q, k, v)]


def padding(n_keys: int) -> torch.Tensor:
    """Left padding in one example, so that its first rows see no key; holes in the other."""
    mask = torch.ones(2, n_keys, dtype=torch.bool)
    mask[0, : n_keys // 2] = False
    mask[1, ::3] = False
    return mask


def biases(n_queries: int, n_keys: int, heads: int, kind: str) -> torch.Tensor | None:
    """None, or a bias that examples, heads or both share; in ``"each"`` one row hides all."""
    if not kind:
        return None
    shape = {"each": (2, heads), "of heads": (1, heads), "of examples": (2, 1), "shared": (1, 1)}
    # A slice with odd strides, as a table of relative positions gives.
    big = torch.randn(*shape[kind], n_keys + 1, n_queries + 3)
    bias = big.transpose(2, 3)[:, :, 1 : n_queries + 1, :n_keys]
    if kind == "each":
        bias[0, 0, 0] = -torch.inf
        bias[1, -1, -1, ::2] = -torch.inf
    return bias


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
    bias: str = "",
    place: Place = as_it_is,
) -> None:
    """Values, log-sum-exp and chosen rows of the pattern and the scores."""
    from fastlens.kernels.triton_attention import attention
    from fastlens.kernels.triton_attention_lse import attention_lse
    from fastlens.kernels.triton_attention_pattern_rows import attention_pattern_rows

    given = [place(x) for x in inputs(n_queries, n_keys, heads, kv_heads, d_head, dtype, strides)]
    mask = place(padding(n_keys)) if is_padded else None
    rest = RULES[rule], max(0, n_keys - n_queries), mask
    added = biases(n_queries, n_keys, heads, bias)
    if added is not None:
        added = place(added.to(dtype))
        # Both ways of sharing: an axis of one, and a longer one that stands still.
        added = added if bias == "of heads" else added.expand(2, heads, -1, -1)
    wide_added = None if added is None else added.double()
    before = [x.clone() for x in given]
    z, lse = attention_lse(*given, *rest, added)
    for now, then in zip(given, before, strict=True):
        assert torch.equal(now, then), "an input was written to"
    wide = [x.double() for x in given]
    truth, true_lse = reference.attention_lse(*wide, *rest, wide_added)
    eager = reference.attention(*given, *rest, added)
    assert_no_worse(z, eager, truth, name=f"{rule} {dtype}")
    assert torch.equal(attention(*given, *rest, added), z)
    q, k = given[:2]
    scale = AttentionRule(RULES[rule].scale, causal=False)
    summed = float(reference.attention_scores(wide[0].abs(), wide[1].abs(), scale).max())
    # The rest is float32 whatever the dtype: so is plain PyTorch's own error that it is held to.
    narrow = [x.float() for x in given], None if added is None else added.float()
    eager_lse = reference.attention_lse(*narrow[0], *rest, narrow[1])[1]
    _assert_as_good("log-sum-exp", lse, eager_lse, true_lse, summed)

    middle = [0, heads // 2, n_queries // 2]
    sites = torch.tensor([[0, 0, 0], [1, heads - 1, n_queries - 1], middle])
    for name, known, is_scores in (
        ("rows of the pattern", None, False),
        ("rows by their log-sum-exp", lse, False),
        ("rows of the scores", None, True),
    ):
        rule_and_sites = rest[0], sites, *rest[1:]
        found = attention_pattern_rows(q, k, *rule_and_sites, known, is_scores, added)
        eager, true = (
            _rows(some_q, some_k, *rest, some_bias, is_scores)
            for some_q, some_k, some_bias in (
                (q.float(), k.float(), narrow[1]),
                (*wide[:2], wide_added),
            )
        )
        chosen = tuple(sites.T)
        _assert_as_good(name, found, eager[chosen], true[chosen], summed, of=(eager, true))


def _rows(
    q: torch.Tensor,
    k: torch.Tensor,
    rule: AttentionRule,
    offset: int,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    is_scores: bool,
) -> torch.Tensor:
    scores = reference.attention_scores(q, k, rule, offset, mask, bias)
    return scores if is_scores else reference.pattern_of(scores)


def _assert_as_good(
    name: str,
    found: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    summed: float,
    of: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """At most twice eager's largest error, and one rounding step at the size of what is summed.

    ``of``: eager and truth of everything, if what is judged is a part of it.
    """
    assert found.shape == truth.shape and found.dtype == torch.float32, name
    if not found.numel():
        return
    eager, all_true = (eager, truth) if of is None else of
    error = (eager - all_true).abs().nan_to_num(nan=0.0).max()
    step = torch.finfo(torch.float32).eps * (1 + summed)
    assert_close_to(found, truth, atol=2 * float(error) + step, name=name)


def check_summary(
    rule: str = "causal",
    dtype: torch.dtype = torch.float32,
    n_queries: int = 5,
    n_keys: int = 5,
    heads: int = 4,
    kv_heads: int = 2,
    d_head: int = 16,
    strides: str = "whole",
    is_padded: bool = False,
    bias: str = "",
    n_groups: int = 3,
    place: Place = as_it_is,
) -> None:
    """Entropy, mass on offsets and on groups, of some heads and with a known log-sum-exp."""
    from fastlens.kernels.triton_attention_summary import attention_summary

    q, k, _ = inputs(n_queries, n_keys, heads, kv_heads, d_head, dtype, strides)
    q, k = place(q), place(k)
    mask = place(padding(n_keys)) if is_padded else None
    offset = max(0, n_keys - n_queries)
    added = biases(n_queries, n_keys, heads, bias)
    if added is not None:
        added = place(added.to(dtype))
        # Both ways of sharing: an axis of one, and a longer one that stands still.
        added = added if bias == "of heads" else added.expand(2, heads, -1, -1)
    narrow_added = None if added is None else added.float()
    wide_added = None if added is None else added.double()
    # Labels that do not fit in 32 bits, and none.
    labels = torch.tensor([-1, 3, 5, 2**40, 2**40 + 2**32])
    groups = [
        KeyGroup(
            labels[torch.randint(5, (2, n_queries))], labels[torch.randint(5, (2, n_keys))], bool(i)
        )
        for i in torch.arange(n_groups) % 2
    ]
    offsets = (0, 1, 4, -1, 2 * n_keys)
    rest = offset, mask
    scale = AttentionRule(RULES[rule].scale, causal=False)
    summed = reference.attention_scores(q.double().abs(), k.double().abs(), scale).max()
    scores = reference.attention_scores(q.double(), k.double(), RULES[rule], *rest, wide_added)
    lse = place(scores.logsumexp(-1).float())
    some = (heads - 1, 0)
    for chosen, known in ((None, None), (some, None), (some, lse)):
        what = RULES[rule], chosen, offsets, groups, *rest
        found = attention_summary(q, k, *what, added, known)
        eager = reference.attention_summary(q.float(), k.float(), *what, narrow_added)
        truth = reference.attention_summary(q.double(), k.double(), *what, wide_added)
        names = "entropy", "mass on offsets", "mass on groups"
        for name, got, plain, want in zip(names, found, eager, truth, strict=True):
            _assert_as_good(name, got, plain, want, float(summed))


def packed(
    starts: Sequence[int], n_pos: int, wanted: Sequence[tuple[Sequence[int], int, int]] = ()
) -> tuple[torch.Tensor, list[Span]]:
    """A table of two whole runs, and branches of either in turn from a position on, rows shuffled.

    ``wanted``: (branches, start, stop) of each span; all rows of all branches if empty.
    """
    table = torch.arange(2 * n_pos).view(2, n_pos)[torch.arange(2 + len(starts)) % 2].clone()
    n_rows = 2 * n_pos
    for branch, start in enumerate(starts, start=2):
        table[branch, start:] = torch.arange(n_rows, n_rows + n_pos - start)
        n_rows += n_pos - start
    # No row of the pack stands where it would stand in the output.
    table = torch.randperm(n_rows, generator=torch.Generator().manual_seed(1))[table]
    if not wanted:
        branches = list(enumerate(starts, start=2))
        by_start = {start: [b for b, s in branches if s == start] for start in starts}
        wanted = [([0, 1], 0, n_pos), *((some, start, n_pos) for start, some in by_start.items())]
    return table, [Span(torch.tensor(some), start, stop) for some, start, stop in wanted]


def check_suffix(
    rule: str = "causal",
    dtype: torch.dtype = torch.float32,
    starts: Sequence[int] = (6, 6, 9, 9, 9, 12),
    n_pos: int = 13,
    wanted: Sequence[tuple[Sequence[int], int, int]] = (),
    heads: int = 2,
    kv_heads: int = 2,
    d_head: int = 16,
    strides: str = "whole",
    is_padded: bool = False,
    state_cost: int = 0,
    place: Place = as_it_is,
) -> tuple[int, int]:
    """Every wanted row; says how many launches there were, and how many tiles share a prefix."""
    from fastlens.kernels import suffix_tiles, triton_suffix_attention

    table, spans = packed(starts, n_pos, wanted)
    if RULES[rule].causal:
        # What no wanted row reads names no row.
        read = torch.zeros(len(table), dtype=torch.int64)
        for some, _, stop in spans:
            read[some] = read[some].clamp(min=stop)
        table = table.masked_fill(torch.arange(n_pos) >= read[:, None], -1)
    n_rows = int(table.max()) + 1
    given = inputs(n_rows, n_rows, heads, kv_heads, d_head, dtype, strides)
    q, k, v = (place(x[0]) for x in given)
    mask = None
    if is_padded:
        mask = padding(n_pos)[torch.arange(len(table)) % 2]
        # Beyond the prefixes a branch may mask as it likes.
        mask[-1, -1] = False
        mask = place(mask)
    table = place(table)
    made = []

    def tiles_of(*args: Any) -> Any:
        made.append(suffix_tiles.tiles_of(*args, state_cost=state_cost))
        return made[-1]

    triton_suffix_attention.tiles_of = tiles_of
    try:
        found = triton_suffix_attention.suffix_attention(q, k, v, table, spans, RULES[rule], mask)
    finally:
        triton_suffix_attention.tiles_of = suffix_tiles.tiles_of
    rest = table, spans, RULES[rule], mask
    truth = reference.suffix_attention(q.double(), k.double(), v.double(), *rest)
    eager = _gathered_attention(q, k, v, *rest)
    assert_no_worse(found, eager, truth, name=f"suffix {rule} {dtype}")
    return sum(len(tiles.tiles) > 0 for tiles in made[0]), len(made[0][0].tiles)


def _gathered_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    spans: Sequence[Span],
    rule: AttentionRule,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Plain PyTorch: every branch's keys gathered, as matrices. The specification goes row by row,
    whose sums are shorter and so better than those of any product of matrices.
    """
    out = [q[:0]]
    for branches, start, stop in spans:
        some = None if mask is None else mask[branches]
        rows = table[branches].clamp(min=0)
        queries = q[rows[:, start:stop]]
        out.append(reference.attention(queries, k[rows], v[rows], rule, start, some).flatten(0, 1))
    return torch.cat(out)


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
