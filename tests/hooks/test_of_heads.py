"""Hooks on some heads: equal to hooks on all that touch only those, with the rest fused."""

import pytest
import torch
from torch import Tensor

from fastlens import HookedTransformer, HookPoint, OfHeads
from fastlens.errors import ShapeError
from fastlens.hooks.of_heads import head_axis, heads_looked_at
from tests.close import assert_close_to
from tests.models import ours, prompts

PATTERN = "blocks.1.attn.hook_pattern"
SCORES = "blocks.1.attn.hook_attn_scores"
FAMILIES = ["gpt2", "llama", "neox", "alibi", "qk_norm", "softcap", "local"]


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Shapes of every four-axis result while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor) and one.ndim == 4:
                self.shapes.add(tuple(one.shape))
        return out


def first_row_gone(part: Tensor, hook: HookPoint) -> Tensor:
    assert part.shape[1] == 2
    return torch.cat([torch.zeros_like(part[:, :, :1]), part[:, :, 1:]], 2)


def by_hand(of_all: Tensor, hook: HookPoint) -> Tensor:
    of_all = of_all.clone()
    of_all[:, [3, 1]] = first_row_gone(of_all[:, [3, 1]], hook)
    return of_all


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("place", [PATTERN, SCORES])
def test_as_a_hook_on_all_heads_that_touches_only_those(name, place):
    model, tokens = ours(name, dtype=torch.float64), prompts()
    found = model.run_with_hooks(tokens, fwd_hooks=[(place, OfHeads(first_row_gone, [3, 1]))])
    expected = model.run_with_hooks(tokens, fwd_hooks=[(place, by_hand)])
    assert_close_to(found, expected, atol=1e-12)
    assert not torch.allclose(found, model(tokens), atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    model, tokens = ours("llama", dtype=torch.float64), prompts()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    mask = mask if side == "left" else mask.flip(1)
    with model.hooks([(PATTERN, OfHeads(first_row_gone, [3, 1]))]):
        found = model(tokens, attention_mask=mask)
    with model.hooks([(PATTERN, by_hand)]):
        assert_close_to(found, model(tokens, attention_mask=mask), atol=1e-12)


def test_only_those_heads_are_ever_made():
    model, tokens = ours("gpt2"), prompts(batch=1, pos=13)
    with Sizes() as seen, torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(PATTERN, OfHeads(lambda p, hook: None, [2]))])
    assert (1, 1, 13, 13) in seen.shapes
    assert (1, 4, 13, 13) not in seen.shapes
    with Sizes() as seen, torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(PATTERN, lambda p, hook: None)])
    assert (1, 4, 13, 13) in seen.shapes


def test_a_hook_that_changes_nothing_changes_no_bit():
    model, tokens = ours("llama"), prompts()
    hook = OfHeads(lambda p, hook: None, [0])
    found = model.run_with_hooks(tokens, fwd_hooks=[(PATTERN, hook), (SCORES, hook)])
    assert torch.equal(found, model(tokens))


def test_writing_in_place_and_several_hooks_one_after_another():
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()
    seen = []

    def halve(part, hook):
        part.mul_(0.5)

    def read(part, hook):
        seen.append(part.clone())

    both = [(PATTERN, OfHeads(halve, [1])), (PATTERN, OfHeads(read, [3, 1]))]
    found = model.run_with_hooks(tokens, fwd_hooks=both)

    def halve_of_all(pattern, hook):
        pattern[:, 1] *= 0.5

    _, cache = model.run_with_cache(tokens, names_filter=PATTERN)
    expected = model.run_with_hooks(tokens, fwd_hooks=[(PATTERN, halve_of_all)])
    assert_close_to(found, expected, atol=1e-12)
    assert_close_to(seen[0][:, 0], cache[PATTERN][:, 3], atol=1e-12)
    assert_close_to(seen[0][:, 1], cache[PATTERN][:, 1] / 2, atol=1e-12)


def test_beside_a_hook_on_all_heads():
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()
    shapes = []
    hooks = [
        (PATTERN, OfHeads(first_row_gone, [3, 1])),
        (PATTERN, lambda pattern, hook: shapes.append(pattern.shape)),
    ]
    found = model.run_with_hooks(tokens, fwd_hooks=hooks)
    expected = model.run_with_hooks(tokens, fwd_hooks=[(PATTERN, by_hand)])
    assert shapes == [(3, 4, 11, 11)]
    assert_close_to(found, expected, atol=1e-12)


