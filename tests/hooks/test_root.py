"""`HookedRootModule` on a module of one's own: names, contexts, caching, near names."""

import pytest
import torch
import torch.nn as nn

from fastlens.errors import HookNameError
from fastlens.hooks.point import HookPoint
from fastlens.hooks.root import HookedRootModule


class Two(HookedRootModule):
    """Two hook points, one in a submodule."""

    def __init__(self):
        super().__init__()
        self.hook_in = HookPoint("batch pos d_model")
        self.inner = nn.Sequential(nn.Linear(3, 3), HookPoint("batch pos d_model"))
        self.setup()

    def forward(self, x):
        return self.inner(self.hook_in(x)).sum()


@pytest.fixture
def model():
    return Two()


X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


def plus_one(activation, hook):
    return activation + 1


def test_setup_names_every_module(model):
    assert list(model.hook_dict) == ["hook_in", "inner.1"]
    assert set(model.mod_dict) == {"hook_in", "inner", "inner.0", "inner.1"}
    assert model.hook_dict["inner.1"].name == "inner.1"


def test_run_with_hooks_changes_this_run_only(model):
    before = model(X)
    hooked = model.run_with_hooks(X, fwd_hooks=[("inner.1", plus_one)])
    assert torch.allclose(hooked, before + X.numel())
    assert torch.equal(model(X), before)
    assert not model.list_hooks()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_come_off_when_a_hook_raises(model, error):
    def stop(activation, hook):
        raise error

    with pytest.raises(error):
        model.run_with_hooks(X, fwd_hooks=[("hook_in", plus_one), ("inner.1", stop)])
    assert not model.list_hooks() and model.context_level == 0


def test_contexts_nest_and_leave_outer_and_permanent_hooks_on(model):
    model.add_perma_hook("hook_in", plus_one)
    with model.hooks(fwd_hooks=[("hook_in", plus_one)]):
        with model.hooks(fwd_hooks=[("inner.1", plus_one)]):
            assert len(model.list_hooks()) == 2
        assert list(model.list_hooks()) == ["hook_in"]
        assert len(model.hook_dict["hook_in"].fwd_hooks) == 2
    assert len(model.hook_dict["hook_in"].fwd_hooks) == 1
    assert not model.list_hooks(including_permanent=False)
    model.reset_hooks(including_permanent=True)
    assert not model.list_hooks()


def test_reset_hooks_end_false_keeps_them_for_a_backward_pass(model):
    grads = []
    loss = model.run_with_hooks(
        X, bwd_hooks=[("inner.1", lambda g, hook: grads.append(g))], reset_hooks_end=False
    )
    loss.backward()
    assert torch.equal(grads[0], torch.ones_like(X))
    model.reset_hooks()


def test_an_unknown_name_is_an_error_before_anything_changes(model):
    with pytest.raises(HookNameError, match=r"'hook_im'.*Nearest: 'hook_in'"):
        model.run_with_hooks(X, fwd_hooks=[("hook_in", plus_one), ("hook_im", plus_one)])
    with pytest.raises(KeyError):
        model.add_hook("inner", plus_one)
    with pytest.raises(HookNameError):
        model.run_with_cache(X, names_filter=["hook_in", "nothing"])
    assert not model.list_hooks() and model.context_level == 0


def test_a_predicate_that_matches_nothing_warns(model):
    with pytest.warns(UserWarning, match="matches none of the 2 hook points"):
        model.run_with_hooks(X, fwd_hooks=[(lambda name: False, plus_one)])
    with pytest.warns(UserWarning, match="cache will be empty"):
        _, cache = model.run_with_cache(X, names_filter=lambda name: False)
    assert cache == {}


def test_cache_with_gradients(model):
    _, cache = model.run_with_cache(X.clone().requires_grad_(), incl_bwd=True)
    assert set(cache) == {"hook_in", "inner.1", "hook_in_grad", "inner.1_grad"}
    weight = model.inner[0].weight
    assert torch.allclose(cache["hook_in_grad"], weight.sum(0).expand_as(X))


def test_add_caching_hooks_fills_at_every_forward(model):
    cache = model.add_caching_hooks("hook_in")
    model(X)
    assert torch.equal(cache["hook_in"], X)
    model(2 * X)
    assert torch.equal(cache["hook_in"], 2 * X)
    model.reset_hooks()


def test_bare_hook_point_takes_the_axes_of_its_place():
    class Known(nn.Module):
        AXES = {"hook_a": "batch pos d_model"}

        def __init__(self):
            super().__init__()
            self.hook_a = HookPoint()

    class Root(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.known = Known()
            self.setup()

    assert Root().known.hook_a.axes == "batch pos d_model"


def test_context_dict_is_cleared(model):
    model.hook_dict["hook_in"].ctx["seen"] = 1
    model.reset_hooks()
    assert model.hook_dict["hook_in"].ctx == {}
