"""Each piece over packed rows against its module, which a hooked forward goes through."""

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from fastlens.components.attention import AbstractAttention
from fastlens.components.norms import LayerNorm
from fastlens.components.rows import (
    finished_qkv,
    foreign_part,
    logits_of,
    mlp_output,
    normalized,
    output_of_heads,
    projected,
    projected_heads,
    read,
    result_of_heads,
    written,
)
from tests.close import assert_close_to
from tests.configs import TINY_CONFIGS
from tests.models import ours, prompts

BATCH, T, LAYER = 2, 6, 1
each_config = pytest.mark.parametrize("name", TINY_CONFIGS)
EXACT = {"atol": 1e-12}


def seen(name, by_hand=False):
    """A float64 model and all its activations; ``by_hand``: with leaves as a user may put them."""
    model = ours(name).double()
    if by_hand:
        replace_leaves(model.blocks[LAYER])
    model.cfg.use_attn_result = True
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts(BATCH, T))
    return model, model.blocks[LAYER], cache


def replace_leaves(block):
    """Contiguous leaves, of which no two are neighbours any more."""
    for module in block.modules():
        for leaf_name, leaf in list(module.named_parameters(recurse=False)):
            apart = torch.empty(2, *leaf.shape, dtype=leaf.dtype)[1].copy_(leaf.detach())
            setattr(module, leaf_name, nn.Parameter(apart))


def of(cache, place):
    return cache[f"blocks.{LAYER}.{place}"]


def rows(activation):
    """Batch and position as one axis, in an order of no meaning."""
    flat = activation.flatten(0, 1)
    return flat[order(len(flat))]


def order(n):
    return torch.randperm(n, generator=torch.Generator().manual_seed(1))


def heads_and_rows(n_rows, n_heads):
    """Some (row, head) entries, heads repeated and unsorted."""
    generator = torch.Generator().manual_seed(2)
    some = torch.randint(n_rows, (9,), generator=generator)
    return some, torch.randint(n_heads, (9,), generator=generator)


both_ways = pytest.mark.parametrize("by_hand", [False, True], ids=["laid out", "by hand"])


@each_config
def test_norms(name):
    model, block, cache = seen(name)
    found = read(block, "ln1", rows(of(cache, "hook_resid_pre")))
    if isinstance(block.ln1, nn.Identity) or model.cfg.norm_after_sublayer:
        expected = of(cache, "hook_resid_pre")
    else:
        # The hook's place is before gain and bias.
        expected = of(cache, "ln1.hook_normalized") * getattr(block.ln1, "w", 1.0)
        expected = expected + getattr(block.ln1, "b", 0.0)
    assert_close_to(found, rows(expected), **EXACT)


def attention_input(model, block, cache):
    """What queries and keys read, and what values read."""
    h = read(block, "ln1", rows(of(cache, "hook_resid_pre")))
    if model.cfg.positional_embedding_type != "shortformer":
        return h, h
    return h + rows(cache["hook_pos_embed"].expand(BATCH, -1, -1)), h


@both_ways
@each_config
def test_projections(name, by_hand):
    model, block, cache = seen(name, by_hand)
    h_qk, h = attention_input(model, block, cache)
    expected = {x: rows(of(cache, f"attn.hook_{x}")) for x in "qkv"}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for x, seen_by in zip("qkv", (h_qk, h_qk, h), strict=True):
                assert_close_to(projected(block.attn, seen_by, x), expected[x], **EXACT)
                n = expected[x].shape[1]
                some, heads = heads_and_rows(len(h), n)
                found = projected_heads(block.attn, seen_by[some], x, heads)
                assert_close_to(found, expected[x][some, heads], **EXACT)
            side_by_side = torch.cat([expected["q"], expected["k"]], 1)
            assert_close_to(projected(block.attn, h_qk, "qk"), side_by_side, **EXACT)
            if h_qk.equal(h):
                all_three = torch.cat([side_by_side, expected["v"]], 1)
                assert_close_to(projected(block.attn, h, "qkv"), all_three, **EXACT)
                last_two = torch.cat([expected["k"], expected["v"]], 1)
                assert_close_to(projected(block.attn, h, "kv"), last_two, **EXACT)


def test_rows_of_another_dtype_take_the_weights():
    _, block, cache = seen("gpt2")
    h = normalized(block.ln1, rows(of(cache, "hook_resid_pre"))).float()
    assert projected(block.attn, h, "qkv").dtype == torch.float64