@pytest.mark.parametrize("place", ["hook_z", "hook_q", "hook_k"])
def test_places_without_a_pattern(place):
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()
    name = f"blocks.0.attn.{place}"
    found = model.run_with_hooks(tokens, fwd_hooks=[(name, OfHeads(lambda x, hook: x * 0, [2]))])

    def zero(x, hook):
        x[:, :, 2] = 0

    assert_close_to(found, model.run_with_hooks(tokens, fwd_hooks=[(name, zero)]), atol=1e-12)


def test_gradients_reach_through_the_edited_head():
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()
    grads = []
    for hook in (OfHeads(first_row_gone, [3, 1]), by_hand):
        model.zero_grad()
        model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(PATTERN, hook)]).backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert_close_to(grads[0], grads[1], atol=1e-12)


def test_in_inference_mode_and_in_place_on_scores_with_gradients():
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()

    def fall(part, hook):
        part[:, :, 3:] *= 0.5

    def fall_of_all(scores, hook):
        scores = scores.clone()
        scores[:, 1, 3:] *= 0.5
        return scores

    expected = model.run_with_hooks(tokens, fwd_hooks=[(SCORES, fall_of_all)])
    hooks = [(SCORES, OfHeads(fall, [1]))]
    found = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert_close_to(found, expected, atol=1e-12)
    found.sum().backward()
    with torch.inference_mode():
        assert_close_to(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, atol=1e-12)


def test_a_hook_that_runs_the_model():
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()
    is_within: list[bool] = []

    def run(part, hook):
        if not is_within:
            is_within.append(True)
            model(tokens.flip(1))

    both = [(PATTERN, OfHeads(run, [2])), (PATTERN, OfHeads(lambda p, hook: p * 0.5, [1]))]
    found = model.run_with_hooks(tokens, fwd_hooks=both)
    expected = model.run_with_hooks(tokens, fwd_hooks=both[1:])
    assert_close_to(found, expected, atol=1e-12)


def test_heads_that_are_no_indices():
    with pytest.raises(ShapeError, match="give a list of whole numbers"):
        OfHeads(first_row_gone, [True, False])


def test_answers_that_are_no_tensors():
    model = ours("gpt2")
    with pytest.raises(ShapeError, match="returned float: what it returns"):
        model.run_with_hooks(prompts(), fwd_hooks=[(PATTERN, OfHeads(lambda p, hook: 0.5, [1]))])


@pytest.mark.parametrize("heads", [[], [-1], [1, 1]])
def test_heads_that_are_none(heads):
    with pytest.raises(ShapeError, match="each only once"):
        OfHeads(first_row_gone, heads)


def test_mistakes_are_told_and_leave_the_model_as_it_was():
    model, tokens = ours("gpt2"), prompts()
    before = model(tokens)

    def raising(match, name, hook):
        with pytest.raises(ShapeError, match=match):
            model.run_with_hooks(tokens, fwd_hooks=[(name, hook)])

    raising("given head 4, and there are 4 heads", PATTERN, OfHeads(first_row_gone, [1, 4]))
    raising("has 4 heads, counted from 0", "blocks.0.attn.hook_z", OfHeads(first_row_gone, [7]))
    raising("no head axis", "blocks.0.hook_resid_pre", OfHeads(first_row_gone, [1]))
    raising(r"was given \[3, 1, 11, 11\] and returned", PATTERN, OfHeads(lambda p, hook: p[0], [1]))
    point = model.hook_dict[PATTERN]
    assert point.held_heads is None
    assert torch.equal(model(tokens), before)


def test_who_looks_at_which_heads():
    point = HookPoint("batch head query_pos key_pos")
    assert heads_looked_at(point) == ()
    point.add_hook(OfHeads(first_row_gone, [3, 1]))
    point.add_hook(OfHeads(first_row_gone, [0]))
    assert heads_looked_at(point) == (0, 1, 3)
    point.add_hook(first_row_gone, dir="bwd")
    assert heads_looked_at(point) is None
    point.remove_hooks("bwd")
    assert heads_looked_at(point) == (0, 1, 3)
    handle = point.register_forward_hook(lambda *_: None)
    assert heads_looked_at(point) is None
    handle.remove()
    point.add_hook(first_row_gone)
    assert heads_looked_at(point) is None
    assert heads_looked_at(torch.nn.Identity()) is None


def test_where_heads_are():
    assert head_axis(HookPoint("batch pos head d_head"), 4) == 2
    assert head_axis(HookPoint("batch pos kv_head d_head"), 4) == 2
    assert head_axis(HookPoint("batch pos d_model"), 3) is None


def test_it_says_what_it_is():
    assert repr(OfHeads(print, [2])) == f"OfHeads({print!r}, [2])"
    assert isinstance(ours("gpt2"), HookedTransformer)
