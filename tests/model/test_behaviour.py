"""What programs written for TransformerLens do to a model, done to both libraries' models.

A program gets a `Library` and returns values. The weights are the same, so the values must be.
"""

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from fastlens import ActivationCache, HookedTransformer
from fastlens.hooks.point import LensHandle
from tests.close import assert_close_to
from tests.compat.library import Library
from tests.configs import TINY_CONFIGS, tiny
from tests.models import ours, prompts, theirs

ROOT = Path(__file__).parents[2]
TOKENS = prompts()


def same(got, want, name, atol=2e-5):
    """Equal in shape, type and value, through containers."""
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype, name
        want, got = want.detach(), got.detach()
        finite = want[want.isfinite()].abs() if want.is_floating_point() else want.abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        assert_close_to(got, want, atol=atol * max(1.0, largest), name=name)
    elif isinstance(want, dict):
        assert list(got) == list(want), name
        for key in want:
            same(got[key], want[key], f"{name}[{key!r}]", atol)
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), name
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            same(one, other, f"{name}[{i}]", atol)
    else:
        assert got == want, name


def set_deep(root, path, value):
    """What SAELens' `set_deep_attr` does."""
    *parents, last = path.split(".")
    for part in parents:
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    setattr(root, last, value)


# -- subclasses and replaced parts --------------------------------------------------------------


def subclass(lens):
    base, point = lens("HookedTransformer.HookedTransformer"), lens("hook_points.HookPoint")

    class Probed(base):
        """A model with a probe that reads, and a forward of its own."""

        def __init__(self, cfg):
            super().__init__(cfg)
            generator = torch.Generator().manual_seed(5)
            self.probe = nn.Linear(cfg.d_model, 3)
            self.probe.weight.data.copy_(torch.randn(3, cfg.d_model, generator=generator))
            self.probe.bias.data.zero_()
            self.hook_probe = point()
            self.calls = 0
            self.setup()

        def forward(self, *args, probe=False, **kwargs):
            self.calls += 1
            if not probe:
                return super().forward(*args, **kwargs)
            return self.hook_probe(self.probe(super().forward(*args, stop_at_layer=-1, **kwargs)))

    with lens.quiet():
        model = Probed(lens.cfg())
    logits = model(TOKENS)
    edited = model.run_with_hooks(
        TOKENS, probe=True, fwd_hooks=[("hook_probe", lambda a, hook: a * 2)]
    )
    out, cache = model.run_with_cache(TOKENS, probe=True)
    parameters = [name for name, _ in model.named_parameters()][-3:]
    return {
        "logits": logits,
        "edited": edited,
        "out": out,
        "names": list(model.hook_dict),
        "cached": {key: cache[key] for key in ("hook_probe", "blocks.1.hook_resid_post")},
        "calls": model.calls,
        "parameters": parameters,
        "found": "probe" in model.mod_dict,
    }


