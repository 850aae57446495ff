"""Windows that look both ways, and rotary positions that are columns, against written formulas."""

import copy
from unittest import mock

import pytest
import torch

from fastlens.components import attention, bidirectional_attention
from fastlens.components.bidirectional_attention import BidirectionalAttention
from fastlens.config import HookedTransformerConfig
from tests.close import assert_close_to

WINDOW = 4


def layer(kind: str = "local", **changes) -> BidirectionalAttention:
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        d_model=16, d_head=4, n_heads=4, n_layers=1, n_ctx=8, d_vocab=9, act_fn="gelu",
        positional_embedding_type="rotary", attention_dir="bidirectional", device="cpu",
        use_local_attn=True, window_size=WINDOW, attn_types=[kind], dtype=torch.float64,
        rotary_base_local=20.0, **changes,
    )  # fmt: skip
    attn = BidirectionalAttention(cfg, kind, 0)
    for leaf in attn.parameters():
        torch.nn.init.normal_(leaf, 0, 0.4)
    return attn.eval()


def written(attn: BidirectionalAttention, x: torch.Tensor, mask: torch.Tensor | None):
    """Output and pattern, one pair of tokens at a time is what this says."""
    n_pos = x.shape[1]
    base = 20.0 if attn.attn_type == "local" else 10000.0
    frequencies = base ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)
    angles = torch.arange(n_pos, dtype=torch.float64)[:, None] * frequencies

    def turned(y):
        first, second = y.chunk(2, -1)
        cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    q, k, v = (
        torch.einsum("bpm,hmd->bphd", x, w) + b
        for w, b in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", turned(q), turned(k)) / 2
    distance = (torch.arange(n_pos)[:, None] - torch.arange(n_pos)).abs()
    if attn.attn_type == "local":
        scores = scores.masked_fill(distance >= WINDOW, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    pattern = scores.softmax(-1).nan_to_num()
    if attn.sinks is not None:
        sinks = attn.sinks[:, None, None].expand(*scores.shape[:-1], 1)
        pattern = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
    return torch.einsum("bqhd,hdm->bqm", z, attn.W_O) + attn.b_O, pattern


def a_mask(n_pos: int) -> torch.Tensor:
    mask = torch.ones(2, n_pos, dtype=torch.long)
    mask[0, 2], mask[1, -n_pos // 3 :] = 0, 0
    return mask


@pytest.mark.parametrize("kind", ["local", "global"])
@pytest.mark.parametrize("rows", [3, 512])
@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("n_pos", [3, 4, 5, 20])
def test_every_way_is_the_formula(kind, rows, is_masked, n_pos):
    attn = layer(kind)
    x = torch.randn(2, n_pos, 16, dtype=torch.float64)
    mask = a_mask(n_pos) if is_masked else None
    want, pattern = written(attn, x, mask)
    with mock.patch.object(bidirectional_attention, "ROWS_PER_BLOCK", rows):
        assert_close_to(attn(x, x, x, attention_mask=mask), want, name="fused")
        with torch.no_grad():
            assert_close_to(attn(x, x, x, attention_mask=mask), want, name="without gradients")
    seen = {}
    attn.hook_pattern.add_hook(lambda p, hook: seen.update(pattern=p))
    assert_close_to(attn(x, x, x, attention_mask=mask), want, name="looked at")
    assert_close_to(seen["pattern"], pattern, name="pattern")


def test_a_given_bias_is_added():
    attn, x = layer(), torch.randn(2, 9, 16, dtype=torch.float64)
    mask = a_mask(9)
    hidden = torch.zeros(2, 1, 1, 9, dtype=torch.float64).masked_fill(
        mask[:, None, None] == 0, -torch.inf
    )
    want = attn(x, x, x, attention_mask=mask)
    with mock.patch.object(bidirectional_attention, "ROWS_PER_BLOCK", 4):
        assert_close_to(attn(x, x, x, additive_attention_mask=hidden), want)
        bias = torch.randn(1, 4, 9, 9, dtype=torch.float64)
        fused = attn(x, x, x, position_bias=bias)
    attn.hook_attn_scores.add_hook(lambda scores, hook: None)
    assert_close_to(fused, attn(x, x, x, position_bias=bias))


def test_gradients():
    attn, x = layer(), torch.randn(2, 11, 16, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(written(attn, x, a_mask(11))[0].square().sum(), x)
    with mock.patch.object(bidirectional_attention, "ROWS_PER_BLOCK", 4):
        out = attn(x, x, x, attention_mask=a_mask(11))
    (got,) = torch.autograd.grad(out.square().sum(), x)
    assert_close_to(got, want)


def test_no_mask_of_all_pairs():
    attn, sizes = layer(), []
    x = torch.randn(1, 64, 16, dtype=torch.float64)
    real = attention.attention

    def counted(q, k, v, rule, offset, mask, bias):
        sizes.append((q.shape[1], k.shape[1], bias.numel()))
        return real(q, k, v, rule, offset, mask, bias)

    with (
        mock.patch.object(bidirectional_attention, "ROWS_PER_BLOCK", 8),
        mock.patch.object(attention, "attention", counted),
        torch.no_grad(),
    ):
        attn(x, x, x)
    widest = 8 + 2 * (WINDOW - 1)
    assert len(sizes) == 8 and all(k <= widest and n <= 8 * widest for _, k, n in sizes)


def test_frequencies_that_a_checkpoint_states():
    attn = layer("global")
    attn.set_frequencies(torch.tensor([0.5, 0.25]))
    angles = torch.arange(8, dtype=torch.float64)[:, None] * torch.tensor([0.5, 0.25]).double()
    assert_close_to(attn.rotary_sin, torch.cat([angles, angles], 1).sin(), atol=1e-15)
    attn.grow_tables(30)
    assert_close_to(attn.rotary_cos[29, :2], torch.tensor([14.5, 7.25]).double().cos(), atol=1e-15)
    other = copy.deepcopy(attn).to(torch.float32)
    assert_close_to(other.rotary_sin, attn.rotary_sin, atol=2e-6)


@pytest.mark.parametrize("kind", ["local", "global"])
def test_sinks(kind):
    attn, n_pos = layer(kind, use_attention_sinks=True), 11
    x, mask = torch.randn(2, n_pos, 16, dtype=torch.float64), a_mask(n_pos)
    want, _ = written(attn, x, mask)
    with mock.patch.object(bidirectional_attention, "ROWS_PER_BLOCK", 3):
        assert_close_to(attn(x, x, x, attention_mask=mask), want, atol=1e-12)