@each_config
def test_queries_keys_and_values_before_attention(name):
    model, block, cache = seen(name)
    raw = [rows(of(cache, f"attn.hook_{x}")) for x in "qkv"]
    positions = torch.arange(T).repeat(BATCH)[order(BATCH * T)]
    q, k, v = finished_qkv(block.attn, *raw, positions)
    if model.cfg.positional_embedding_type == "rotary":
        # Normalised before they are rotated, so the rotated ones hold both.
        assert_close_to(q, rows(of(cache, "attn.hook_rot_q")), **EXACT)
        assert_close_to(k, rows(of(cache, "attn.hook_rot_k")), **EXACT)
    else:
        assert torch.equal(q, raw[0]) and torch.equal(k, raw[1])
    assert torch.equal(v, raw[2])


def test_clipping():
    model = ours("llama").double()
    attn = model.blocks[0].attn
    attn.cfg.clip_qkv = 0.01
    x = torch.randn(BATCH, T, 32, dtype=torch.float64)
    # A hook's place is before clipping: what attends shows in the pattern.
    with torch.no_grad():
        q, k, v = (projected(attn, x.flatten(0, 1), name) for name in "qkv")
        q, k, v = finished_qkv(attn, q, k, v, torch.zeros(BATCH * T, dtype=torch.long))
    for each in (q, k, v):
        assert float(each.abs().max()) == pytest.approx(0.01)


@both_ways
@each_config
def test_what_heads_write(name, by_hand):
    model, block, cache = seen(name, by_hand)
    z = rows(of(cache, "attn.hook_z"))
    result = rows(of(cache, "attn.hook_result"))
    out = output_of_heads(block.attn, z)
    assert_close_to(out, result.sum(1) + block.attn.b_O, **EXACT)
    out = written(block, "ln1", out)
    assert_close_to(out, rows(of(cache, "hook_attn_out")), **EXACT)
    some, heads = heads_and_rows(len(z), z.shape[1])
    found = result_of_heads(block.attn, z[some, heads], heads)
    assert_close_to(found, result[some, heads], **EXACT)


def mlp_input(cache, block):
    place = "hook_resid_pre" if block.cfg.parallel_attn_mlp else "hook_resid_mid"
    return read(block, "ln2", rows(of(cache, place)))


WITH_MLP = [name for name in TINY_CONFIGS if name != "attn_only"]
SITES = {"pre": "mlp_pre", "pre_linear": "mlp_pre_linear", "mid": "mlp_mid", "post": "mlp_post"}


@both_ways
@pytest.mark.parametrize("name", WITH_MLP)
def test_mlps(name, by_hand):
    model, block, cache = seen(name, by_hand)
    visited = {}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = mlp_output(
                block.mlp,
                mlp_input(cache, block),
                lambda site, x: visited.__setitem__(site, x.detach().clone()),
            )
            plain = mlp_output(block.mlp, mlp_input(cache, block))
        assert_close_to(plain, out, **EXACT)
        out = written(block, "ln2", out)
        assert_close_to(out, rows(of(cache, "hook_mlp_out")), **EXACT)
    # Every place is passed that the module passes, in its order.
    places = {f"blocks.{LAYER}.mlp.hook_{place}": site for place, site in SITES.items()}
    expected = [places[hook] for hook in cache if hook in places]
    assert list(visited) == expected
    for place, site in SITES.items():
        if site in visited:
            assert_close_to(visited[site], rows(of(cache, f"mlp.hook_{place}")), **EXACT)


@pytest.mark.parametrize("name", ["gpt2", "llama", "solu_ln"])
def test_edits_inside_an_mlp_are_what_a_hook_does(name):
    model, block, cache = seen(name)
    x = mlp_input(cache, block)
    for place, site in SITES.items():
        point = f"blocks.{LAYER}.mlp.hook_{place}"
        if point not in cache:
            continue

        def edit(at, activation, site=site):
            if at == site:
                activation[:, 3] = 0.5

        def hook(activation, hook):
            activation = activation.clone()
            activation[..., 3] = 0.5
            return activation

        with torch.no_grad():
            found = mlp_output(block.mlp, x, edit)
            with model.hooks(fwd_hooks=[(point, hook)]):
                expected = block.mlp(x[None])[0]
        assert_close_to(found, expected, **EXACT)
        assert not torch.allclose(found, mlp_output(block.mlp, x))


@each_config
def test_logits(name):
    model, _, cache = seen(name)
    final = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    with torch.no_grad():
        expected = rows(model(prompts(BATCH, T)))
    x = rows(final)
    if hasattr(model, "ln_final"):
        x = normalized(model.ln_final, x)
    assert_close_to(logits_of(model.unembed, x, None), expected, **EXACT)
    columns = torch.tensor([7, 3, 3, 49])
    assert_close_to(logits_of(model.unembed, x, columns), expected[:, columns], **EXACT)


