"""Blocks of scores: together the whole, grouped by keys, and no copy where a view will do."""

import pytest
import torch

from fastlens.kernels import reference, score_blocks
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.score_blocks import ScoreBlocks, kept, shared_kv_heads, softmax
from tests.close import assert_close_to
from tests.kernels.attention_cases import RULES, added, qkv


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("per_block", [3, 512])
def test_blocks_together_are_the_whole(rule, per_block, monkeypatch):
    monkeypatch.setattr(score_blocks, "ROWS_PER_BLOCK", per_block)
    q, k, _ = qkv(7, 12, 2)
    for (mask, name, bias), heads in ((x, h) for x in added(7, 12) for h in (None, [3, 2], [1, 2])):
        blocks = ScoreBlocks(q, k, rule, heads, None, 2, mask, bias)
        whole = reference.attention_scores(q, k, rule, 2, mask, bias)
        whole = whole if heads is None else whole[:, heads]
        found = torch.full(blocks.shape, -torch.inf, dtype=torch.float64)
        rows = []
        for block in blocks:
            found[:, :, block.rows, block.keys] = blocks.scores(block)
            rows += range(block.rows.start, block.rows.stop)
        assert_close_to(found, whole, atol=1e-12, name=name)
        assert rows == list(range(7))


def test_blocks_are_small_where_rows_are_long(monkeypatch):
    monkeypatch.setattr(score_blocks, "SCORES_PER_BLOCK", 200)
    monkeypatch.setattr(score_blocks, "FEWEST_ROWS", 2)
    q, k, _ = qkv(9, 9, 2)
    sizes = [
        block.rows.stop - block.rows.start for block in ScoreBlocks(q, k, AttentionRule(1.0), [0])
    ]
    assert sizes == [9]  # 200 over two examples of 9 keys are 11 rows
    sizes = [block.rows.stop - block.rows.start for block in ScoreBlocks(q, k, AttentionRule(1.0))]
    assert sizes == [2, 2, 2, 2, 1]


def test_a_block_knows_the_keys_its_rows_can_see():
    q, k, _ = qkv(9, 9, 2)
    for rows, rule, keys in (
        ([4, 2], AttentionRule(1.0), slice(0, 5)),
        ([4, 2], AttentionRule(1.0, window=2), slice(1, 5)),
        ([4, 2], AttentionRule(1.0, causal=False), slice(0, 9)),
        (range(3, 5), AttentionRule(1.0, causal=False, window=2), slice(2, 9)),
    ):
        (block,) = ScoreBlocks(q, k, rule, None, rows)
        assert block.keys == keys
    (block,) = ScoreBlocks(q, k, AttentionRule(1.0, window=2), None, [8], offset=5)
    assert block.keys.start == block.keys.stop


@pytest.mark.parametrize(
    ("heads", "group", "found"),
    [
        (range(4), 2, ([0, 1], 2)),
        ([2, 3], 2, ([1], 2)),
        ([3, 2, 0, 1], 2, ([1, 0], 2)),
        ([0, 2], 2, ([0, 1], 1)),
        ([0, 2, 1], 2, ([0, 1, 0], 1)),
        ([0, 2, 3], 2, ([0, 1, 1], 1)),
        ([], 2, ([], 0)),
    ],
)
def test_heads_that_share_keys(heads, group, found):
    kv_heads, each = shared_kv_heads(heads, group)
    assert (list(kv_heads), each if len(heads) else 0) == found
    assert shared_kv_heads(heads, 1) == (heads, 1)


@pytest.mark.parametrize("indices", [range(2, 5), [2, 3, 4], [4], range(3, 4)], ids=str)
def test_a_run_is_a_view(indices):
    x = torch.randn(3, 6, 2)
    found = kept(x, 1, indices)
    assert torch.equal(found, x[:, list(indices)])
    assert found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("indices", [[4, 2], [1, 1], range(0, 6, 2), range(4, 1, -1), []], ids=str)
def test_other_choices_are_copies(indices):
    x = torch.randn(3, 6, 2)
    assert torch.equal(kept(x, 1, indices), x[:, list(indices)])


def test_softmax_of_rows_without_keys():
    scores = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]])
    assert softmax(scores).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert softmax(scores[:, :0]).shape == (2, 0)