def circuit_tracer(lens):
    """Its `ReplacementModel`: MLP and unembedding wrapped, gradients stopped, new points."""
    point = lens("hook_points.HookPoint")

    class ReplacementMLP(nn.Module):
        def __init__(self, old):
            super().__init__()
            self.old_mlp = old
            self.hook_in = point()
            self.hook_out = point()

        def forward(self, x):
            return self.hook_out(self.old_mlp(self.hook_in(x)))

    class ReplacementUnembed(nn.Module):
        def __init__(self, old):
            super().__init__()
            self.old_unembed = old
            self.hook_pre = point()
            self.hook_post = point()

        W_U = property(lambda self: self.old_unembed.W_U)
        b_U = property(lambda self: self.old_unembed.b_U)

        def forward(self, x):
            return self.hook_post(self.old_unembed(self.hook_pre(x)))

    model = lens.fresh("gpt2")
    for block in model.blocks:
        block.mlp = ReplacementMLP(block.mlp)
    model.unembed = ReplacementUnembed(model.unembed)

    kept = {}
    generator = torch.Generator().manual_seed(3)
    transcoder = torch.randn(32, 32, generator=generator) * 0.1

    def keep(acts, hook):
        kept["acts"] = acts

    def skip(acts, hook, grad_hook):
        through = kept.pop("acts") @ transcoder
        return grad_hook(through + (acts - through).detach())

    for block in model.blocks:
        block.mlp.hook_in.add_hook(keep, is_permanent=True)
        block.mlp.hook_out.hook_out_grad = point()
        block.mlp.hook_out.add_hook(
            partial(skip, grad_hook=block.mlp.hook_out.hook_out_grad), is_permanent=True
        )
        for part in (block.attn.hook_pattern, block.ln1.hook_scale, block.ln2.hook_scale):
            part.add_hook(lambda acts, hook: acts.detach(), is_permanent=True)
    model.ln_final.hook_scale.add_hook(lambda acts, hook: acts.detach(), is_permanent=True)
    for parameter in model.parameters():
        parameter.requires_grad = False

    def enable(tensor, hook):
        tensor.requires_grad = True
        return tensor

    model.hook_embed.add_hook(enable, is_permanent=True)
    shared = {}
    for block in model.blocks:
        shared.setdefault(block.attn.mask.shape, block.attn.mask)
        block.attn.mask = shared[block.attn.mask.shape]
    model.setup()

    logits, cache = model.run_with_cache(TOKENS)
    grads = {}

    def keep_grad(grad, hook):
        grads[hook.name] = grad.clone()

    names = [n for n in model.hook_dict if n.endswith("hook_out_grad")]
    with model.hooks(bwd_hooks=[(name, keep_grad) for name in [*names, "blocks.0.hook_resid_pre"]]):
        residual = model(TOKENS)
        residual[:, -1, 7].sum().backward()
    edited = model.run_with_hooks(
        TOKENS, fwd_hooks=[("blocks.1.mlp.hook_out", lambda a, hook: a + 1)]
    )
    return {
        "logits": logits,
        "grads": grads,
        "edited": edited,
        "names": list(model.hook_dict),
        "in": cache["blocks.1.mlp.hook_in"],
        "inner": cache["blocks.2.mlp.old_mlp.hook_post"],
        "W_U": model.W_U,
        "pre": cache["unembed.hook_pre"],
    }


def saelens(lens):
    """Its `HookedSAETransformer`: an SAE where a HookPoint was, with HookPoints of its own."""
    root, point = lens("HookedRootModule.HookedRootModule"), lens("hook_points.HookPoint")

    class SAE(root):
        def __init__(self, use_error):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                super().__init__()
            generator = torch.Generator().manual_seed(8)
            self.W_enc = nn.Parameter(torch.randn(32, 48, generator=generator) * 0.2)
            self.W_dec = nn.Parameter(torch.randn(48, 32, generator=generator) * 0.2)
            self.use_error = use_error
            self.hook_sae_input = point()
            self.hook_sae_acts_post = point()
            self.hook_sae_recons = point()
            self.hook_sae_output = point()
            self.setup()

        def forward(self, x):
            codes = self.hook_sae_acts_post((self.hook_sae_input(x) @ self.W_enc).relu())
            out = self.hook_sae_recons(codes @ self.W_dec)
            if self.use_error:
                with torch.no_grad():
                    clean = (x @ self.W_enc).relu() @ self.W_dec
                out = out + (x - clean)
            return self.hook_sae_output(out)

    found = {}
    for place in ("blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre", "hook_embed"):
        for use_error in (False, True):
            model = lens.fresh("gpt2")
            plain = model(TOKENS)
            set_deep(model, place, SAE(use_error))
            model.setup()
            spliced, cache = model.run_with_cache(TOKENS)
            codes = f"{place}.hook_sae_acts_post"
            ablated = model.run_with_hooks(TOKENS, fwd_hooks=[(codes, lambda a, hook: a * 0)])
            _, few = model.run_with_cache(TOKENS, names_filter=[codes])
            set_deep(model, place, point())
            model.setup()
            assert_close_to(model(TOKENS), plain)
            if use_error:
                assert_close_to(spliced, plain, atol=2e-5)
            found[place, use_error] = {
                "spliced": spliced,
                "codes": cache[codes],
                "keys": list(cache.keys()),
                "ablated": ablated,
                "few": list(few.keys()),
                "names": list(model.hook_dict),
            }
    return list(found.values())


