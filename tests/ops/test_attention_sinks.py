"""Attention beside sinks: against a softmax with one more column, values and gradients."""

import pytest
import torch

from fastlens.errors import ConfigError, GradientError
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.reference_attention import attention_scores
from fastlens.ops.attention_sinks import attention_with_sinks, pattern_from, share_of_keys
from tests.close import assert_close_to

RULES = [
    AttentionRule(3.0),
    AttentionRule(2.0, window=3),
    AttentionRule(2.0, causal=False),
    AttentionRule(2.5, alibi=True),
]


def inputs(seed=0, queries=5, keys=7):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8), (4,)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def plain(q, k, v, sinks, rule, offset, key_mask):
    scores = attention_scores(q, k, rule, offset, key_mask)
    column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    pattern = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    return torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(2, 2))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("masked", [False, True])
def test_against_one_more_column(rule, masked):
    q, k, v, sinks = inputs()
    mask = None
    if masked:
        mask = torch.ones(2, 7, dtype=torch.bool)
        # Keys that nobody may see, from the front: some rows see none at all.
        mask[0, :4] = False
    found = attention_with_sinks(q, k, v, sinks, rule, 2, mask)
    truth = plain(q, k, v, sinks, rule, 2, mask)
    assert_close_to(found, truth, atol=1e-12)
    weight = torch.randn_like(truth)
    grads = torch.autograd.grad((found * weight).sum(), (q, k, v, sinks))
    expected = torch.autograd.grad((truth * weight).sum(), (q, k, v, sinks))
    for name, one, other in zip("q k v sinks".split(), grads, expected, strict=True):
        assert_close_to(one, other, atol=1e-12, name=name)
    with torch.no_grad():
        assert_close_to(attention_with_sinks(q, k, v, sinks, rule, 2, mask), truth, atol=1e-12)


def test_a_large_sink_takes_everything():
    q, k, v, _ = (x.detach() for x in inputs())
    sinks = torch.tensor([1e3, -1e3, 1e3, -1e3], dtype=torch.float64)
    z = attention_with_sinks(q, k, v, sinks, AttentionRule(3.0))
    assert float(z[:, :, 0].abs().max()) < 1e-100 and float(z[:, :, 1].abs().max()) > 0.1
    assert_close_to(
        share_of_keys(torch.zeros(2, 4), sinks)[..., 0], torch.tensor([[0.0, 1.0] * 2] * 2)
    )


def test_patterns():
    scores = torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]])
    assert_close_to(pattern_from(scores).sum(-1), torch.tensor([1.0, 0.0]))
    with_sink = pattern_from(scores, torch.tensor([0.0, 0.0]))
    total = 2 + torch.e
    assert_close_to(with_sink, torch.tensor([[1 / total, torch.e / total], [0.0, 0.0]]))


def test_no_soft_cap():
    with pytest.raises(ConfigError, match="soft-cap of 5.0"):
        attention_with_sinks(*inputs(), AttentionRule(3.0, soft_cap=5.0))


def test_no_gradient_of_a_bias():
    bias = torch.zeros(1, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    with pytest.raises(GradientError, match="bias requires one"):
        attention_with_sinks(*inputs(), AttentionRule(3.0), bias=bias)
    with torch.no_grad():
        attention_with_sinks(*inputs(), AttentionRule(3.0), bias=bias)


@pytest.mark.parametrize("wanted", ["qkvs", "q", "k", "v", "kvs"])
def test_gradients_of_gradients(wanted):
    """Of the specification, by every input; a Function that silently cuts the graph has none."""
    q, k, v, sinks = every = inputs(queries=3, keys=4)
    given = [x.requires_grad_(name in wanted) for name, x in zip("qkvs", every, strict=True)]
    given = [x for x in given if x.requires_grad]
    weight = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    second = []
    for function in (attention_with_sinks, plain):
        z = function(q, k, v, sinks, RULES[1], 1, None)
        # Not linear in z: its gradient depends on every input.
        first = torch.autograd.grad((z.pow(2) * weight).sum(), given, create_graph=True)
        total = sum((x.pow(2).sum() for x in first), torch.zeros(()))
        second.append(torch.autograd.grad(total, given))
    for name, one, other in zip(wanted, *second, strict=True):
        assert_close_to(one, other, atol=1e-11, name=name)
