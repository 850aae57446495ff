"""HookPoints: what they pass, what sits on them, and how axes are named."""

import pytest
import torch
import torch.nn as nn

from fastlens.errors import ShapeError
from fastlens.hooks.point import HookPoint, is_live


def double(activation, hook):
    return activation * 2


def test_identity_returns_the_same_tensor():
    x = torch.randn(2, 3)
    assert HookPoint()(x) is x


def test_forward_hooks_run_in_order_and_none_keeps_the_activation():
    point, seen = HookPoint("batch d_model"), []
    point.add_hook(lambda x, hook: seen.append(("first", hook)))
    point.add_hook(double)
    point.add_hook(lambda x, hook: seen.append(("zeroth", hook)), prepend=True)
    assert torch.equal(point(torch.ones(1, 2)), torch.full((1, 2), 2.0))
    assert seen == [("zeroth", point), ("first", point)]
    assert [handle.user_hook for handle in point.fwd_hooks][2] is double


def test_backward_hook_sees_and_replaces_the_gradient():
    point, seen = HookPoint(), []

    def triple(grad, hook):
        seen.append(grad)
        return 3 * grad

    point.add_hook(triple, dir="bwd")
    x = torch.ones(2, requires_grad=True)
    (point(x) * 5).sum().backward()
    assert torch.equal(seen[0], torch.full((2,), 5.0))
    assert torch.equal(x.grad, torch.full((2,), 15.0))


def test_remove_hooks_by_level_and_permanence():
    point = HookPoint()
    point.add_hook(double, level=1)
    point.add_hook(double, level=2)
    point.add_perma_hook(double)
    point.remove_hooks("fwd", level=2)
    assert [handle.context_level for handle in point.fwd_hooks] == [1, None]
    point.remove_hooks("both")
    assert [handle.is_permanent for handle in point.fwd_hooks] == [True]
    assert point.has_hooks() and not point.has_hooks(including_permanent=False)
    point.remove_hooks("both", including_permanent=True)
    assert not point.has_hooks() and not point._forward_hooks


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="'fwd' or 'bwd'"):
        HookPoint().add_hook(double, dir="forward")
    with pytest.raises(ValueError, match="sideways"):
        HookPoint().remove_hooks("sideways")


def test_liveness_sees_everything_that_could_act():
    assert not is_live(HookPoint())
    assert is_live(nn.Identity())
    for dress in (
        lambda p: p.add_hook(double),
        lambda p: p.add_hook(double, dir="bwd"),
        lambda p: p.register_forward_hook(lambda *a: None),
        lambda p: p.register_forward_pre_hook(lambda *a: None),
        lambda p: setattr(p, "forward", lambda x: x + 1),
    ):
        point = HookPoint()
        dress(point)
        assert is_live(point)
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        assert is_live(HookPoint())
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("axes", "name", "ndim", "index"),
    [
        ("batch pos head d_head", "pos", 4, 1),
        ("batch head query_pos key_pos", "pos", 4, None),
        ("batch head query_pos key_pos", "query_pos", 4, 2),
        ("batch pos ... one", "pos", 3, 1),
        ("batch pos ... one", "one", 4, 3),
        ("batch pos ... one", "one", 3, 2),
    ],
)
def test_axes_are_found_by_name(axes, name, ndim, index):
    assert HookPoint(axes).axis(name, ndim) == index


def test_slicing_a_point_without_axes_is_an_error_not_a_guess():
    with pytest.raises(ShapeError, match="does not name its axes"):
        HookPoint().axis("pos", 3)


def test_layer_comes_from_the_name():
    point = HookPoint()
    point.name = "blocks.7.attn.hook_q"
    assert point.layer() == 7
    point.name = "hook_embed"
    with pytest.raises(ValueError, match="belongs to no block"):
        point.layer()


def test_repr_of_a_hook_with_a_large_partial_is_short():
    from functools import partial

    point = HookPoint()
    point.add_hook(partial(lambda x, hook, big: None, big=torch.zeros(1000, 1000)))
    (hook,) = point._forward_hooks.values()
    assert len(hook.__name__) < 300


def test_a_hooked_point_copies_and_pickles_with_its_own_hook():
    import copy
    import pickle

    point = HookPoint("batch d_model")
    point.add_hook(double)
    for other in (copy.deepcopy(point), pickle.loads(pickle.dumps(point))):
        (wrapper,) = other._forward_hooks.values()
        assert wrapper.point is other
        assert torch.equal(other(torch.ones(1, 1)), torch.full((1, 1), 2.0))