def mlp_forward_on_the_instance(lens):
    model = lens.fresh("llama")
    for block in model.blocks:
        old = block.mlp.forward
        block.mlp.forward = lambda x, old=old: old(x) * 0.5
    logits, cache = model.run_with_cache(TOKENS)
    return logits, cache["mlp_out", 1], model(TOKENS)


def parts_of_attention_on_the_instance(lens):
    model = lens.fresh("gpt2")
    attn = model.blocks[1].attn
    old = attn.apply_causal_mask
    attn.apply_causal_mask = lambda scores, *args, **kwargs: old(scores * 2, *args, **kwargs)
    return model(TOKENS)


PROGRAMS = [
    subclass,
    circuit_tracer,
    saelens,
    mlp_forward_on_the_instance,
    parts_of_attention_on_the_instance,
]


# -- weights -------------------------------------------------------------------------------------


def weights_in_place(lens):
    model, found = lens.fresh("gpt2"), []
    with torch.no_grad():
        model.W_E.data.mul_(1.5)
        found.append(model(TOKENS))
        model.blocks[0].attn.W_Q.data[:] = 0.1
        found.append(model(TOKENS))
        model.blocks[1].attn.W_K[1] += 0.3
        model.blocks[1].mlp.W_in[:, 3] = 0
        model.unembed.W_U[:, 5] = 1.0
        model.unembed.b_U += 1
        found.append(model(TOKENS))
        model.blocks[2].attn.W_V = nn.Parameter(model.blocks[2].attn.W_V.detach().flip(0))
        model.blocks[2].mlp.W_out = nn.Parameter(torch.ones_like(model.blocks[2].mlp.W_out))
        found.append(model(TOKENS))
        model.W_Q[:] = 7.0  # a stack of copies: no effect
        found.append(model(TOKENS))
        model.W_U.data.zero_()  # the parameter itself
        found.append(model(TOKENS))
    return found, model.W_Q.is_leaf, model.W_E is model.embed.W_E


def grouped_weights_in_place(lens):
    model, found = lens.fresh("llama"), []
    with torch.no_grad():
        model.blocks[0].attn._W_K.data[0] = 0.1
        found.append(model(TOKENS))
        model.blocks[0].attn._W_V = nn.Parameter(model.blocks[0].attn._W_V.detach().flip(0))
        model.blocks[1].mlp.W_gate.data.mul_(2)
        found.append(model(TOKENS))
        model.blocks[1].attn.W_K[:] = 5.0  # repeated copies: no effect
        found.append(model(TOKENS))
    return found, model.W_K, model.b_V


def training(lens):
    """A few steps of Adam on everything, then on one layer."""
    model, losses = lens.fresh("gpt2"), []
    for parameters in (list(model.parameters()), list(model.blocks[1].parameters())):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        for _ in range(3):
            loss = model(TOKENS, return_type="loss")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            model.zero_grad()
            losses.append(loss.detach())
    return losses, model.blocks[1].attn.W_O.detach(), model.blocks[0].mlp.b_in.detach()


def frozen_and_hooked_gradients(lens):
    """Gradients with some parameters frozen, flags on, and a hook that scales."""
    model = lens.fresh("llama", use_attn_result=True, use_split_qkv_input=True)
    for block in model.blocks:
        block.attn.W_O.requires_grad_(False)
    loss = model.run_with_hooks(
        TOKENS, return_type="loss", fwd_hooks=[("blocks.1.attn.hook_z", lambda a, hook: a * 2)]
    )
    loss.backward()
    return {name: leaf.grad for name, leaf in model.named_parameters() if leaf.grad is not None}


def gradients_of_inputs(lens):
    """Saliency: gradients of a logit with respect to the residual stream and to an embedding."""
    model = lens.fresh("neox")
    residual = lens.residual.clone().requires_grad_()
    model(residual, start_at_layer=1)[0, -1, 3].backward()
    seen = {}

    def leaf(embed, hook):
        embed = embed.detach().requires_grad_()
        seen["embed"] = embed
        return embed

    model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", leaf)])[0, -1, 3].backward()
    return residual.grad, seen["embed"].grad


