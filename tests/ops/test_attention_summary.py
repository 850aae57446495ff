"""Summaries: what the whole pattern gives, by hand, and without holding it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlens.errors import ShapeError
from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from fastlens.ops import attention_summary as module
from fastlens.ops.attention_pattern import attention_pattern
from fastlens.ops.attention_summary import KeyGroup, attention_summary
from tests.close import assert_close_to
from tests.kernels.attention_cases import RULES, biases, padding, qkv


def test_heads_that_are_known_by_where_they_look():
    """A head that looks one back, and one that looks at the token after the last same token."""
    tokens = torch.tensor([[5, 6, 7, 5, 6, 7]])
    n = tokens.shape[1]
    before = torch.cat([torch.tensor([[-1]]), tokens[:, :-1]], 1)
    eye = torch.eye(8)
    q = torch.stack([eye[torch.arange(n)], eye[tokens[0]]], 1)[None]
    back = eye[torch.arange(1, n + 1)]  # key i is looked for by query i + 1
    k = torch.stack([back, torch.where(before[0, :, None] >= 0, eye[before[0]], 0.0)], 1)[None]
    groups = [KeyGroup(tokens, tokens), KeyGroup(tokens, before), KeyGroup(tokens, tokens, False)]
    found = attention_summary(q, k, AttentionRule(0.02), offsets=[1, 2], groups=groups, top_k=1)
    assert_close_to(found.offset_mass[0, 0, 0, 1:], torch.ones(n - 1))
    assert found.offset_mass[0, 0, 0, 0] == 0 and found.top_keys[0, 0, 1:, 0].tolist() == [
        *range(5)
    ]
    # Induction: from the copy on, the token after the first occurrence.
    assert_close_to(found.group_mass[1, 0, 1, 3:], torch.ones(3))
    assert found.top_keys[0, 1, 3:, 0].tolist() == [1, 2, 3]
    assert_close_to(found.offset_mass[1, 0, 1, 3:], torch.ones(3))
    # It looks at no token equal to its own, and the first row at nothing but itself.
    assert_close_to(found.group_mass[0, 0, 1, 3:], torch.zeros(3))
    assert found.group_mass[0, 0, 1, 0] == 0 and found.group_mass[2, 0, 1, 0] == 1
    assert found.entropy[0, 0, 0] == 0


def test_evenly_shared_attention_has_the_entropy_of_its_number():
    q = torch.zeros(1, 6, 2, 4)
    found = attention_summary(q, q[:, :, :1], AttentionRule(1.0), heads=[-1])
    assert_close_to(found.entropy[0, 0], torch.arange(1.0, 7.0).log())
    assert found.offset_mass.shape == found.group_mass.shape == (0, 1, 1, 6)
    assert found.top_weights.shape == found.top_keys.shape == (1, 1, 6, 0)


@given(st.data())
@settings(max_examples=60)
def test_summaries_are_those_of_the_whole_pattern(data):
    draw = data.draw
    n_queries, n_keys = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rule = RULES[draw(st.sampled_from(list(RULES)))]
    q, k, _ = qkv(n_queries, n_keys, draw(st.sampled_from([1, 2, 4])))
    offset, top_k = draw(st.integers(0, 5)), draw(st.integers(0, 11))
    mask = draw(st.none() | st.just(torch.rand(2, n_keys) < 0.6))
    bias = draw(st.sampled_from(list(biases(n_queries, n_keys).values())))
    heads = draw(st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=5))
    offsets = draw(st.lists(st.integers(-9, 12), max_size=3))
    labels = torch.randint(-1, 3, (2, n_queries)), torch.randint(-1, 3, (2, n_keys))
    groups = [KeyGroup(*labels, strict) for strict in draw(st.lists(st.booleans(), max_size=2))]
    rest = {"offset": offset, "key_mask": mask, "bias": bias}
    found = attention_summary(
        q, k, rule, heads=heads, offsets=offsets, groups=groups, top_k=top_k, **rest
    )
    truth = reference.attention_summary(q, k, rule, heads, offsets, groups, **rest)
    for got, want in zip(found[:3], truth, strict=True):
        assert_close_to(got, want, atol=1e-12)
    pattern = attention_pattern(q, k, rule, heads, **rest)
    shown = min(top_k, n_keys)
    assert_close_to(found.top_weights[..., :shown], pattern.topk(shown, -1).values, atol=1e-12)
    scores = attention_pattern(q, k, rule, heads, scores=True, **rest)
    n_seen = (scores > -torch.inf).sum(-1).clamp(max=top_k)
    named = found.top_keys >= 0
    assert torch.equal(named.sum(-1), n_seen) and not found.top_weights[~named].any()
    read = pattern.gather(-1, found.top_keys.clamp(min=0)).masked_fill(~named, 0.0)
    assert_close_to(found.top_weights, read, atol=0.0)


@pytest.mark.parametrize("n", [1, 63, 129, 1000])
def test_odd_lengths_in_16_bits(n):
    q, k, _ = qkv(n, n, 2, torch.bfloat16, d_head=16)
    mask = padding(n)
    labels = torch.randint(0, 3, (2, n))
    groups = [KeyGroup(labels, labels)]
    found = attention_summary(
        q, k, RULES["causal"], heads=[2], offsets=[1], groups=groups, top_k=2, key_mask=mask
    )
    truth = reference.attention_summary(
        q.double(), k.double(), RULES["causal"], [2], [1], groups, 0, mask
    )
    for got, want in zip(found[:3], truth, strict=True):
        assert got.dtype == torch.float32
        assert_close_to(got, want, atol=1e-5)


def test_nothing_as_large_as_the_pattern_is_held():
    n, seen = 1536, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out))
            return out

    q, k = torch.randn(2, 1, n, 1, 4).unbind(0)
    labels = torch.zeros(1, n, dtype=torch.long)
    with Watch():
        attention_summary(
            q, k, AttentionRule(2.0), offsets=[1], groups=[KeyGroup(labels, labels)], top_k=2
        )
    assert max(seen) <= 512 * n


def test_labels_that_do_not_fit_are_refused():
    q, k, _ = qkv(5, 7, 2)
    wrong = KeyGroup(torch.zeros(2, 5).long(), torch.zeros(2, 5).long())
    with pytest.raises(ShapeError, match=r"group 0 has labels \[2, 5\] and \[2, 5\]"):
        attention_summary(q, k, AttentionRule(1.0), groups=[wrong])
    with pytest.raises(ShapeError, match="head 4 was asked for"):
        attention_summary(q, k, AttentionRule(1.0), heads=[4])
    with pytest.raises(ShapeError, match="4 query heads cannot share 3"):
        attention_summary(q, torch.randn(2, 7, 3, 8).double(), AttentionRule(1.0))


def test_no_gradient_is_pretended():
    q, k, _ = (x.requires_grad_() for x in qkv(5, 7, 2))
    found = attention_summary(q, k, AttentionRule(1.0), offsets=[1], top_k=1)
    assert not any(x.requires_grad for x in found)


# -- the registered op -----------------------------------------------------------------------------


def arguments(device="cpu"):
    q = torch.zeros(2, 5, 4, 8, device=device)
    labels = torch.zeros(2, 5, dtype=torch.long, device=device)
    named = [3, 0], [1, -2], [labels], [labels], [True]
    return (q, q[:, :, :2] if device == "cpu" else q, *AttentionRule(2.0), *named, 0, None, None)


def test_opcheck():
    torch.library.opcheck(torch.ops.fastlens.attention_summary.default, arguments())


def test_a_kernel_torch_cannot_look_into_goes_through_the_registered_op(monkeypatch):
    q, k, _ = qkv(5, 5, 2)
    labels = torch.randint(0, 3, (2, 5))
    asked = {"heads": [3, 0], "offsets": (1,), "groups": [KeyGroup(labels, labels)], "top_k": 2}
    plain = attention_summary(q, k, AttentionRule(2.0), **asked)
    monkeypatch.setattr(module, "is_opaque", lambda *place: True)
    for got, want in zip(attention_summary(q, k, AttentionRule(2.0), **asked), plain, strict=True):
        assert torch.equal(got, want)


def test_a_fake_gpu_needs_no_gpu():
    with FakeTensorMode():
        found = torch.ops.fastlens.attention_summary(*arguments("cuda"))
    shapes = [(2, 2, 5), (2, 2, 2, 5), (1, 2, 2, 5)]
    assert [tuple(x.shape) for x in found] == shapes
    assert {(x.device.type, x.dtype) for x in found} == {("cuda", torch.float32)}
