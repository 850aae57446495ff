"""Which way every family and site goes. A fallback that is not written here is a failure."""

import re

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from fastlens import HookedTransformer, HookPoint
from fastlens.patching.metrics import answer_logit
from fastlens.patching.patch import Patch
from fastlens.patching.query import plan
from fastlens.patching.sites import available_sites
from fastlens.patching.strategy import ALONE, LAYER_SKIP, STACKED, WAVE, Strategy, strategy_of
from tests.configs import TINY_CONFIGS, tiny
from tests.models import ours, prompts, randomise

# -- the golden table ----------------------------------------------------------------------------

ATTENTION = (
    "attn_out attn_scores k k_input pattern q q_input resid_post resid_pre result v v_input z"
)
MLP = "mlp_in mlp_out mlp_post mlp_pre"
PLAIN = f"{ATTENTION} {MLP} attn_in resid_mid"
GROUPED = f"{ATTENTION} {MLP} mlp_pre_linear resid_mid rot_k rot_q"
EXPERTS = f"{ATTENTION} mlp_in mlp_out resid_mid rot_k rot_q"
PARALLEL = f"{ATTENTION} {MLP} attn_in rot_k rot_q"

# Config -> how its sweeps are run -> the sites that are run so.
GOLDEN = {
    "gpt2": {"wave": PLAIN},
    "llama": {"wave": GROUPED},
    "llama_mqa": {"wave": GROUPED},
    "neox": {"wave": PARALLEL},
    "attn_only": {"wave": f"{ATTENTION} attn_in"},
    "solu_ln": {"wave": f"{PLAIN} mlp_mid"},
    "local": {"wave": PLAIN},
    "qk_norm": {"wave": GROUPED},
    "alibi": {"wave": PLAIN},
    "shortformer": {"wave": PLAIN},
    "softcap": {"wave": GROUPED},
    "post_norm": {"wave": GROUPED},
    "no_norm": {"wave": PLAIN},
    "bidirectional": {"layer skip": PLAIN},
    "inverse_layer_scale": {"wave": PLAIN},
    "rotary_adjacent": {"wave": PARALLEL},
    "ntk": {"wave": GROUPED},
    "post_embedding_ln": {"wave": PLAIN},
    "olmo2": {"wave": GROUPED},
    "sinks": {"wave": GROUPED},
    "moe": {"wave": EXPERTS},
    "gpt_oss": {"wave": EXPERTS},
}


def strategies_of(name):
    model = ours(name)
    clean, corrupted = prompts(1, 3, seed=0), prompts(1, 3, seed=1)
    found = {}
    for site in available_sites(model.cfg, model.hook_dict):
        query = plan(model, clean, corrupted, sites=site, metric=answer_logit(0))
        found.setdefault(query.strategy.name, []).append(site)
    return {strategy: sorted(sites) for strategy, sites in found.items()}


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_every_site_of_every_family(name):
    golden = {strategy: sorted(sites.split()) for strategy, sites in GOLDEN[name].items()}
    assert strategies_of(name) == golden


def test_the_table_is_whole():
    assert set(GOLDEN) == set(TINY_CONFIGS)
    assert (WAVE, LAYER_SKIP) == ("wave", "layer skip")
    assert (STACKED, ALONE) == ("stacked forwards", "one forward per run")


def test_only_the_wave_needs_no_reason():
    for name in GOLDEN:
        strategy = strategy_of(ours(name))
        assert (strategy.because == "") == (strategy.name == WAVE)
    assert [Strategy(name).is_wave for name in (WAVE, LAYER_SKIP, STACKED, ALONE)] == [
        *(True, True, False, False)
    ]


# -- models that stay on the wave ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    assert strategy_of(ours("llama").to(dtype, print_details=False)) == Strategy(WAVE)


@pytest.mark.parametrize(
    "flag",
    [
        "use_attn_result",
        "use_split_qkv_input",
        "use_hook_mlp_in",
        "ungroup_grouped_query_attention",
    ],
)
def test_flags(flag):
    model = ours("llama")
    setattr(model.cfg, flag, True)
    assert strategy_of(model) == Strategy(WAVE)


