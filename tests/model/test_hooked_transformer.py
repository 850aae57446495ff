"""The contracts of the model that need no other library: layout, liveness, flags, errors."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlens import HookedTransformer, HookPoint, TransformerLensKeyValueCache
from fastlens.errors import ConfigError, FlagError, HookNameError, ShapeError, TokenError
from fastlens.hooks.point import is_live
from tests.close import assert_close_to
from tests.configs import TINY_CONFIGS, tiny
from tests.models import ours, prompts

FAMILIES = ["gpt2", "llama", "neox", "attn_only", "post_norm"]


class Copies(TorchDispatchMode):
    """Counts tensors of a weight's size that are copied or made contiguous."""

    def __init__(self, model):
        super().__init__()
        self.sizes = {p.numel() for p in model.parameters() if p.ndim > 1}
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        copies = ("clone", "copy_", "contiguous", "_to_copy", "cat", "repeat_interleave")
        if name in copies and isinstance(out, torch.Tensor) and out.numel() in self.sizes:
            self.found.append((name, tuple(out.shape)))
        return out


# -- layout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_weight_is_copied_in_a_forward(name, grad):
    # Sizes that no activation shares, so that a copy of that size is a copy of a weight.
    model = ours(name, d_model=40, d_head=12, d_mlp=88, d_vocab=61)
    tokens = prompts(1, 3)
    model(tokens)
    with torch.set_grad_enabled(grad), Copies(model) as copies:
        model(tokens)
    assert copies.found == []


def test_the_copy_counter_counts():
    model = ours("gpt2", d_model=40, d_head=12, d_mlp=88, d_vocab=61)
    attn = model.blocks[0].attn
    attn.W_Q = nn.Parameter(attn.W_Q.detach().contiguous())  # not our layout: must copy
    with Copies(model) as copies:
        model(prompts(1, 3))
    assert len(copies.found) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_without_gradients_qkv_is_one_product(name):
    model = ours(name)
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().startswith(("aten::mm", "aten::addmm")):
                products.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        model(prompts(1, 3))
    mlp = 0 if model.cfg.attn_only else 2
    assert len(products) == model.cfg.n_layers * (2 + mlp) + 1


def through(model, journey):
    return journey(model) or model


def by_hand(model):
    for block in model.blocks:
        block.attn.W_Q = nn.Parameter(block.attn.W_Q.detach().clone().contiguous())
        block.attn.W_O = nn.Parameter(block.attn.W_O.detach().clone().contiguous())
        if not model.cfg.attn_only:
            block.mlp.W_out = nn.Parameter(block.mlp.W_out.detach().clone().contiguous())
    model.unembed.W_U = nn.Parameter(model.unembed.W_U.detach().clone().contiguous())
    return model


def assigned(model):
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


JOURNEYS = {
    "by hand": by_hand,
    "load_state_dict assign": assigned,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "float64 and back": lambda model: model.double().float(),
    "to": lambda model: model.to("cpu", print_details=False),
    "in place edit": lambda model: _nudge(model, +1) and _nudge(model, -1),
}


def _nudge(model, sign):
    with torch.no_grad():
        for leaf in model.parameters():
            leaf += sign
    return model


