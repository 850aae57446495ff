"""What follows from what: every recipe gives the activation that the forward had, bit for bit."""

import pytest
import torch
import torch.nn as nn

from fastlens.components.recipes import captured, fused_attention, is_ours, norm_recipe, recipes_of
from fastlens.hooks.of_heads import OfHeads
from tests.configs import TINY_CONFIGS
from tests.models import ours, prompts

FAMILIES = sorted(TINY_CONFIGS)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_formulas_give_what_passed(name, dtype):
    model = ours(name, dtype=dtype)
    _, cache = model.run_with_cache(prompts(), lazy=False)
    count = 0
    for layer, block in enumerate(model.blocks):
        for place, recipe in recipes_of(block, f"blocks.{layer}.").items():
            value = recipe.formula(*(cache[source] for source in recipe.sources))
            assert value.dtype == cache[place].dtype
            assert torch.equal(value, cache[place]), place
            count += 1
    assert count or name == "no_norm"


def test_parts_that_are_not_ours_have_none():
    block = ours("gpt2").blocks[0]
    assert set(recipes_of(block, "")) == {
        *("ln1.hook_normalized", "ln2.hook_normalized", "hook_resid_mid", "mlp.hook_post")
    }
    block.ln1.forward = lambda x: x
    assert "ln1.hook_normalized" not in recipes_of(block, "")
    block.mlp = nn.Identity()
    assert "mlp.hook_post" not in recipes_of(block, "")
    block.forward = lambda x: x
    assert recipes_of(block, "") == {}
    assert recipes_of(nn.Identity(), "") == {}
    assert norm_recipe(None, "ln_final", "x") == {}


def test_whose_steps_are_their_own():
    block = ours("gpt2").blocks[0]
    assert is_ours(block.ln1) and is_ours(block.attn) and is_ours(block)
    assert not is_ours(nn.LayerNorm(3))
    handle = block.ln1.register_forward_hook(lambda *_: None)
    assert not is_ours(block.ln1)
    handle.remove()
    assert is_ours(block.ln1)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not is_ours(block.ln1)


def test_an_activation_function_with_weights_is_no_formula():
    block = ours("llama").blocks[0]
    assert "mlp.hook_post" in recipes_of(block, "")
    block.mlp.act_fn = nn.PReLU()
    assert "mlp.hook_post" not in recipes_of(block, "")


def test_attention_whose_pattern_is_looked_at():
    attn = ours("gpt2").blocks[0].attn
    assert fused_attention(attn) is attn
    attn.hook_pattern.add_hook(OfHeads(lambda p, hook: None, [1]))
    assert fused_attention(attn) is None
    assert fused_attention(nn.Identity()) is None


def test_only_what_is_captured_with_its_sources():
    recipes = recipes_of(ours("gpt2").blocks[0], "")
    names = ["hook_resid_pre", "hook_attn_out", "hook_resid_mid", "mlp.hook_post"]
    assert set(captured(names, recipes)) == {"hook_resid_mid"}