PROGRAMS += [
    weights_in_place,
    grouped_weights_in_place,
    training,
    frozen_and_hooked_gradients,
    gradients_of_inputs,
]


# -- hooks and caches ----------------------------------------------------------------------------


def handles(lens):
    model, name = lens.fresh("gpt2"), "blocks.0.attn.hook_z"
    point = model.hook_dict[name]
    double = lambda a, hook: a * 2  # noqa: E731
    point.add_hook(double)
    model.add_hook(name, double, is_permanent=True, level=3)
    model.add_hook(lambda n: n.endswith("hook_z"), double, prepend=True)
    model.add_hook(name, double, dir="bwd")
    found = [
        [(h.is_permanent, h.context_level, h.user_hook is double) for h in point.fwd_hooks],
        [(h.is_permanent, h.context_level, h.user_hook is double) for h in point.bwd_hooks],
        [len(p.fwd_hooks) for p in model.hook_points()],
        len(point._forward_hooks),
        point.has_hooks(level=3),
        point.has_hooks(level=4),
        sorted(vars(point.fwd_hooks[0])),
    ]
    point.fwd_hooks[0].hook.remove()
    found += [len(point._forward_hooks), len(point.fwd_hooks)]
    model.reset_hooks()
    found += [len(point.fwd_hooks), len(point.bwd_hooks)]
    model.reset_hooks(including_permanent=True)
    return [*found, len(point.fwd_hooks), len(point._forward_hooks)]


def contexts(lens):
    model, name, found = lens.fresh("gpt2"), "hook_embed", []

    def count(a, hook):
        hook.ctx["n"] = hook.ctx.get("n", 0) + 1

    found.append(model.context_level)
    with model.hooks(fwd_hooks=[(name, count)]) as same_model:
        found += [model.context_level, same_model is model]
        with model.hooks(fwd_hooks=[(name, count), (name, count)]):
            model(TOKENS)
            found += [model.context_level, [h.context_level for h in model.hook_embed.fwd_hooks]]
        model(TOKENS)
        found += [dict(model.hook_embed.ctx), len(model.hook_embed.fwd_hooks)]
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, count)], clear_contexts=True)
        found.append(dict(model.hook_embed.ctx))
    model.run_with_hooks(TOKENS, fwd_hooks=[(name, count)], reset_hooks_end=False)
    found += [len(model.hook_embed.fwd_hooks), model.context_level, dict(model.hook_embed.ctx)]
    model.reset_hooks(clear_contexts=False)
    found += [dict(model.hook_embed.ctx), len(model.hook_embed.fwd_hooks)]
    model.add_hook(name, count, level=1)
    model.reset_hooks(level=2)
    found.append(len(model.hook_embed.fwd_hooks))
    model.reset_hooks(direction="bwd")
    found.append(len(model.hook_embed.fwd_hooks))
    model.reset_hooks(direction="fwd")
    return [*found, len(model.hook_embed.fwd_hooks), model.is_caching]


def order_of_hooks(lens):
    model, order = lens.fresh("gpt2"), []
    note = lambda what: lambda a, hook: order.append((what, hook.name))  # noqa: E731
    model.add_hook("hook_embed", note("second"))
    model.add_hook("hook_embed", note("first"), prepend=True)
    model.add_perma_hook("hook_embed", note("third"))
    model.run_with_hooks(
        TOKENS, fwd_hooks=[(lambda n: n.startswith("hook_"), note("named by a predicate"))]
    )
    return order


def cached_tensors_in_place(lens):
    """What else of a cache and of the model changes when an entry is edited."""
    found = {}
    for config in ("gpt2", "llama", "neox"):
        model = lens.fresh(config)
        before = model(TOKENS)
        with torch.no_grad():
            for name in list(model.run_with_cache(TOKENS)[1].keys()):
                _, cache = model.run_with_cache(TOKENS)
                kept = {key: value.clone() for key, value in cache.items()}
                cache[name][:] = 0.123
                changed = [key for key in kept if not torch.equal(kept[key], cache[key])]
                found[config, name] = changed
        assert torch.equal(model(TOKENS), before)
    return found