@pytest.mark.parametrize("journey", JOURNEYS.values(), ids=JOURNEYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_that_travelled_give_the_same_logits(name, journey):
    model, tokens = ours(name), prompts()
    with torch.no_grad():
        before = model(tokens)
        model = journey(model)
        assert_close_to(model(tokens), before, atol=3e-5)
    assert_close_to(model(tokens), before, atol=3e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_leaves_are_neighbours_again_after_a_cast(name):
    from fastlens.components.layout import from_input_heads, neighbours

    attn = ours(name).double().blocks[1].attn
    with torch.no_grad():
        leaves = [attn.W_Q, *(getattr(attn, key) for key in attn.KEY_VALUE_NAMES[:2])]
        assert neighbours([from_input_heads(w) for w in leaves]) is not None
    assert attn.W_Q.dtype == torch.float64


def test_casts_keep_the_config_in_step_and_tables_precise():
    model = ours("llama").double()
    assert model.cfg.dtype == torch.float64
    fresh = ours("llama", dtype=torch.float64)
    assert torch.equal(model.blocks[0].attn.rotary_cos, fresh.blocks[0].attn.rotary_cos)
    assert model.bfloat16()(prompts()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_float64_forwards_agree_to_float64(name):
    model, tokens = ours(name, dtype=torch.float64), prompts()
    hooked, _ = model.run_with_cache(tokens)
    assert_close_to(model(tokens), hooked, atol=1e-12)
    single = ours(name)
    single.load_state_dict(model.state_dict())
    assert_close_to(single(tokens), hooked, atol=5e-5)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_bfloat16_fused_is_no_worse_than_materialised(name):
    exact = ours(name, dtype=torch.float64)
    model = ours(name, dtype=torch.bfloat16)
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())  # the rounded weights are the truth
    tokens = prompts(4, 16)
    hooked, _ = model.run_with_cache(tokens)
    truth = exact(tokens)
    error = (model(tokens).double() - truth).square().mean().sqrt()
    assert error <= 1.2 * (hooked.double() - truth).square().mean().sqrt()


# -- liveness: what is looked at or replaced is honoured ------------------------------------------


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_an_identity_hook_anywhere_changes_nothing_and_its_axes_are_true(name):
    flags = {} if TINY_CONFIGS[name].get("n_key_value_heads") else {"use_attn_in": True}
    model, tokens = ours(name), prompts(2, 7)
    with torch.no_grad():
        plain = model(tokens)
        sizes = {"batch": 2, "pos": 7, "query_pos": 7, "key_pos": 7, "head": 4, "d_head": 8,
                 "kv_head": model.blocks[0].attn.n_kv_heads, "one": 1, "d_mlp": model.cfg.d_mlp,
                 "d_vocab": 50}  # fmt: skip
        for hook_name, point in model.hook_dict.items():
            seen = []
            if "attn_in" in hook_name and not flags:
                continue
            if model.cfg.attn_only and hook_name.endswith("mlp_in"):
                continue
            hook = lambda a, hook, seen=seen: seen.append(a)  # noqa: E731
            out = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, hook)])
            assert_close_to(out, plain, atol=2e-5, name=hook_name)
            for activation in seen:
                names = point.axes.split()
                if "..." in names:
                    names.remove("...")
                assert activation.ndim == len(names), hook_name
                for axis, size in zip(names, activation.shape, strict=True):
                    assert sizes.get(axis, size) == size, (hook_name, axis)


def test_reading_one_pattern_leaves_other_layers_fused():
    model, tokens = ours("gpt2"), prompts()
    squares = []

    class Softmaxes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "softmax" in func.name():
                squares.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Softmaxes():
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda a, hook: a)])
    assert len(squares) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_patching_any_place_reaches_the_logits(name):
    model, tokens = ours(name), prompts()
    plain = model(tokens)
    for hook_name in model.hook_dict:
        if model.is_switched_off(hook_name) or hook_name.endswith(("hook_tokens", "attn_input")):
            continue
        if hook_name.endswith("hook_mlp_out") and model.cfg.attn_only:
            continue
        # Squared too: a norm that follows undoes a scale and a shift.
        out = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, lambda a, hook: a + 0.3 * a * a)])
        assert (out - plain).abs().max() > 1e-4, hook_name


def test_in_place_edits_by_hooks_work():
    model, tokens = ours("llama"), prompts()

    def replaced(a, hook):
        a = a.clone()
        a[:, 2:5] = 0.0
        return a

    def edited(a, hook):
        a[:, 2:5] = 0.0

    for place in ("hook_embed", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z",
                  "blocks.0.attn.hook_v", "blocks.2.mlp.hook_post"):  # fmt: skip
        with torch.no_grad():
            wanted = model.run_with_hooks(tokens, fwd_hooks=[(place, replaced)])
            got = model.run_with_hooks(tokens, fwd_hooks=[(place, edited)])
        assert_close_to(got, wanted, name=place)


def test_a_hook_cannot_write_to_the_weights():
    model, tokens = ours("gpt2"), prompts()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def wreck(a, hook):
        if a.is_floating_point():
            a.fill_(3.0)

    for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in"):
        setattr(model.cfg, flag, True)
    with torch.no_grad():
        for hook_name in model.hook_dict:
            model.run_with_hooks(tokens, fwd_hooks=[(hook_name, wreck)])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


