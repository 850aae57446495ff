"""Some heads shown to hooks: what they change enters the output, and nothing else does."""

import pytest
import torch

from fastlens.components.attended import Attended, AttentionTap, with_heads_looked_at
from fastlens.components.pattern_tap import PatternTap
from fastlens.errors import ShapeError
from fastlens.hooks.capture import CaptureSpec
from fastlens.hooks.of_heads import OfHeads
from fastlens.hooks.point import HookPoint
from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from fastlens.slices import Slice
from tests.close import assert_close_to

AXES = "batch head query_pos key_pos"


def case():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    rule = AttentionRule(2.0)
    points = HookPoint(AXES), HookPoint(AXES)
    return Attended(q, k, rule, 0, None), v, reference.attention(q, k, v, rule), points


def test_nothing_changed_is_the_same_tensor():
    attended, v, z, points = case()
    points[1].add_hook(OfHeads(lambda pattern, hook: None, [2]))
    assert with_heads_looked_at(z, v, attended, (2,), points) is z


@pytest.mark.parametrize("which", [0, 1], ids=["scores", "pattern"])
def test_an_edit_of_one_head(which):
    attended, v, z, points = case()
    points[which].add_hook(OfHeads(lambda seen, hook: seen * 0.5, [2]))
    found = with_heads_looked_at(z, v, attended, (2,), points)
    scores = reference.attention_scores(attended.q, attended.k, attended.rule)
    pattern = reference.pattern_of(scores)
    edited = [reference.pattern_of(scores * 0.5), pattern * 0.5][which]
    expected = reference.attention_with_pattern(edited, v)
    assert_close_to(found[:, :, 2], expected[:, :, 2], atol=1e-14)
    others = [0, 1, 3]
    assert torch.equal(found[:, :, others], z[:, :, others])


def test_a_head_that_is_not_there():
    attended, v, z, points = case()
    points[1].add_hook(OfHeads(lambda pattern, hook: None, [4]))
    with pytest.raises(ShapeError, match="there are 4 heads"):
        with_heads_looked_at(z, v, attended, (4,), points)


def test_a_tap_is_what_the_layer_expects():
    assert isinstance(PatternTap({}, {}, CaptureSpec(Slice()), None), AttentionTap)
