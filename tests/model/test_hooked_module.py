"""`HookedModule`: every submodule of any module can be looked at and patched, and nothing lies."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fastlens import HookedRootModule, HookPoint
from fastlens.errors import HookNameError, ShapeError
from fastlens.model.hooked_module import HookedModule
from tests.close import assert_close_to

ROOT = Path(__file__).parents[2]


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclass
class Record:
    value: torch.Tensor
    note: str = "kept"


class Parts(nn.Module):
    """Returns a structure of the kind it is told."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, scale=None, *rest, **more):
        x = x if scale is None else x * scale
        return {
            "tuple": lambda: (x, None, [x + 1, "text"]),
            "dict": lambda: {"a": x, "b": {"c": x + 1}},
            "named": lambda: Pair(x, x + 1),
            "record": lambda: Record(x),
        }[self.kind]()


class Net(nn.Module):
    """Two linear layers and a residual path; the activation works in place and is used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.step = 3

    def forward(self, x, shift=0.0):
        y = self.act(self.first(x))
        return x + self.act(self.second(y)) + shift


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def double(value, hook):
    return 2 * value


# -- names ---------------------------------------------------------------------------------------


def test_every_submodule_has_its_two_places(net):
    model = HookedModule(net)
    assert isinstance(model, HookedRootModule)
    assert list(model.hook_dict) == [
        f"{prefix}{end}"
        for prefix in ("", "first.", "act.", "second.", "unused.")
        for end in ("hook_in", "hook_out")
    ]
    assert all(isinstance(point, HookPoint) for point in model.hook_points())
    assert set(model.mod_dict) == {"first", "act", "second", "unused"}
    assert model.hook_dict["first.hook_out"].name == "first.hook_out"


def test_a_cache_has_every_value_that_passed(net):
    output, cache = HookedModule(net).run_with_cache(X)
    first = net.first(X)
    want = {
        "hook_in": X,
        "first.hook_in": X,
        "first.hook_out": first,
        "act@0.hook_in": first,
        "act@0.hook_out": first.relu(),
        "second.hook_in": first.relu(),
        "second.hook_out": net.second(first.relu()),
        "act@1.hook_in": net.second(first.relu()),
        "act@1.hook_out": net.second(first.relu()).relu(),
        "hook_out": output,
    }
    assert set(cache) == set(want)
    for name, value in want.items():
        assert torch.equal(cache[name], value), name
    assert torch.equal(output, net(X))
    assert not net._forward_hooks and not net.act._forward_hooks


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("tuple", ["hook_out.0", "hook_out.2.0"]),
        ("dict", ["hook_out.a", "hook_out.b.c"]),
        ("named", ["hook_out.left", "hook_out.right"]),
        ("record", ["hook_out.value"]),
    ],
)
def test_parts_of_structures_are_seen_and_replaced(kind, names):
    if kind == "named":
        names = ["hook_out.0", "hook_out.1"]
    model = HookedModule(nn.Sequential(Parts(kind)))
    plain, cache = model.run_with_cache(X, names_filter=lambda name: name.startswith("0.hook_out"))
    assert list(cache) == [f"0.{name}" for name in names]
    last = f"0.{names[-1]}"
    patched = model.run_with_patches(X, patches={last: torch.zeros_like(X)})
    assert type(patched) is type(plain)
    leaves = torch.utils._pytree.tree_leaves if kind != "record" else lambda r: [r.value, r.note]
    before, after = leaves(plain), leaves(patched)
    changed = [not same(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(changed) == 1
    assert torch.equal(after[changed.index(True)], torch.zeros_like(X))


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_arguments_go_by_their_names():
    model = HookedModule(nn.Sequential(Parts("record")))
    inner = model.wrapped[0]
    one = torch.ones(())
    with model.hooks() as hooked, pytest.raises(HookNameError):
        hooked.add_hook("0.hook_in.nothing.at.all.hook_ot", double)
        raise HookNameError("unreached")
    seen = []
    model.add_hook(
        lambda name: name.startswith("0.hook_in"), lambda v, hook: seen.append(hook.name)
    )
    inner(X, one, one * 2, key=one * 3)
    inner(scale=one, x=X)
    model.reset_hooks()
    assert seen == [
        *("0.hook_in", "0.hook_in.scale", "0.hook_in.rest.0", "0.hook_in.key"),
        *("0.hook_in.scale", "0.hook_in"),
    ]
    model.add_hook("0.hook_in.scale", lambda v, hook: v + 1)
    assert torch.equal(inner(x=X, scale=one).value, 2 * X)
    assert torch.equal(inner(X, one).value, 2 * X)
    model.reset_hooks()


def test_a_hook_replaces_what_everything_after_it_sees(net):
    model = HookedModule(net)
    for name, want in {
        "first.hook_out": lambda x: net.first(x) * 2,
        "second.hook_in": lambda x: net.first(x).relu() * 2,
    }.items():
        h = want(X)
        h = h.relu() if name == "first.hook_out" else h
        got = model.run_with_hooks(X, fwd_hooks=[(name, double)])
        assert_close_to(got, X + net.second(h).relu())
    assert_close_to(model.run_with_hooks(X, fwd_hooks=[("hook_out", double)]), 2 * net(X))
    # The module's own input is replaced on every path.
    assert_close_to(model.run_with_hooks(X, fwd_hooks=[("hook_in", double)]), net(2 * X))
    assert_close_to(model(X, shift=1.0), net(X, shift=1.0))
    assert torch.equal(model(X), net(X))


# -- never silently wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("first", r"'first' is a module: name first.hook_in or first.hook_out"),
        ("frist.hook_out", r"no hook point named 'frist.hook_out'.*Nearest: 'first.hook_out'"),
        ("first.hook_outt", r"no hook point.*Nearest: 'first.hook_out'"),
        ("unused.hook_out", r"'unused' was not called in this run"),
        ("first.hook_out.0", r"first's? ?hook_out|there were 'first.hook_out'\."),
        ("act@2.hook_out", r"there were 'act.hook_out', 'act@0.hook_out', 'act@1.hook_out'"),
        ("first.hook_in.weight", r"there were 'first.hook_in'"),
    ],
)
def test_a_name_that_is_not_passed_is_an_error_with_what_was_there(net, name, message):
    model = HookedModule(net)
    for run in (
        lambda: model.run_with_cache(X, names_filter=["first.hook_in", name]),
        lambda: model.run_with_hooks(X, fwd_hooks=[(name, double)]),
        lambda: model.run_with_patches(X, patches={name: X}),
    ):
        with pytest.raises(HookNameError, match=message):
            run()
        assert not model.list_hooks() and model.context_level == 0 and not net._forward_hooks
    with pytest.raises(HookNameError), model.hooks(fwd_hooks=[(name, double)]):
        model(X)


def test_a_hook_that_stays_warns_in_runs_that_do_not_pass_it(net):
    model = HookedModule(net)
    model.add_hook("unused.hook_out", double)
    with pytest.warns(UserWarning, match="a hook is on, but 'unused.hook_out' was not passed"):
        model(X)
    model.reset_hooks()
    model(X)


def test_a_predicate_that_matches_nothing_warns(net):
    model = HookedModule(net)
    with pytest.warns(UserWarning, match="matches none of the .* places that were passed"):
        _, cache = model.run_with_cache(X, names_filter=lambda name: "unused" in name)
    assert len(cache) == 0


def test_a_hook_at_a_place_of_several_calls_runs_at_each(net):
    model, calls = HookedModule(net), []
    model.run_with_hooks(X, fwd_hooks=[("act.hook_out", lambda v, hook: calls.append(hook.call))])
    assert calls == [0, 1]
    h = net.first(X).relu()
    got = model.run_with_hooks(X, fwd_hooks=[("act@1.hook_out", double)])
    assert_close_to(got, X + 2 * net.second(h).relu())
    got = model.run_with_hooks(X, fwd_hooks=[("act@0.hook_out", double)])
    assert_close_to(got, X + net.second(2 * h).relu())
    _, cache = model.run_with_cache(X, names_filter="act@1.hook_out")
    assert list(cache) == ["act@1.hook_out"]
    with pytest.raises(
        KeyError, match="passed 2 times. Its activations are 'act@0.hook_out', 'act"
    ):
        model.run_with_cache(X)[1]["act.hook_out"]
    with pytest.raises(HookNameError, match="passed more than once.*'act@0.hook_out' or 'act@1"):
        model.run_with_patches(X, patches={"act.hook_out": X})


def test_calls_are_counted_anew_in_every_run(net):
    model = HookedModule(net)
    cache = model.add_caching_hooks(["act.hook_out", "first.hook_out"])
    model(X)
    model(2 * X)
    assert set(cache) == {"act@0.hook_out", "act@1.hook_out", "first.hook_out"}
    assert torch.equal(cache["first.hook_out"], net.first(2 * X))
    net.forward = lambda x: net.act(net.first(x))
    model(X)
    assert set(cache) == {"act.hook_out", "first.hook_out"}
    # A submodule called by itself is a run as well.
    model.first(3 * X)
    assert torch.equal(cache["first.hook_out"], net.first(3 * X))
    model.reset_hooks()


def test_work_in_place_does_not_reach_a_cache_or_a_patch(net):
    model = HookedModule(net)
    _, cache = model.run_with_cache(X)
    assert (cache["first.hook_out"] < 0).any()  # before the ReLU that worked on it
    kept = cache["first.hook_out"].clone()
    for _ in range(2):
        got = model.run_with_hooks(
            2 * X, fwd_hooks=[("first.hook_out", lambda v, hook: cache["first.hook_out"])]
        )
        assert_close_to(got, 2 * X + net.second(kept.clone().relu()).relu())
        assert torch.equal(cache["first.hook_out"], kept)


def test_modules_shared_under_two_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    net, x = Tied(), torch.randn(2, 3)
    model = HookedModule(net)
    _, cache = model.run_with_cache(x)
    assert {n for n in cache if "@" in n} == {
        "a@0.hook_in", "a@0.hook_out", "a@1.hook_in", "a@1.hook_out",
    }  # fmt: skip
    _, cache = model.run_with_cache(x, names_filter="b@1.hook_out")
    assert torch.equal(cache["b@1.hook_out"], net(x))
    # A predicate that likes both names acts once a call.
    got = model.run_with_hooks(x, fwd_hooks=[(lambda name: name.endswith("hook_in"), double)])
    assert_close_to(got, net.a(2 * net.a(2 * (2 * x))))
    # One that likes only the second name finds it.
    got = model.run_with_hooks(x, fwd_hooks=[(lambda name: name == "b.hook_out", double)])
    assert_close_to(got, 2 * net.a(2 * net.a(x)))


def test_parts_without_gradients_are_seen_and_a_missing_gradient_is_an_error(net):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            with torch.no_grad():
                h = self.body(x)
            return self.head(h).sum()

    model = HookedModule(Frozen())
    _, cache = model.run_with_cache(X, incl_bwd=True)
    assert "body.hook_out" in cache and "head.hook_out_grad" in cache
    assert "body.hook_out_grad" not in cache
    with pytest.raises(HookNameError, match="no gradient reached 'body.hook_out'"):
        model.run_with_cache(X, names_filter=["body.hook_out", "head.hook_out"], incl_bwd=True)


def test_gradients_are_those_of_each_place_and_call(net):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).square().sum()

    x = X.clone().requires_grad_()
    _, cache = HookedModule(Loss()).run_with_cache(x, incl_bwd=True)
    first = net.first(X).detach().requires_grad_()
    y = first.relu()
    y.retain_grad()
    z = net.second(y)
    z.retain_grad()
    out = X + z.relu()
    out.retain_grad()
    out.square().sum().backward()
    assert_close_to(cache["net.first.hook_out_grad"], first.grad)
    assert_close_to(cache["net.act@0.hook_out_grad"], y.grad)
    assert_close_to(cache["net.act@1.hook_in_grad"], z.grad)
    assert_close_to(cache["net.hook_out_grad"], out.grad)
    # What enters `first` is used by the residual path as well: only its own part.
    assert_close_to(cache["net.first.hook_in_grad"], first.grad @ net.first.weight)
    assert_close_to(x.grad, cache["net.hook_in_grad"])


def test_backward_hooks_see_and_replace_gradients(net):
    model, seen = HookedModule(net), []
    x = X.clone().requires_grad_()
    with model.hooks(bwd_hooks=[("second.hook_out", lambda g, hook: seen.append(g))]):
        model(x).sum().backward()
    assert seen[0].shape == (2, 4)
    with model.hooks(bwd_hooks=[("second.hook_out", lambda g, hook: torch.zeros_like(g))]):
        x.grad = None
        model(x).sum().backward()
    assert_close_to(x.grad, torch.ones_like(X))


def test_gradients_flow_through_a_patch(net):
    value = torch.zeros(2, 4, requires_grad=True)
    HookedModule(net).run_with_patches(X, patches={"second.hook_in": value}).sum().backward()
    assert value.grad is not None and value.grad.abs().sum() > 0
    assert net.first.weight.grad is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_come_off_when_one_raises(net, error):
    model = HookedModule(net)

    def stop(value, hook):
        raise error

    for name in ("second.hook_in", "second.hook_out", lambda name: "second" in name):
        with pytest.raises(error):
            model.run_with_hooks(X, fwd_hooks=[("first.hook_out", double), (name, stop)])
        assert not model.list_hooks() and model.context_level == 0
        assert not any(module._forward_hooks for module in net.modules())
    _, cache = model.run_with_cache(X)
    assert "act@1.hook_in" in cache and "act@2.hook_in" not in cache


def test_runs_that_were_broken_off_do_not_count_in_later_ones(net):
    """Also where the module is called itself, as ``generate`` does."""
    model = HookedModule(net)
    whole = set(model.run_with_cache(X)[1])

    def stop(value, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.hooks([("second.hook_in", stop)]):
        net(X)
    assert set(model.run_with_cache(X)[1]) == whole

    # A permanent hook keeps its module, and the whole, watched.
    model.add_hook("first.hook_out", double, is_permanent=True)
    with pytest.raises(KeyboardInterrupt), model.hooks([("second.hook_in", stop)]):
        net(X)
    assert set(model.run_with_cache(X)[1]) == whole
    model.reset_hooks(including_permanent=True)

    model.add_hook("second.hook_in", lambda value, hook: model.reset_hooks())
    net(X)
    assert set(model.run_with_cache(X)[1]) == whole


def test_a_wrong_answer_of_a_hook_is_refused(net):
    model = HookedModule(net)
    with pytest.raises(TypeError, match="'first.hook_out' returned tuple"):
        model.run_with_hooks(X, fwd_hooks=[("first.hook_out", lambda v, hook: (v, v))])
    with pytest.raises(ShapeError, match=r"shape \[3\].*'first.hook_out'.*\[2, 4\]"):
        model.run_with_patches(X, patches={"first.hook_out": torch.zeros(3)})
    with pytest.raises(ShapeError, match="pos_slice"):
        model.run_with_cache(X, pos_slice=-1)
    with pytest.raises(TypeError, match="plain torch.nn.Module"):
        HookedModule(model)


# -- the wrapped module stays as it is -----------------------------------------------------------


def test_nothing_is_left_on_the_module_and_nothing_is_added_to_it(net):
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    model = HookedModule(net)
    model.run_with_cache(X)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before
    assert list(model.state_dict()) == list(net.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert model.wrapped is net and model.first is net.first
    assert model.first._forward_hooks == {} and model._places.taps == {}


def test_attributes_are_read_and_written_there(net):
    model = HookedModule(net)
    assert model.step == 3
    model.step = 4
    assert net.step == 4
    model.first = nn.Linear(4, 4)
    assert net.first is model.first
    model.setup()
    assert model.mod_dict["first"] is net.first
    assert not model.eval().training and not net.training and not net.act.training
    assert model.train() is model and net.training
    assert model.double().first.weight.dtype == torch.float64
    assert model.to(torch.float32) is model and net.second.weight.dtype == torch.float32
    model.load_state_dict({k: torch.zeros_like(v) for k, v in net.state_dict().items()})
    assert net.second.weight.abs().max() == 0
    with pytest.raises(AttributeError, match="nothing_here"):
        model.nothing_here  # noqa: B018
    assert "Net" in repr(model)
    counted = []
    model.apply(lambda module: counted.append(type(module).__name__))
    assert counted[-1] == "Net"


def test_hooks_stay_on_through_setup_and_act_however_the_module_is_called(net):
    model = HookedModule(net)
    plain = net(X)
    model.add_hook("hook_out", double)
    model.hook_dict["second.hook_out"].add_hook(lambda v, hook: torch.zeros_like(v))
    model.setup()
    assert_close_to(net(X), 2 * X)
    assert_close_to(model(X), 2 * X)
    assert list(model.list_hooks()) == ["hook_out", "second.hook_out"]
    assert len(model.hook_dict["hook_out"].fwd_hooks) == 1
    model.hook_dict["second.hook_out"].remove_hooks("fwd")
    assert_close_to(net(X), 2 * plain)
    model.reset_hooks()
    assert torch.equal(net(X), plain)


def test_permanent_hooks_levels_and_prepend(net):
    model, order = HookedModule(net), []
    model.add_perma_hook("first.hook_out", lambda v, hook: order.append("permanent"))
    model.add_perma_hook(lambda n: n == "second.hook_out", lambda v, hook: order.append("rule"))
    model.add_hook("first.hook_out", lambda v, hook: order.append("before"), prepend=True)
    with model.hooks(fwd_hooks=[("first.hook_out", lambda v, hook: order.append("level"))]):
        model(X)
    assert order == ["before", "permanent", "level", "rule"]
    model.reset_hooks()
    order.clear()
    model(X)
    assert order == ["permanent", "rule"]
    model.reset_hooks(including_permanent=True)
    assert not model._places.taps and not model._places.rules


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_keep_their_hooks(net, travel):
    model = HookedModule(net)
    model.add_hook("hook_out", double)
    other = travel(model)
    assert torch.equal(other(X), model(X)) and other.first is not net.first
    other.reset_hooks()
    assert_close_to(2 * other(X), model(X))
    other.first.weight.data.zero_()
    assert net.first.weight.abs().max() > 0
    model.reset_hooks()


def test_it_can_be_part_of_another_module(net):
    outer = nn.Sequential(HookedModule(net), nn.Linear(4, 1))
    assert "0.first.weight" in outer.state_dict()
    file = io.BytesIO()
    torch.save(outer.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        net.first.weight.zero_()
    outer.load_state_dict(torch.load(file))
    assert net.first.weight.abs().max() > 0
    assert len(list(outer.parameters())) == 8


def test_a_whole_cache_costs_one_copy_of_each_value():
    model = HookedModule(nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(4, 4)))
    _, cache = model.run_with_cache(X)
    assert len({value.data_ptr() for value in cache.values()}) == 2
    ref = weakref.ref(model)
    del model, cache
    gc.collect()
    assert ref() is None


# -- other kinds of modules ------------------------------------------------------------------------


def test_parametrized_modules():
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).eval()
    net = nn.Sequential(layer, nn.ReLU())
    model = HookedModule(net)
    output, cache = model.run_with_cache(X)
    assert torch.equal(output, net(X))
    assert torch.equal(cache["0.hook_out"], layer(X))
    weight = cache["0.parametrizations.weight.hook_out"]
    assert torch.equal(weight, layer.weight)


def test_inference_mode_and_remove_batch_dim(net):
    model = HookedModule(net)
    with torch.inference_mode():
        _, cache = model.run_with_cache(X[:1], remove_batch_dim=True)
    assert cache["first.hook_out"].shape == (4,)
    _, plain = model.run_with_cache(X[:1], return_cache_object=False)
    assert isinstance(plain, dict) and plain["first.hook_out"].shape == (1, 4)
    with pytest.raises(ShapeError, match="batch of one"):
        model.run_with_cache(X, remove_batch_dim=True)


def test_lstm_and_transformer_layers_take_no_way_around_the_hooks():
    lstm = HookedModule(nn.LSTM(4, 3, batch_first=True))
    x = torch.randn(2, 5, 4)
    (out, (h, c)), cache = lstm.run_with_cache(x)
    assert torch.equal(cache["hook_out.1.0"], h) and torch.equal(cache["hook_out.0"], out)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    with torch.no_grad():
        plain = layer(x)
        model = HookedModule(layer)
        got, cache = model.run_with_cache(x)
        assert_close_to(got, plain)
        assert torch.equal(cache["linear1.hook_out"], layer.linear1(cache["linear1.hook_in"]))
        zero = model.run_with_hooks(x, fwd_hooks=[("linear2.hook_out", lambda v, hook: v * 0)])
        assert (zero - plain).abs().max() > 1e-3
        # Attention reads this one's weights without calling it.
        with pytest.raises(HookNameError, match="read its weights directly"):
            model.run_with_hooks(x, fwd_hooks=[("self_attn.out_proj.hook_out", double)])


def test_checkpointed_parts_get_their_gradients():
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(checkpoint(self.a, x, use_reentrant=False)).sum()

    net = Net()
    _, cache = HookedModule(net).run_with_cache(X, incl_bwd=True)
    want = torch.ones(2, 4) @ net.b.weight
    assert_close_to(cache["a.hook_out_grad"], want)


@pytest.fixture(scope="module")
def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=50, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def test_a_hugging_face_model(gpt2):
    model = HookedModule(gpt2)
    clean = torch.randint(0, 50, (2, 7))
    corrupted = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        want = gpt2(clean).logits
        output, cache = model.run_with_cache(clean, attention_mask=torch.ones(2, 7).long())
        assert_close_to(output.logits, want)
        assert model.config is gpt2.config
        x = cache["transformer.h.0.hook_in"]
        attn = cache["transformer.h.0.attn.hook_out.0"]
        mlp = cache["transformer.h.0.mlp.hook_out"]
        assert_close_to(cache["transformer.h.1.hook_in"], x + attn + mlp)
        assert model.hook_dict["transformer.h.1.mlp.hook_out"].layer() == 1
        # Patching the last block's input and output restores everything; one head position, a part.
        for name in ("transformer.h.1.hook_in", "transformer.h.1.hook_out"):
            patched = model.run_with_patches(corrupted, patches={name: cache[name]})
            assert type(patched) is type(output)
            assert_close_to(patched.logits, want)

        def last_position(value, hook):
            value = value.clone()
            value[:, -1] = cache[hook.name][:, -1]
            return value

        hooks = [("transformer.h.1.hook_out", last_position)]
        patched = model.run_with_hooks(corrupted, fwd_hooks=hooks).logits
        assert_close_to(patched[:, -1], want[:, -1])
        assert_close_to(patched[:, :-1], gpt2(corrupted).logits[:, :-1])
        # Parts of a ModelOutput, by key.
        name = "transformer.hook_out.last_hidden_state"
        patched = model.run_with_patches(corrupted, patches={name: cache[name]})
        assert_close_to(patched.logits, want)
    assert torch.equal(gpt2(clean).logits, want)


def test_hooks_act_in_generate(gpt2):
    model, tokens = HookedModule(gpt2), torch.randint(1, 50, (1, 4))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0,
               "attention_mask": torch.ones(1, 4).long()}  # fmt: skip
    shapes = []
    model.add_hook("transformer.h.0.hook_out", lambda v, hook: shapes.append(tuple(v.shape)))
    model.generate(tokens, **options)
    model.reset_hooks()
    assert len(shapes) == 3 and shapes[0] == (1, 4, 16) and shapes[1] == (1, 1, 16)


def test_gradients_of_a_hugging_face_model_equal_retained_ones(gpt2):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = gpt2

        def forward(self, tokens):
            return F.cross_entropy(
                self.lm(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].ravel()
            )

    tokens, kept = torch.randint(0, 50, (2, 7)), {}
    _, cache = HookedModule(Loss()).run_with_cache(tokens, incl_bwd=True)
    handle = gpt2.transformer.h[0].mlp.register_forward_hook(
        lambda module, args, out: kept.setdefault("mlp", out).retain_grad()
    )
    Loss()(tokens).backward()
    handle.remove()
    assert_close_to(cache["lm.transformer.h.0.mlp.hook_out_grad"], kept["mlp"].grad, atol=1e-7)


COMPILED = """
import torch
from fastlens.model.hooked_module import HookedModule