def edits_in_place_by_hooks(lens):
    """Every place, edited in place by a hook: what the model makes of it."""
    found = {}
    for config in ("gpt2", "llama", "neox", "attn_only", "post_norm"):
        model = lens.fresh(config)
        flags = ["use_attn_result", "use_hook_mlp_in", "use_split_qkv_input"]
        for flag in flags:
            if flag != "use_hook_mlp_in" or config != "attn_only":
                getattr(model, f"set_{flag}")(True)

        def edit(a, hook):
            a[:, 1:3] = 0.25

        with torch.no_grad():
            for name in model.hook_dict:
                flag_off = "hook_attn_in" in name or (
                    config == "attn_only" and name.endswith("hook_mlp_in")
                )
                if not flag_off:
                    out = model.run_with_hooks(TOKENS, fwd_hooks=[(name, edit)])
                    found[config, name] = out
    return list(found), list(found.values())


def gradient_modes(lens):
    model, found = lens.fresh("gpt2"), []
    logits, cache = model.run_with_cache(TOKENS)
    found += [logits.requires_grad, any(v.requires_grad for v in cache.values())]
    cache.toggle_autodiff(mode=False)
    found += [torch.is_grad_enabled(), model(TOKENS).requires_grad]
    torch.set_grad_enabled(True)
    with torch.inference_mode():
        logits, cache = model.run_with_cache(TOKENS)
        found += [logits.is_inference(), cache["z", 0].is_inference(), logits.clone()]
    # What was made in inference mode can be used and put in outside.
    patched = model.run_with_hooks(
        TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", lambda a, hook: cache["z", 1].clone())]
    )
    return [*found, patched.requires_grad, patched]


def a_cache_of_the_backward_pass(lens):
    model = lens.fresh("gpt2")
    cache = {}
    model.cache_all(cache, incl_bwd=True)
    model(TOKENS, return_type="loss").backward()
    model.reset_hooks()
    keys = [key for key in cache if ".ln1." not in key]
    return len(cache), {key: cache[key] for key in keys}


PROGRAMS += [
    handles,
    contexts,
    order_of_hooks,
    cached_tensors_in_place,
    edits_in_place_by_hooks,
    gradient_modes,
    a_cache_of_the_backward_pass,
]


@pytest.mark.tl
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_does_the_same(program):
    pytest.importorskip("transformer_lens")
    torch.manual_seed(0)
    want = program(Library(False))
    torch.manual_seed(0)
    got = program(Library(True))
    same(got, want, program.__name__)


@pytest.mark.tl
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_gradients_at_every_place(name):
    """`incl_bwd` keeps a gradient for every place that passes, and it is TransformerLens'."""
    pytest.importorskip("transformer_lens")
    found = []
    for model in (ours(name, dtype=torch.float64), theirs(name, dtype=torch.float64)):
        _, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
        # ln1 runs three times a layer in TransformerLens; its entries are those of the values' run.
        found.append({k: v for k, v in cache.items() if k.endswith("_grad") and ".ln1." not in k})
    got, want = found
    assert set(got) == set(want) and len(want) > 20
    for key, gradient in want.items():
        # TransformerLens' rotary tables are single precision under NTK scaling.
        assert_close_to(got[key], gradient, atol=1e-8, name=key)


# -- mocks that tests written for TransformerLens use ---------------------------------------------


@mock.patch("torch.utils.hooks.RemovableHandle", autospec=True)
def test_hook_points_work_with_a_mocked_handle(handle):
    handle.return_value.id = 0
    handle.return_value.next_id = 1
    model = ours("gpt2")
    point = model.hook_dict["hook_embed"]
    point.add_hook(lambda a, hook: a)
    point.add_hook(lambda a, hook: a, prepend=True)
    point.add_hook(lambda g, hook: g, dir="bwd")
    assert (len(point.fwd_hooks), len(point.bwd_hooks)) == (2, 1)
    assert all(isinstance(one, LensHandle) for one in point.fwd_hooks)


