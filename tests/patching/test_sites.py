"""Which sites exist, under which names, with which axes."""

import re

import pytest

from fastlens.errors import SweepError
from fastlens.patching.sites import (
    ALIASES,
    BY_ENTRY,
    SITES,
    STAGES,
    available_sites,
    find_site,
    n_heads,
    n_neurons,
    sweep_axes,
)
from tests.models import ours, prompts

FLAGGED = {"attn_in", "q_input", "k_input", "v_input", "mlp_in", "result"}
ALWAYS = {"resid_pre", "resid_post", "attn_out", "q", "k", "v", "attn_scores", "pattern", "z"}
MLP = {"mlp_out", "mlp_pre", "mlp_post"}


def sites_of(model):
    return set(available_sites(model.cfg, model.hook_dict))


def find(model, name, layers=None):
    layers = range(model.cfg.n_layers) if layers is None else layers
    return find_site(name, model.cfg, model.hook_dict, layers)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", ALWAYS | MLP | {"resid_mid"} | FLAGGED),
        (
            "llama",
            ALWAYS
            | MLP
            | {"resid_mid", "mlp_pre_linear", "rot_q", "rot_k"}
            | (FLAGGED - {"attn_in"}),
        ),
        ("neox", ALWAYS | MLP | {"rot_q", "rot_k"} | FLAGGED),
        ("attn_only", ALWAYS | (FLAGGED - {"mlp_in"})),
        ("solu_ln", ALWAYS | MLP | {"resid_mid", "mlp_mid"} | FLAGGED),
    ],
)
def test_the_sites_of_each_block_type(name, expected):
    assert sites_of(ours(name)) == expected


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "attn_only", "solu_ln", "alibi"])
def test_axes_are_those_of_the_activations(name):
    """Every available site fires, with one entry per index of each of its axes."""
    model = ours(name)
    tokens = prompts(2, 5)
    sizes = {"pos": 5, "query_pos": 5, "key_pos": 5, "neuron": model.cfg.d_mlp}
    for site_name in sites_of(model):
        site = find(model, site_name)
        hook_name = site.hook_name(1)
        _, cache = model.run_with_cache(tokens, names_filter=[hook_name])
        shape = cache[hook_name].shape
        expected = [{**sizes, "head": n_heads(site, model.cfg)}[axis] for axis in site.axes]
        assert list(shape[1 : 1 + len(expected)]) == expected, site_name
        assert len(shape) - 1 - len(expected) == (site.axes[-1] in ("pos", "head")), site_name


def test_names_and_aliases():
    model = ours("gpt2")
    assert find(model, "post") is find(model, "mlp_post") is find(model, "hook_post")
    assert find(model, "attn") is find(model, "pattern")
    assert find(model, "hook_resid_pre").hook_name(2) == "blocks.2.hook_resid_pre"
    assert find(model, "z").hook_name(0) == "blocks.0.attn.hook_z"
    assert set(ALIASES.values()) <= set(SITES)
    assert all(site.name == name for name, site in SITES.items())


def test_a_typo_gets_near_names():
    with pytest.raises(SweepError, match=r"no site 'resid_pr'.*Nearest: 'resid_pre'"):
        find(ours("gpt2"), "resid_pr")


@pytest.mark.parametrize(
    ("model", "site", "reason"),
    [
        ("neox", "resid_mid", "attention and MLP are parallel"),
        ("attn_only", "resid_mid", "attention only"),
        ("attn_only", "mlp_out", "attention only"),
        ("attn_only", "mlp_in", "attention only"),
        ("attn_only", "post", "attention only"),
        ("gpt2", "rot_q", "no hook point 'blocks.0.attn.hook_rot_q'"),
        ("llama", "attn_in", "grouped KV heads"),
    ],
)
def test_a_site_the_model_lacks_says_why_and_what_exists(model, site, reason):
    with pytest.raises(SweepError, match=rf"{re.escape(reason)}.*It has resid_pre, "):
        find(ours(model), site)


def test_a_site_one_layer_lacks():
    model = ours("gpt2")
    del model.hook_dict["blocks.1.mlp.hook_post"]
    with pytest.raises(SweepError, match=r"blocks\.1\.mlp\.hook_post"):
        find(model, "mlp_post")
    assert find(model, "mlp_post", [0, 2]).name == "mlp_post"


