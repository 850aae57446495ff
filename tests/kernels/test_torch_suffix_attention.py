"""Both forms of attention over packed rows against the specification in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlens.kernels import reference
from fastlens.kernels import torch_suffix_attention as module
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.spans import Span
from fastlens.kernels.torch_suffix_attention import shares_prefix, suffix_attention
from tests.close import assert_close_to, assert_no_worse

RULES = {
    "causal": AttentionRule(3.0),
    "bidirectional": AttentionRule(3.0, causal=False),
    "window": AttentionRule(3.0, window=5),
    "nearly_wide_window": AttentionRule(3.0, window=12),
    "wide_window": AttentionRule(3.0, window=13),
    "soft_cap": AttentionRule(3.0, soft_cap=2.0),
    "alibi": AttentionRule(3.0, alibi=True),
    "bidirectional_alibi": AttentionRule(3.0, causal=False, alibi=True),
    "bidirectional_window": AttentionRule(3.0, causal=False, window=4),
}
SHARING = {"causal", "bidirectional", "wide_window", "soft_cap"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PADDINGS = ["none", "left", "right", "all"]
N_POS = 13  # the widest window is as wide

each_rule = pytest.mark.parametrize("name", RULES)


def pack(n_pos, own_from, examples=2):
    """The table of as many base runs, and of branches whose own rows begin at these positions."""
    table = torch.full((examples + len(own_from), n_pos), -1)
    table[:examples] = torch.arange(examples * n_pos).view(examples, n_pos)
    n_rows = examples * n_pos
    for branch, first in enumerate(own_from):
        table[examples + branch] = table[branch % examples]
        table[examples + branch, first:] = torch.arange(n_rows, n_rows + n_pos - first)
        n_rows += n_pos - first
    return table, n_rows


def packed_qkv(n_rows, dtype=torch.float64, heads=4, kv_heads=2, d_head=8):
    """Strided, as the split of one product is."""
    whole = torch.randn(n_rows, heads + 2 * kv_heads, d_head).to(dtype)
    return whole.split([heads, kv_heads, kv_heads], 1)


def mask_of(padding, table, examples=2):
    if padding == "none":
        return None
    mask = torch.ones_like(table, dtype=torch.bool)
    of_example = torch.arange(len(table)) % examples == 0
    if padding == "left":
        mask[of_example, :5] = False
    elif padding == "right":
        mask[of_example, -3:] = False
    else:
        mask[of_example] = False
    return mask


@pytest.fixture(params=["gathered", "shared"])
def form(request, monkeypatch):
    """One of the two forms, wherever it is possible; the prefixes that were shared."""
    monkeypatch.setattr(module, "SHARED_KEYS", 2 if request.param == "shared" else 10**6)
    monkeypatch.setattr(module, "SHARED_GAIN", 0.0)
    taken = []
    real = module._Some.shared

    def spied(self, prefix):
        taken.append((len(self.table), prefix))
        return real(self, prefix)

    monkeypatch.setattr(module._Some, "shared", spied)
    return request.param, taken


def spans_for_all(table, own_from, examples=2):
    """The base runs whole and every branch's own rows, those of one start together."""
    spans = [Span(torch.arange(examples), 0, table.shape[1])]
    for first in sorted(set(own_from)):
        some = [examples + b for b, start in enumerate(own_from) if start == first]
        spans.append(Span(torch.tensor(some), first, table.shape[1]))
    return spans


@each_rule
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_both_forms_are_the_specification(form, name, padding, kv_heads):
    own_from = [6, 6, 6, 6, 6, 9, 9, 0, 0, 12]
    table, n_rows = pack(N_POS, own_from)
    q, k, v = packed_qkv(n_rows, kv_heads=kv_heads)
    mask = mask_of(padding, table)
    spans = spans_for_all(table, own_from)
    truth = reference.suffix_attention(q, k, v, table, spans, RULES[name], mask)
    z = suffix_attention(q, k, v, table, spans, RULES[name], mask)
    assert_close_to(z, truth, atol=1e-13)
    kind, taken = form
    assert bool(taken) == (kind == "shared" and name in SHARING)
    if taken and RULES[name].causal:
        # Of the five from position 6 on: three of one example, two of the other.
        assert (3, 6) in taken and (2, 6) in taken