def test_training_and_gradients_of_weights():
    model = ours("gpt2").train()
    assert all(leaf.requires_grad for leaf in model.parameters())
    assert torch.is_grad_enabled()
    assert strategy_of(model) == Strategy(WAVE)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("leaf", ["blocks.1.attn.W_Q", "blocks.0.mlp.W_in", "unembed.W_U"])
def test_parametrized_weights(leaf):
    model = ours("gpt2")
    path, name = leaf.rsplit(".", 1)
    parametrize.register_parametrization(model.get_submodule(path), name, Doubled())
    assert strategy_of(model) == Strategy(WAVE)


def test_leaves_replaced_by_hand():
    model = ours("gpt2")
    attn = model.blocks[1].attn
    attn.W_Q = nn.Parameter(attn.W_Q.detach().clone().contiguous())
    model.blocks[0].mlp.W_in.data = torch.randn(32, 128)
    assert strategy_of(model) == Strategy(WAVE)


def test_norms_taken_out():
    model = ours("gpt2")
    model.blocks[1].ln1 = nn.Identity()
    assert strategy_of(model) == Strategy(WAVE)


def test_hooks_that_are_gone_and_backward_hooks():
    model = ours("gpt2")
    model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: x)
    model.reset_hooks()
    model.add_hook("blocks.0.hook_resid_pre", lambda grad, hook: None, dir="bwd")
    assert strategy_of(model) == Strategy(WAVE)


# -- hooks, gradients: one forward per run -------------------------------------------------------


def add_ours(model):
    model.add_hook("blocks.1.hook_mlp_out", lambda x, hook: x)
    return "hooks are on 1 modules, first blocks.1.hook_mlp_out"


def add_two(model):
    model.add_hook(lambda name: name.endswith("hook_mlp_out"), lambda x, hook: x)
    return "hooks are on 3 modules, first blocks.0.hook_mlp_out"


def add_permanent(model):
    model.add_perma_hook("hook_embed", lambda x, hook: x)
    return "first hook_embed"


def add_torchs(model):
    model.blocks[0].attn.register_forward_hook(lambda module, args, out: None)
    return "first blocks.0.attn"


def add_torchs_before(model):
    model.unembed.register_forward_pre_hook(lambda module, args: None)
    return "first unembed"


def add_to_the_model(model):
    model.register_forward_hook(lambda module, args, out: None)
    return "first HookedTransformer"


def share_a_module(model):
    model.blocks[1].mlp = model.blocks[0].mlp
    return "blocks.0.mlp and blocks.1.mlp are one module"


@pytest.mark.parametrize(
    "change",
    [
        add_ours,
        add_two,
        add_permanent,
        add_torchs,
        add_torchs_before,
        add_to_the_model,
        share_a_module,
    ],
)
def test_one_forward_per_run(change):
    model = ours("gpt2")
    said = change(model)
    found = strategy_of(model)
    assert found.name == ALONE
    assert said in found.because


def test_global_hooks():
    model = ours("gpt2")
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert strategy_of(model).name == ALONE
    finally:
        handle.remove()
    assert strategy_of(model).name == WAVE


def test_a_hook_within_its_context():
    model = ours("gpt2")
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x)]):
        assert strategy_of(model).name == ALONE
    assert strategy_of(model).name == WAVE


def test_gradients():
    assert strategy_of(ours("gpt2"), needs_gradients=True).name == ALONE
    arguments = {"runs": [Patch("z", 0)], "metric": answer_logit(0)}
    query = plan(ours("gpt2"), prompts(1, 3), prompts(1, 3, 1), gradients=True, **arguments)
    assert query.strategy.name == ALONE
    # A source that requires a gradient is a value like any other until one is asked for.
    vector = torch.zeros(8, requires_grad=True)
    arguments["runs"] = [Patch("z", 0, source=vector)]
    query = plan(ours("gpt2"), prompts(1, 3), prompts(1, 3, 1), **arguments)
    assert query.strategy == Strategy(WAVE)


# -- foreign parts: stacked forwards -------------------------------------------------------------


class OtherMLP(nn.Module):
    def forward(self, x):
        return x


class OtherHookPoint(HookPoint):
    def forward(self, x):
        return super().forward(x)


def replace_an_mlp(model):
    model.blocks[1].mlp = OtherMLP()
    return "blocks.1.mlp is a OtherMLP"


def take_out_an_mlp(model):
    """What makes nothing of a norm adds the stream to itself as an MLP."""
    model.blocks[1].mlp = nn.Identity()
    return "blocks.1.mlp is a Identity"