def test_handles_made_by_hand_are_removed_through_their_hook():
    point = ours("gpt2").hook_dict["hook_embed"]
    permanent, level, plain = (mock.Mock(spec=RemovableHandle) for _ in range(3))
    point.fwd_hooks = [
        LensHandle(permanent, True),
        LensHandle(level, False, 5),
        LensHandle(plain, False),
    ]
    point.remove_hooks("fwd", including_permanent=False, level=5)
    level.remove.assert_called_once()
    plain.remove.assert_not_called()
    point.remove_hooks("fwd")
    plain.remove.assert_called_once()
    permanent.remove.assert_not_called()
    point.remove_hooks("fwd", including_permanent=True)
    permanent.remove.assert_called_once()
    assert point.fwd_hooks == []


# -- copies and files -----------------------------------------------------------------------------


def twice(activation, hook):
    return activation * 2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_copy_keeps_its_hooks_and_shares_nothing(name):
    model = ours(name)
    model.add_hook("blocks.0.hook_resid_pre", twice)
    model.add_perma_hook("blocks.1.attn.hook_z", twice)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS), model(TOKENS))
        point = other.hook_dict["blocks.0.hook_resid_pre"]
        assert point is other.blocks[0].hook_resid_pre and len(point.fwd_hooks) == 1
        hooked = other(TOKENS)
        other.reset_hooks(including_permanent=True)
        assert not other.list_hooks() and len(model.list_hooks()) == 2
        assert (other(TOKENS) - hooked).abs().max() > 1e-3
        with torch.no_grad():
            other.W_E.zero_()
        assert model.W_E.abs().max() > 0
    seen = []
    closure = copy.deepcopy(model)
    closure.reset_hooks(including_permanent=True)
    closure.add_hook("hook_embed", lambda a, hook: seen.append(hook))
    copied = copy.deepcopy(closure)
    copied(TOKENS)
    assert seen == [copied.hook_embed]