class Shift(nn.Module):
    """Stands where a HookPoint or a part stood."""

    def forward(self, x, *args, **kwargs):
        return x + 1.0


def test_replaced_modules_are_honoured():
    tokens = prompts()

    def logits_by_hand(model, mlp_of):
        resid = model.embed(tokens) + model.pos_embed(tokens)
        for block in model.blocks:
            normed = block.ln1(resid)
            resid = resid + block.attn(normed, normed, normed)
            resid = resid + mlp_of(block, block.ln2(resid))
        return model.ln_final(resid) @ model.W_U + model.b_U

    model = ours("gpt2")
    assert_close_to(model(tokens), logits_by_hand(model, lambda b, x: b.mlp(x)))
    for block in model.blocks:
        block.mlp = Shift()
    assert_close_to(model(tokens), logits_by_hand(model, lambda b, x: x + 1.0))

    model = ours("gpt2")
    for block in model.blocks:
        original = block.mlp.forward
        block.mlp.forward = lambda x, f=original: 2 * f(x)
    wanted = logits_by_hand(model, lambda b, x: b.mlp(x))
    assert_close_to(model(tokens), wanted)
    assert (wanted - ours("gpt2")(tokens)).abs().max() > 1e-2

    model = ours("gpt2")
    model.unembed = Shift()
    assert_close_to(model(tokens), model.ln_final(model(tokens, stop_at_layer=3)) + 1.0)


@pytest.mark.parametrize("grad", [True, False])
def test_a_module_in_place_of_any_hook_point_acts(grad):
    tokens = prompts()
    plain = ours("llama")(tokens)
    for hook_name in ours("llama").hook_dict:
        model = ours("llama")
        if model.is_switched_off(hook_name) or "hook_tokens" in hook_name:
            continue
        parent, _, last = hook_name.rpartition(".")
        holder = model.get_submodule(parent) if parent else model
        reference = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, lambda a, hook: a + 1.0)])
        setattr(holder, last, Shift())
        with torch.set_grad_enabled(grad):
            got = model(tokens)
        assert_close_to(got, reference, atol=2e-5, name=hook_name)
        # A constant added to scores or to all keys is no change; everything else must show.
        if not hook_name.endswith(("hook_attn_scores", "hook_rot_k")):
            assert (got - plain).abs().max() > 1e-4, hook_name
        if hook_name.startswith("blocks.1"):
            break


def test_native_torch_hooks_and_subclasses_are_honoured():
    tokens = prompts()
    model = ours("gpt2")
    handle = model.blocks[0].attn.hook_pattern.register_forward_hook(lambda m, i, o: o * 0)
    zeroed = model.run_with_hooks(
        tokens, fwd_hooks=[("blocks.0.attn.hook_z", lambda a, hook: a * 0)]
    )
    assert_close_to(model(tokens), zeroed)
    handle.remove()

    model = ours("gpt2")
    attn = model.blocks[0].attn
    original = attn.calculate_attention_scores
    attn.calculate_attention_scores = lambda q, k: original(q, k) * 0
    uniform = model(tokens)
    plain = ours("gpt2")
    wanted = plain.run_with_hooks(
        tokens,
        fwd_hooks=[("blocks.0.attn.hook_attn_scores", lambda s, hook: s.masked_fill(s > -1e9, 0))],
    )
    assert_close_to(uniform, wanted)


def test_parametrized_and_pruned_weights_are_honoured():
    import torch.nn.utils.parametrize as parametrize

    class Half(nn.Module):
        def forward(self, w):
            return w * 0.5

    tokens = prompts()
    for part, leaf in (("mlp", "W_in"), ("attn", "W_O"), ("attn", "W_Q"), ("ln1", "w")):
        model, halved = ours("gpt2"), ours("gpt2")
        parametrize.register_parametrization(getattr(model.blocks[0], part), leaf, Half())
        with torch.no_grad():
            getattr(getattr(halved.blocks[0], part), leaf).mul_(0.5)
            assert_close_to(model(tokens), halved(tokens), name=leaf)
        assert_close_to(model(tokens), halved(tokens), name=leaf)