def override_a_forward(model):
    model.blocks[1].mlp.forward = lambda x: x
    return "blocks.1.mlp.forward was replaced"


def override_a_step_of_attention(model):
    attn = model.blocks[0].attn
    attn.calculate_z_scores = attn.calculate_z_scores
    return "blocks.0.attn.calculate_z_scores was replaced"


def override_the_block(model):
    block = model.blocks[0]
    block.apply_mlp = block.apply_mlp
    return "blocks.0.apply_mlp was replaced"


def override_the_model(model):
    model.forward = model.forward
    return "HookedTransformer.forward was replaced"


def override_the_embedding(model):
    model.input_to_embed = model.input_to_embed
    return "HookedTransformer.input_to_embed was replaced"


def replace_a_hook_point(model):
    model.blocks[1].attn.hook_z = nn.Identity()
    return "blocks.1.attn.hook_z is a Identity"


def replace_a_hook_point_by_a_kind_of_one(model):
    model.blocks[1].attn.hook_z = OtherHookPoint()
    return "blocks.1.attn.hook_z is a OtherHookPoint"


def override_a_hook_point(model):
    model.hook_embed.forward = lambda x: 2 * x
    return "hook_embed.forward was replaced"


def hide_a_module_in_a_parametrized_one(model):
    parametrize.register_parametrization(model.blocks[1].attn, "W_Q", Doubled())
    model.blocks[1].attn.hook_z = OtherMLP()
    return "blocks.1.attn.hook_z is a OtherMLP"


def override_a_parametrized_module(model):
    parametrize.register_parametrization(model.blocks[1].mlp, "W_in", Doubled())
    model.blocks[1].mlp.forward = lambda x: x
    return "blocks.1.mlp.forward was replaced"


def derive_a_norm(model):
    norm = type(model.ln_final)
    model.ln_final.__class__ = type("MyNorm", (norm,), {})
    return "ln_final is a MyNorm"


def mix_dtypes(model):
    model.blocks[1].mlp.double()
    return "is torch.float64 in a torch.float32 model"


@pytest.mark.parametrize(
    "change",
    [
        replace_an_mlp,
        take_out_an_mlp,
        override_a_forward,
        override_a_step_of_attention,
        override_the_block,
        override_the_model,
        override_the_embedding,
        replace_a_hook_point,
        replace_a_hook_point_by_a_kind_of_one,
        override_a_hook_point,
        hide_a_module_in_a_parametrized_one,
        override_a_parametrized_module,
        derive_a_norm,
        mix_dtypes,
    ],
)
def test_stacked_forwards(change):
    model = ours("gpt2")
    said = change(model)
    found = strategy_of(model)
    assert found.name == STACKED
    assert said in found.because


class SubclassedForward(HookedTransformer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class SubclassedElsewhere(HookedTransformer):
    def shout(self):
        """Nothing a forward does."""


@pytest.mark.parametrize(
    ("kind", "name"), [(SubclassedForward, STACKED), (SubclassedElsewhere, WAVE)]
)
def test_subclasses(kind, name):
    model = kind(tiny("gpt2"))
    randomise(model)
    found = strategy_of(model)
    assert found.name == name
    if name == STACKED:
        assert "SubclassedForward.forward was replaced" in found.because


def test_live_hooks_are_named_before_foreign_parts():
    model = ours("bidirectional")
    replace_an_mlp(model)
    add_ours(model)
    assert strategy_of(model).name == ALONE
    model.reset_hooks()
    assert strategy_of(model).name == STACKED


@pytest.mark.tl
def test_another_library():
    pytest.importorskip("transformer_lens")
    from tests.models import theirs

    found = strategy_of(theirs("gpt2"))
    assert found.name == STACKED
    assert re.search("a HookedTransformer of another library", found.because)


@pytest.mark.parametrize("method", ["forward", "get_residual"])
def test_a_method_replaced_on_the_class_itself(monkeypatch, method):
    model = ours("gpt2")
    before = getattr(HookedTransformer, method)
    monkeypatch.setattr(HookedTransformer, method, lambda *a, **k: before(*a, **k))
    found = strategy_of(model)
    assert found.name == "stacked forwards" and f"{method} was replaced" in found.because