@pytest.mark.parametrize("name", ["gpt2", "llama", "attn_only"])
def test_whole_models_and_caches_are_saved_and_loaded(name, tmp_path):
    model = ours(name)
    logits, cache = model.run_with_cache(TOKENS)
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(other(TOKENS), model(TOKENS))
    torch.save(cache.cache_dict, tmp_path / "cache.pt")
    loaded = ActivationCache(torch.load(tmp_path / "cache.pt", weights_only=True), other)
    same(dict(loaded.items()), dict(cache.items()), "cache", atol=0.0)
    torch.save(cache, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert_close_to(whole.decompose_resid(), cache.decompose_resid())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = HookedTransformer(tiny(name, seed=9))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert str(fresh.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert_close_to(fresh(TOKENS), logits)


@pytest.mark.tl
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_checkpoints_load_strictly_both_ways(name):
    pytest.importorskip("transformer_lens")
    there, here = theirs(name), ours(name, seed=4)
    file = io.BytesIO()
    torch.save(there.state_dict(), file)
    file.seek(0)
    here.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_close_to(here(TOKENS), there(TOKENS), atol=5e-5)
    file = io.BytesIO()
    other = ours(name, seed=5)
    torch.save(other.state_dict(), file)
    file.seek(0)
    there.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_close_to(there(TOKENS), other(TOKENS), atol=5e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpoints_with_square_masks_load_strictly(name):
    """TransformerLens before 3.5 kept an n_ctx x n_ctx causal mask in every layer."""
    model = ours(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    n_ctx = model.cfg.n_ctx
    for layer in range(model.cfg.n_layers):
        state[f"blocks.{layer}.attn.mask"] = torch.tril(torch.ones(n_ctx, n_ctx)).bool()
    other = ours(name, seed=6)
    assert (other(TOKENS) - model(TOKENS)).abs().max() > 1e-3
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(TOKENS), model(TOKENS))
    state["blocks.0.attn.nothing"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="nothing"):
        other.load_state_dict(state, strict=True)
    other.load_and_process_state_dict(
        {k: v for k, v in state.items() if k != "blocks.0.attn.nothing"},
        fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    assert_close_to(other(TOKENS), model(TOKENS))


# -- compiling ----------------------------------------------------------------------------------

# A process of its own: the shape checks of the tests and a compiler exclude each other.
COMPILED = """
import copy, sys, warnings
import torch
from fastlens import HookedTransformer
from tests.configs import tiny

warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch._dynamo.config.recompile_limit = 64  # beyond it code runs uncompiled: nothing to see
name, how = sys.argv[1:]
model = HookedTransformer(tiny(name, n_layers=1)).eval()
plain = copy.deepcopy(model)
tokens = torch.randint(0, 50, (2, 9))
compiled = model
if how == "in place":
    model.compile(backend="eager", fullgraph=True)
else:
    compiled = torch.compile(model, backend=how, fullgraph=True)


def agree(what):
    want, got = plain(tokens), compiled(tokens)
    difference = (got - want).abs().max().item()
    assert difference < 1e-5, (what, difference)


def both(act):
    for one in (model, plain):
        act(one)


compiled(tokens, return_type="loss").backward()
plain(tokens, return_type="loss").backward()
for (key, one), (_, other) in zip(model.named_parameters(), plain.named_parameters()):
    assert (one.grad - other.grad).abs().max() < 1e-5, key
torch.set_grad_enabled(False)
agree("no hook")
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2

hook_name = "blocks.0.hook_resid_pre"
for factor in (0.5, 3.0):
    both(lambda one: one.add_hook(hook_name, lambda a, hook: a * factor))
    agree(factor)
    both(lambda one: one.reset_hooks())
    agree("after reset")
for hook_name in (hook_name, "blocks.0.attn.hook_pattern", "ln_final.hook_scale"):
    both(lambda one: one.hook_dict[hook_name].add_hook(lambda a, hook: a * 5))
    agree(hook_name)
    both(lambda one: one.reset_hooks())
    agree("after reset")
    hooks = [(hook_name, lambda a, hook: a * 7)]
    got = compiled.run_with_hooks(tokens, fwd_hooks=hooks)
    assert (got - plain.run_with_hooks(tokens, fwd_hooks=hooks)).abs().max() < 1e-5
    got, cache = compiled.run_with_cache(tokens)
    want, plain_cache = plain.run_with_cache(tokens)
    assert list(cache.keys()) == list(plain_cache.keys())
    for key, value in plain_cache.items():
        assert (cache[key] - value).nan_to_num().abs().max() < 1e-5, key
with model.hooks(fwd_hooks=hooks):
    got = compiled(tokens)
with plain.hooks(fwd_hooks=hooks):
    assert (got - plain(tokens)).abs().max() < 1e-5
agree("after the context")

both(lambda one: one.W_E.data.mul_(2))
agree("weights in place")
both(lambda one: setattr(one.blocks[0].attn, "W_Q", torch.nn.Parameter(one.blocks[0].attn.W_Q * 2)))
agree("a leaf replaced")
if not model.cfg.attn_only:
    both(lambda one: setattr(one.blocks[0].mlp, "forward", lambda x: x * 2))
    agree("a forward replaced")
    both(lambda one: setattr(one.blocks[0], "mlp", torch.nn.Tanh()))
    agree("a part replaced")
both(lambda one: (setattr(one.blocks[0], "hook_attn_out", torch.nn.Tanh()), one.setup()))
agree("a hook point replaced")
both(lambda one: one.set_use_attn_result(True))
agree("a flag")
print("agrees")
"""


FULL = pytest.mark.full


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("gpt2", "aot_eager"),
        pytest.param("gpt2", "in place", marks=FULL),
        ("llama", "eager"),
        pytest.param("neox", "eager", marks=FULL),
        pytest.param("attn_only", "eager", marks=FULL),
        pytest.param("local", "eager", marks=FULL),
        pytest.param("qk_norm", "eager", marks=FULL),
    ],
)
def test_a_compiled_model_agrees_and_does_not_overlook_hooks(name, how):
    result = subprocess.run(
        [sys.executable, "-c", COMPILED, name, how],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout == "agrees\n", result.stderr[-3000:]