# -- flags and names ------------------------------------------------------------------------------


def test_add_hook_on_a_switched_off_place_is_refused():
    model = ours("gpt2")
    for hook_name, flag in (
        ("blocks.0.attn.hook_result", "use_attn_result"),
        ("blocks.0.hook_q_input", "use_split_qkv_input"),
        ("blocks.0.hook_attn_in", "use_attn_in"),
        ("blocks.0.hook_mlp_in", "use_hook_mlp_in"),
    ):
        with pytest.raises(AssertionError, match=rf"cfg\.{flag} is False.*set_{flag}\(True\)"):
            model.add_hook(hook_name, lambda a, hook: None)
        getattr(model, f"set_{flag}")(True)
        model.add_hook(hook_name, lambda a, hook: None)
        model.reset_hooks()


@pytest.mark.parametrize("fails", [False, True])
def test_naming_a_switched_off_place_switches_it_on_for_the_run(fails):
    model, tokens, seen = ours("gpt2"), prompts(), []

    def look(a, hook):
        seen.append(a.shape)
        if fails:
            raise RuntimeError("stop")

    places = ["blocks.1.attn.hook_result", "blocks.1.hook_q_input", "blocks.1.hook_mlp_in"]
    for place in places:
        with pytest.raises(RuntimeError, match="stop") if fails else nullcontext():
            model.run_with_hooks(tokens, fwd_hooks=[(place, look)])
    assert len(seen) == 3
    assert not any(model.is_switched_off(p) is False for p in places)
    if not fails:
        _, cache = model.run_with_cache(tokens, names_filter=places)
        assert set(cache.keys()) == set(places)
        total = cache["blocks.1.attn.hook_result"].sum(2) + model.blocks[1].attn.b_O
        _, plain = model.run_with_cache(tokens, names_filter="blocks.1.hook_attn_out")
        assert_close_to(total, plain["attn_out", 1])
    assert not any(model.is_switched_off(p) is False for p in places)


def test_a_predicate_never_flips_a_flag():
    model = ours("gpt2")
    _, cache = model.run_with_cache(prompts(), names_filter=lambda name: True)
    assert not any("hook_result" in key or "_input" in key for key in cache)
    with pytest.warns(UserWarning, match="matches none"):
        model.run_with_cache(prompts(), names_filter=lambda name: "hook_result" in name)


def test_refused_flags_leave_nothing_behind():
    model = ours("llama")
    with pytest.raises(FlagError, match="grouped"):
        model.run_with_cache(prompts(), names_filter=["blocks.0.hook_attn_in"])
    assert model.context_level == 0 and not model.list_hooks() and not model.cfg.use_attn_in


def test_unknown_names_have_near_names():
    model = ours("gpt2")
    with pytest.raises(HookNameError, match=r"blocks\.1\.attn\.hook_zz.*Nearest:.*hook_z'"):
        model.run_with_hooks(prompts(), fwd_hooks=[("blocks.1.attn.hook_zz", lambda a, hook: a)])
    with pytest.raises(HookNameError, match="Nearest"):
        model.run_with_cache(prompts(), names_filter="blocks.1.attn.hook_patern")