torch.manual_seed(0)
torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
x = torch.randn(2, 4)
want = net(x)
zero = lambda value, hook: value * 0
for compiled in ("outside", "inside", "in place"):
    torch._dynamo.reset()
    inner = torch.compile(net, backend="eager") if compiled == "inside" else net
    model = HookedModule(inner)
    call = torch.compile(model, backend="eager") if compiled == "outside" else model
    if compiled == "in place":
        net.compile(backend="eager")
    assert torch.equal(call(x), want), compiled
    prefix = "_orig_mod." if compiled == "inside" else ""
    got = model.run_with_hooks(x, fwd_hooks=[(prefix + "0.hook_out", zero)])
    assert torch.equal(got, net[2](torch.zeros(2, 4)).expand(2, 4)), compiled
    model.add_hook(prefix + "2.hook_out", zero)
    assert call(x).abs().max() == 0, compiled
    model.reset_hooks()
    assert torch.equal(call(x), want), compiled
    _, cache = model.run_with_cache(x)
    assert torch.equal(cache[prefix + "2.hook_out"], want), compiled
    part = torch.compile(net, backend="eager")
    assert torch.equal(part(x), want), compiled
    with model.hooks([(prefix + "2.hook_out", zero)]):
        assert part(x).abs().max() == 0, compiled
    assert torch.equal(part(x), want), compiled
    if compiled == "inside":
        continue
    model.add_hook(prefix + "2.hook_out", zero)
    late = torch.compile(model, backend="eager")
    assert late(x).abs().max() == 0, compiled
    model.reset_hooks()
    assert torch.equal(late(x), want), compiled
print("compiled")
"""


def test_compiled_modules_do_not_overlook_hooks():
    result = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout == "compiled\n", result.stderr[-3000:]


def test_no_compiler_is_loaded_for_modules_that_are_not_compiled():
    code = """
import sys, torch
from fastlens.model.hooked_module import HookedModule
HookedModule(torch.nn.Linear(2, 2)).run_with_cache(torch.ones(1, 2))
assert "torch._dynamo" not in sys.modules
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-2000:]


def test_no_warning_is_emitted_in_a_plain_run(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HookedModule(net).run_with_cache(X)


def test_a_sweep_over_it_is_refused_with_what_to_use_instead(gpt2):
    from fastlens import patching
    from fastlens.errors import SweepError
    from fastlens.patching.model import check_patchable
    from tests.models import ours, prompts

    with pytest.raises(SweepError, match="HookedModule cannot be swept.*HookedTransformer"):
        check_patchable(HookedModule(gpt2))
    # One around a hooked model has that model's methods, but other names.
    model, tokens = HookedModule(ours("gpt2")), prompts(1, 6)
    with pytest.raises((SweepError, HookNameError)):
        patching.sweep(model, tokens, tokens.flip(-1), metric=lambda logits: logits[0, -1, 0])