@pytest.mark.parametrize("name", ["causal", "bidirectional", "soft_cap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_no_worse_than_eager(form, name, dtype, padding):
    own_from = [8] * 6
    table, n_rows = pack(N_POS, own_from)
    inputs = packed_qkv(n_rows, dtype)
    spans, mask = spans_for_all(table, own_from), mask_of(padding, table)
    rest = table, spans, RULES[name], mask
    truth = reference.suffix_attention(*(x.double() for x in inputs), *rest)
    eager = reference.suffix_attention(*inputs, *rest)
    assert_no_worse(suffix_attention(*inputs, *rest), eager, truth)


@pytest.mark.parametrize("n_pos", [63, 129])
def test_long_prefixes_and_one_row(form, n_pos):
    """The last layer: one row of each run, whose own keys begin anywhere."""
    own_from = [n_pos - 1 - 5 * (b // 4) for b in range(24)]
    table, n_rows = pack(n_pos, own_from)
    q, k, v = packed_qkv(n_rows)
    spans = [Span(torch.arange(len(table)), n_pos - 1, n_pos)]
    truth = reference.suffix_attention(q, k, v, table, spans, RULES["causal"])
    z = suffix_attention(q, k, v, table, spans, RULES["causal"])
    assert_close_to(z, truth, atol=1e-13)


def test_lengths_of_one_size_share_their_shortest(monkeypatch):
    monkeypatch.setattr(module, "SHARED_GAIN", 0.0)
    monkeypatch.setattr(module, "SHARED_KEYS", 4)
    table, _ = pack(16, [15, 14, 13, 9, 8, 2, 3], examples=1)
    q = torch.zeros(1, 1)
    last = Span(torch.arange(len(table)), 15, 16)
    some = module._Some(q, q, q, 1, last, AttentionRule(1.0), table, None)
    found = [(None if which is None else which.tolist(), n) for which, n in some.parts()]
    # 15 (the base run), 15, 14, 13; then 9, 8; two share fewer than four keys.
    assert found == [([4, 5], 8), ([0, 1, 2, 3], 13), ([6, 7], 0)]


def test_branches_with_other_padding_do_not_share(monkeypatch):
    monkeypatch.setattr(module, "SHARED_GAIN", 0.0)
    monkeypatch.setattr(module, "SHARED_KEYS", 2)
    table, n_rows = pack(N_POS, [8] * 4, examples=1)
    mask = torch.ones_like(table, dtype=torch.bool)
    mask[3:, :4] = False
    q, k, v = packed_qkv(n_rows)
    spans = [Span(torch.arange(1, 5), 8, N_POS)]
    truth = reference.suffix_attention(q, k, v, table, spans, RULES["causal"], mask)
    z = suffix_attention(q, k, v, table, spans, RULES["causal"], mask)
    assert_close_to(z, truth, atol=1e-13)
    assert not torch.equal(z[:5], z[10:15])


def test_all_keys_shared_when_only_queries_differ(form):
    """Not causal, and every key is the base run's: there is nothing to merge."""
    q, k, v = packed_qkv(N_POS + 3)
    table = torch.arange(N_POS).repeat(4, 1)
    spans = [Span(torch.arange(4), 2, 5)]
    rule = RULES["bidirectional"]
    z = suffix_attention(q, k, v, table, spans, rule)
    assert_close_to(z, reference.suffix_attention(q, k, v, table, spans, rule), atol=1e-13)
    assert form[1] == ([(4, N_POS)] if form[0] == "shared" else [])


def test_pieces_that_bound_the_gather(form, monkeypatch):
    own_from = [6] * 5
    table, n_rows = pack(N_POS, own_from)
    q, k, v = packed_qkv(n_rows)
    spans = spans_for_all(table, own_from)
    whole = suffix_attention(q, k, v, table, spans, RULES["causal"])
    for bound in (1, 4000):
        monkeypatch.setattr(module, "GATHER_BYTES", bound)
        z = suffix_attention(q, k, v, table, spans, RULES["causal"])
        assert_close_to(z, whole, atol=1e-13)


def test_places_that_no_row_sees_may_be_missing(form):
    own_from = [4] * 3
    table, n_rows = pack(N_POS, own_from)
    q, k, v = packed_qkv(n_rows)
    table[:, 9:] = -1
    spans = [Span(torch.arange(2, 5), 4, 9)]
    z = suffix_attention(q, k, v, table, spans, RULES["causal"])
    truth = reference.suffix_attention(q, k, v, table[:, :9], spans, RULES["causal"])
    assert_close_to(z, truth, atol=1e-13)


def test_what_is_written_covers_everything(form, monkeypatch):
    """Rows that were never written would be NaN."""
    real = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size: real(self, *size).fill_(torch.nan)
    )
    own_from = [5, 5, 5, 7, 7, 2]
    table, n_rows = pack(N_POS, own_from)
    z = suffix_attention(
        *packed_qkv(n_rows), table, spans_for_all(table, own_from), RULES["causal"]
    )
    assert bool(z.isfinite().all())


def test_a_row_outside_the_pack_is_refused():
    q, k, v = packed_qkv(6)
    table = torch.tensor([[0, 1, 2, -1]])
    with pytest.raises(IndexError):
        suffix_attention(q, k, v, table, [Span(torch.tensor([0]), 0, 4)], RULES["causal"])


def test_no_spans_no_rows():
    q, k, v = packed_qkv(6)
    table = torch.tensor([[0, 1, 2, 3]])
    assert suffix_attention(q, k, v, table, [], RULES["causal"]).shape == (0, 4, 8)


def test_when_a_prefix_is_shared():
    assert shares_prefix(64, 100, 8) and not shares_prefix(63, 100, 8)
    assert not shares_prefix(1000, 1, 8)
    assert not shares_prefix(64, 100, 1000)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_table(data):
    """Tables at random, not such as a wave makes, in the form that shares all it can."""
    n_pos, n_branches = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    seed = data.draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    # Few different rows, so that prefixes happen to agree.
    table = torch.randint(0, 1 + seed % 3, (n_branches, n_pos), generator=generator)
    q, k, v = (torch.randn(4, heads, 4, generator=generator).double() for heads in (4, 2, 2))
    spans = []
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, n_pos - 1))
        stop = data.draw(st.integers(start + 1, n_pos))
        spans.append(Span(torch.randint(0, n_branches, (3,), generator=generator), start, stop))
    rule = AttentionRule(
        1.5,
        causal=data.draw(st.booleans()),
        window=data.draw(st.sampled_from([None, 2, 50])),
        soft_cap=data.draw(st.sampled_from([-1.0, 1.0])),
    )
    mask = data.draw(st.sampled_from([None, torch.rand(table.shape, generator=generator) < 0.6]))
    truth = reference.suffix_attention(q, k, v, table, spans, rule, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARED_KEYS", 1)
        patch.setattr(module, "SHARED_GAIN", 0.0)
        z = suffix_attention(q, k, v, table, spans, rule, mask)
    assert_close_to(z, truth, atol=1e-12)


@pytest.mark.parametrize("broken", ["own keys alone", "the mean of both"])
def test_a_broken_merge_is_seen(monkeypatch, broken):
    """The bounds of this file can be missed."""
    monkeypatch.setattr(module, "SHARED_KEYS", 2)
    monkeypatch.setattr(module, "SHARED_GAIN", 0.0)
    own = broken == "own keys alone"
    monkeypatch.setattr(
        module, "_merged", lambda z, lse, other_z, _: other_z if own else (z + other_z) / 2
    )
    table, n_rows = pack(N_POS, [6] * 4)
    q, k, v = packed_qkv(n_rows)
    spans = spans_for_all(table, [6] * 4)
    truth = reference.suffix_attention(q, k, v, table, spans, RULES["causal"])
    z = suffix_attention(q, k, v, table, spans, RULES["causal"])
    with pytest.raises(AssertionError, match="differ too much"):
        assert_close_to(z, truth, atol=1e-13)