def test_a_hook_that_raises_leaves_no_hook():
    model = ours("gpt2")

    def stop(a, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.run_with_hooks(prompts(), fwd_hooks=[(lambda name: True, stop)])
    assert not model.list_hooks() and not any(is_live(p) for p in model.hook_points())


def test_ln1_hooks_fire_once():
    model, calls = ours("gpt2"), []
    model.run_with_hooks(
        prompts(), fwd_hooks=[("blocks.0.ln1.hook_scale", lambda a, hook: calls.append(1))]
    )
    assert len(calls) == 1


# -- batches, padding, caches ---------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_batch_invariance(name):
    model, tokens = ours(name), prompts(4)
    with torch.no_grad():
        together = model(tokens)
        for row in range(4):
            assert_close_to(model(tokens[row : row + 1]), together[row : row + 1], atol=2e-5)


@pytest.mark.parametrize("name", TINY_CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    model, tokens = ours(name), prompts(1, 7)
    padded = torch.full((1, 12), 3)
    mask = torch.zeros(1, 12, dtype=torch.int)
    place = slice(5, 12) if side == "left" else slice(0, 7)
    padded[:, place], mask[:, place] = tokens, 1
    got = model(padded, attention_mask=mask)
    assert torch.isfinite(got).all()
    assert_close_to(got[:, place], model(tokens), atol=2e-5)
    loss = model(padded, attention_mask=mask, return_type="loss")
    assert_close_to(loss, model(tokens, return_type="loss"), atol=2e-5)


@pytest.mark.parametrize("name", [n for n in TINY_CONFIGS if n != "bidirectional"])
def test_kv_cache_equals_one_forward(name):
    model, tokens = ours(name), prompts(2, 12)
    whole = model(tokens)
    past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        mask = torch.ones(2, stop - start, dtype=torch.int)
        part = model(tokens[:, start:stop], past_kv_cache=past, attention_mask=mask)
        assert_close_to(part, whole[:, start:stop], atol=2e-5)
    past.freeze()
    mask = torch.ones(2, 1, dtype=torch.int)
    for _ in range(2):
        model(tokens[:, :1], past_kv_cache=past, attention_mask=mask)
    assert past[0].past_keys.shape[1] == 12


def test_a_kv_cache_of_another_shape_is_refused():
    model = ours("gpt2")
    past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 3)
    with pytest.raises(ShapeError, match="batch 3.*batch 2"):
        model(prompts(2), past_kv_cache=past, attention_mask=torch.ones(2, 11, dtype=torch.int))


def test_rotary_tables_grow_beyond_their_first_length():
    model = ours("llama", n_ctx=5000)
    assert model.blocks[0].attn.rotary_cos.shape[0] == 2048
    with torch.no_grad():
        tokens = torch.randint(0, 50, (1, 2100))
        long = model(tokens)
        whole = ours("llama", n_ctx=5000)
        for block in whole.blocks:
            block.attn.rotary_sin, block.attn.rotary_cos = block.attn._tables(2100, torch.float32)
        assert_close_to(long, whole(tokens))


def test_positions_beyond_n_ctx_are_refused():
    with pytest.raises(IndexError, match="position 69 .* W_pos has 64"):
        ours("gpt2")(prompts(1, 70))


# -- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_a_sentence():
    model, tokens = ours("gpt2"), prompts()
    with pytest.raises(ShapeError, match="start_at_layer"):
        model(torch.randn(1, 3, 32))
    with pytest.raises(ShapeError, match=r"\[batch, pos, 32\]"):
        model(tokens, start_at_layer=1)
    with pytest.raises(ShapeError, match=r"\[3, 4\].*\[3, 11\]"):
        model(tokens, attention_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="return_type='logit'"):
        model(tokens, return_type="logit")
    with pytest.raises(TokenError, match="pass tokens="):
        model(torch.randn(1, 3, 32), start_at_layer=0, return_type="loss")
    with pytest.raises(AssertionError, match="tokenizer"):
        model("text")
    with pytest.raises(ShapeError, match="batch of one"):
        model.run_with_cache(tokens, remove_batch_dim=True)


def test_bad_configs_are_refused_with_a_sentence():
    with pytest.raises(ConfigError, match="from_pretrained"):
        HookedTransformer("gpt2")
    with pytest.raises(ConfigError, match="d_vocab is not set"):
        HookedTransformer(tiny("gpt2", d_vocab=-1))


def test_gradients_flow_through_the_joint_free_path_only_when_wanted():
    model, tokens = ours("gpt2"), prompts()
    model(tokens, return_type="loss").backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_foreign_hook_point_keeps_its_place_after_setup():
    model = ours("gpt2")
    model.blocks[1].hook_resid_pre = HookPoint()
    model.setup()
    assert model.hook_dict["blocks.1.hook_resid_pre"].axes == "batch pos d_model"
    _, cache = model.run_with_cache(prompts(), pos_slice=(2, 4))
    assert cache["resid_pre", 1].shape == (3, 2, 32)


def test_torch_compile_free_model_traces_without_hooks():
    model, tokens = ours("gpt2"), prompts()
    exported = torch.export.export(model, (tokens,), strict=False)
    assert_close_to(exported.module()(tokens), model(tokens))