def test_axes_of_a_sweep():
    assert sweep_axes(SITES["resid_pre"], None) == ("layer", "pos")
    assert sweep_axes(SITES["k"], None) == ("layer", "head")
    assert sweep_axes(SITES["pattern"], None) == ("layer", "head")
    assert sweep_axes(SITES["mlp_post"], None) == ("layer", "pos")
    assert sweep_axes(SITES["z"], ("pos", "layer", "head")) == ("pos", "layer", "head")
    assert sweep_axes(SITES["pattern"], ["layer", "head", "query_pos", "key_pos"])
    assert sweep_axes(SITES["mlp_post"], ("layer", "neuron")) == ("layer", "neuron")
    assert sweep_axes(SITES["resid_pre"], "layer") == ("layer",)


@pytest.mark.parametrize(
    ("site", "by", "message"),
    [
        ("resid_pre", ("layer", "head"), "cannot be swept by 'head': it is indexed by layer, pos"),
        ("pattern", ("layer", "pos"), "indexed by layer, head, query_pos, key_pos"),
        ("z", ("layer", "heads"), "Nearest: 'head'"),
        ("z", ("head",), "must name 'layer'"),
        ("z", ("layer", "head", "head"), "each once"),
    ],
)
def test_illegal_axes(site, by, message):
    with pytest.raises(SweepError, match=message):
        sweep_axes(SITES[site], by)


def test_neurons_beside_mixtures_are_a_dense_layers():
    assert n_neurons(ours("llama").cfg) == 48
    assert n_neurons(ours("moe", n_dense_layers=1, d_mlp_dense=40).cfg) == 40


def test_head_counts_under_grouping():
    cfg = ours("llama").cfg
    counts = {name: n_heads(SITES[name], cfg) for name in ("q", "z", "pattern", "k", "v", "rot_k")}
    assert counts == {"q": 4, "z": 4, "pattern": 4, "k": 2, "v": 2, "rot_k": 2}
    cfg.ungroup_grouped_query_attention = True
    assert n_heads(SITES["k"], cfg) == 4
    assert n_heads(SITES["k"], ours("gpt2").cfg) == 4


# -- stages --------------------------------------------------------------------------------------


def test_every_site_has_one_stage():
    listed = [name for stage in STAGES for name in stage]
    assert sorted(listed) == sorted(SITES)
    for number, names in enumerate(STAGES):
        assert {SITES[name].stage for name in names} == {number}
    assert set(SITES) >= BY_ENTRY


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "solu_ln", "attn_only", "post_norm"])
def test_stages_are_the_order_of_the_forward(name):
    model = ours(name)
    for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        setattr(model.cfg, flag, True)
    seen = []
    sites = {find(model, one).hook_name(1): one for one in sites_of(model)}
    hooks = [
        (hook, lambda x, hook: seen.append(hook.name)) for hook in sites if "attn_in" not in hook
    ]
    model.run_with_hooks(prompts(1, 4), fwd_hooks=hooks)
    stages = [SITES[sites[hook]].stage for hook in seen]
    # Parallel blocks write both parts at the end; which comes first makes no difference.
    assert stages == sorted(stages)
    assert len(seen) == len(hooks)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "alibi", "bidirectional"])
def test_reach_is_what_a_patch_changes_in_its_layer(name):
    """Rows of the layer's output that change if one row of a site does."""
    model = ours(name).double()
    model.cfg.use_attn_result = model.cfg.use_hook_mlp_in = True
    layer, at = 0, 2
    _, plain = model.run_with_cache(prompts(1, 5))
    out = f"blocks.{layer}.hook_resid_post"
    for site_name in sorted(sites_of(model)):
        site = find(model, site_name)

        def change(x, hook, site=site):
            x = x.clone()
            where = x[:, :, at] if "query_pos" in site.axes else x[:, at]
            where *= 0.5
            return x

        split = site_name in ("q_input", "k_input", "v_input")
        model.cfg.use_split_qkv_input, model.cfg.use_attn_in = split, site_name == "attn_in"
        with model.hooks(fwd_hooks=[(site.hook_name(layer), change)]):
            _, cache = model.run_with_cache(prompts(1, 5), names_filter=[out])
        change_of = (cache[out] - plain[out]).abs().amax(-1)[0]
        changed = (change_of > 1e-10).nonzero()[:, 0].tolist()
        behind = list(range(5) if name == "bidirectional" else range(at, 5))
        wide = site.reach in ("stream", "key", "both")
        assert changed == (behind if wide else [at]), site_name