# -- whether they stand for a model's modules ----------------------------------------------------


class Mine(nn.Module):
    def forward(self, x):
        return x


class MyNorm(LayerNorm):
    pass


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@each_config
def test_our_own_modules_are_not_foreign(name):
    model = ours(name)
    assert foreign_part(model) is None
    replace_leaves(model.blocks[0])
    assert foreign_part(model) is None


@pytest.mark.parametrize(
    ("path", "module", "said"),
    [
        ("blocks.1.mlp", Mine(), "blocks.1.mlp is a Mine"),
        ("blocks.1.attn", Mine(), "blocks.1.attn is a Mine"),
        ("blocks.2", Mine(), "blocks.2 is a Mine"),
        ("blocks.1.attn.hook_z", Mine(), "blocks.1.attn.hook_z is a Mine"),
        ("unembed", nn.Linear(32, 50), "unembed is a Linear"),
        ("hook_embed", nn.Identity(), "hook_embed is a Identity"),
    ],
)
def test_a_module_of_another_kind(path, module, said):
    model = ours("gpt2")
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    assert foreign_part(model) == said


def test_a_kind_of_ours_is_not_ours():
    model = ours("gpt2")
    model.ln_final = MyNorm(model.cfg)
    assert foreign_part(model) == "ln_final is a MyNorm"


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("blocks.1.mlp", "forward"),
        ("blocks.1", "apply_mlp"),
        ("blocks.1.attn", "calculate_attention_scores"),
        ("blocks.1.ln1", "unhooked"),
        ("hook_embed", "forward"),
        ("unembed", "forward"),
    ],
)
def test_a_method_replaced_on_an_instance(path, method):
    model = ours("gpt2")
    module = model.get_submodule(path)
    setattr(module, method, lambda *args, **kwargs: None)
    assert foreign_part(model) == f"{path}.{method} was replaced"


def test_an_activation_function_may_be_any():
    model, block, cache = seen("gpt2")
    block.mlp.act_fn = torch.tanh
    assert foreign_part(model) is None
    x = mlp_input(cache, block)
    with torch.no_grad():
        assert_close_to(mlp_output(block.mlp, x), block.mlp(x[None])[0], **EXACT)


def test_parametrized_leaves_are_read_by_name():
    model, block, cache = seen("gpt2")
    z = rows(of(cache, "attn.hook_z"))
    before = output_of_heads(block.attn, z) - block.attn.b_O
    parametrize.register_parametrization(block.attn, "W_O", Doubled())
    assert foreign_part(model) is None
    assert_close_to(output_of_heads(block.attn, z) - block.attn.b_O, 2 * before, **EXACT)


def test_what_stands_inside_a_parametrized_module_is_looked_at():
    model = ours("gpt2")
    parametrize.register_parametrization(model.blocks[0].attn, "W_O", Doubled())
    model.blocks[0].attn.hook_z = Mine()
    assert foreign_part(model) == "blocks.0.attn.hook_z is a Mine"


def test_a_method_replaced_on_one_of_our_classes_is_seen(monkeypatch):
    model = ours("gpt2")
    assert foreign_part(model) is None
    monkeypatch.setattr(type(model.blocks[0].mlp), "forward", lambda self, x: x)
    assert foreign_part(model) == "MLP.forward was replaced"


def test_rotary_tables_grow_with_the_longest_row(monkeypatch):
    monkeypatch.setattr(AbstractAttention, "ROTARY_INITIAL_CACHE_SIZE", 4)
    attn = ours("llama").blocks[0].attn
    assert attn.rotary_cos.shape[0] == 4
    q, k, v = (torch.randn(2, n, 8) for n in (4, 2, 2))
    turned = finished_qkv(attn, q, k, v, torch.tensor([1, 9]))
    again = finished_qkv(ours("llama").blocks[0].attn, q, k, v, torch.tensor([1, 9]))
    assert torch.equal(turned[0], again[0]) and attn.rotary_cos.shape[0] >= 10


def test_a_layer_without_rotary_turns_nothing_whatever_its_tables_hold():
    """A state dict of another model may bring the tables of layers that rotate."""
    model = ours("llama", rotary_layers=[True, False, True])
    model.load_state_dict(ours("llama").state_dict())
    attn = model.blocks[1].attn
    assert attn.rotary_sin.abs().max() > 0
    q, k, v = (torch.randn(2, n, 8) for n in (4, 2, 2))
    found = finished_qkv(attn, q, k, v, torch.tensor([1, 9]))
    assert all(torch.equal(one, other) for one, other in zip(found, (q, k, v), strict=True))
