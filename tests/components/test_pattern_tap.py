"""Entries of scores and pattern made of queries and keys, at once or when read."""

import pytest
import torch

from fastlens.components.attended import Attended
from fastlens.components.pattern_tap import PatternTap
from fastlens.errors import ShapeError
from fastlens.hooks.capture import CaptureSpec
from fastlens.hooks.derived import CacheDict, Derived
from fastlens.hooks.point import HookPoint
from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from fastlens.slices import Slice
from tests.close import assert_close_to

NAME = "blocks.0.attn.hook_pattern"
SCORES = "blocks.0.attn.hook_attn_scores"
RULE = AttentionRule(3.0, window=7)


def attended(batch: int = 2, n_queries: int = 9, offset: int = 3) -> Attended:
    torch.manual_seed(0)
    q = torch.randn(batch, n_queries, 4, 2, dtype=torch.float64)
    k = torch.randn(batch, offset + n_queries, 2, 2, dtype=torch.float64)
    mask = torch.ones(batch, offset + n_queries, dtype=torch.bool)
    mask[0, :2] = False
    return Attended(q, k, RULE, offset, mask)


def truth(a: Attended, scores: bool = False) -> torch.Tensor:
    found = reference.attention_scores(a.q, a.k, a.rule, a.offset, a.key_mask)
    return found if scores else reference.pattern_of(found)


def tap(cache, spec=None, sources=None, names=(SCORES, NAME)):
    points = {}
    for name in names:
        points[name] = HookPoint("batch head query_pos key_pos")
        points[name].name = name
    return PatternTap(cache, points, spec or CaptureSpec(Slice()), sources)


@pytest.mark.parametrize("lazy", [True, False])
def test_whole_entries(lazy):
    cache, a = CacheDict() if lazy else {}, attended()
    tap(cache).fused(a)
    assert isinstance(dict.__getitem__(cache, NAME), Derived) is lazy
    assert list(cache) == [SCORES, NAME]
    assert_close_to(cache[NAME], truth(a), atol=1e-14)
    assert_close_to(cache[SCORES], truth(a, scores=True), atol=1e-14)


def test_what_is_captured_anyway_is_the_source():
    cache, a = CacheDict(), attended(offset=0)
    cache["q"], cache["k"] = a.q, a.k
    tap(cache, sources=("q", "k")).fused(a)
    held = {t.data_ptr() for t in cache.entry(NAME).held()}
    assert {a.q.data_ptr(), a.k.data_ptr()} <= held
    # The padding is a copy: the caller may edit a mask.
    assert len(held) == 3 and a.key_mask.data_ptr() not in held


def test_a_mask_edited_later_changes_nothing():
    cache, a = CacheDict(), attended()
    expected = truth(a)
    tap(cache).fused(a)
    a.key_mask[:] = True
    assert_close_to(cache[NAME], expected, atol=1e-14)


def test_captured_queries_that_are_of_another_run_are_no_source():
    cache, a = CacheDict(), attended(offset=0)
    cache["q"], cache["k"] = a.q.clone(), a.k.clone()
    tap(cache, sources=("q", "k")).fused(a)
    assert a.q.data_ptr() in {t.data_ptr() for t in cache.entry(NAME).held()}


def test_a_pattern_smaller_than_queries_and_keys_is_made_at_once():
    cache, a = CacheDict(), attended(n_queries=1, offset=0)
    tap(cache, names=(NAME,)).fused(a)
    assert not isinstance(cache.entry(NAME), Derived)


@pytest.mark.parametrize("choice", [[0, 5], (1, 8, 2), 4, [-1]])
def test_chosen_heads_and_rows(choice):
    cache, a = CacheDict(), attended()
    spec = CaptureSpec(Slice(choice), heads=[3, 1])
    tap(cache, spec).fused(a)
    expected = Slice(choice).apply(truth(a)[:, [3, 1]], dim=2)
    assert_close_to(cache[NAME], expected, atol=1e-14)
    assert cache[NAME].untyped_storage().nbytes() == cache[NAME].numel() * 8


def test_heads_that_are_not_there():
    with pytest.raises(ShapeError, match="0 to 3"):
        tap(CacheDict(), CaptureSpec(Slice(), heads=[4])).fused(attended())


def test_some_rows_of_an_entry_that_is_not_computed():
    cache, a = CacheDict(), attended()
    tap(cache).fused(a)
    part = cache.entry(NAME).read_part([2], [1, 0])
    assert_close_to(part, truth(a)[:, [2]][:, :, [1, 0]], atol=1e-14)


def test_what_attention_made_itself_is_sliced_and_kept():
    cache, a = CacheDict(), attended(batch=1)
    spec = CaptureSpec(Slice([2]), remove_batch_dim=True, heads=[1])
    tap(cache, spec).materialised(truth(a, scores=True), truth(a))
    assert_close_to(cache[NAME], truth(a)[0, [1]][:, [2]], atol=0)
    assert cache[SCORES].shape == (1, 1, 12)
