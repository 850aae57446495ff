"""MLPs against their formulas."""

import pytest
import torch

from fastlens.components.mlp import MLP, CanBeUsedAsMLP, GatedMLP, make_mlp
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from tests.close import assert_close_to
from tests.configs import tiny


def build(name, **changes):
    mlp = make_mlp(HookedTransformerConfig(**tiny(name, **changes)))
    for leaf in mlp.parameters():
        leaf.data.copy_(torch.randn(leaf.shape) * 0.3)
    return mlp


X = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))


def test_plain_mlp():
    mlp = build("gpt2", act_fn="relu")
    assert type(mlp) is MLP
    want = (X @ mlp.W_in + mlp.b_in).relu() @ mlp.W_out + mlp.b_out
    assert_close_to(mlp(X), want)


@pytest.mark.parametrize("grad", [True, False])
def test_gated_mlp_adds_its_bias_after_the_product(grad):
    mlp = build("llama")
    assert type(mlp) is GatedMLP
    gate, up = X @ mlp.W_gate, X @ mlp.W_in
    want = (torch.nn.functional.silu(gate) * up + mlp.b_in) @ mlp.W_out + mlp.b_out
    with torch.set_grad_enabled(grad):
        assert_close_to(mlp(X), want)
        seen = {}
        mlp.hook_pre.add_hook(lambda a, hook: seen.update(pre=a))
        mlp.hook_pre_linear.add_hook(lambda a, hook: seen.update(pre_linear=a))
        assert_close_to(mlp(X), want)
    assert_close_to(seen["pre"], gate)
    assert_close_to(seen["pre_linear"], up)


def test_solu_ln_has_a_norm_of_its_own():
    mlp = build("solu_ln")
    pre = X @ mlp.W_in + mlp.b_in
    mid = pre * pre.softmax(-1)
    want = mlp.ln(mid) @ mlp.W_out + mlp.b_out
    assert_close_to(mlp(X), want)
    assert mlp.ln.w.shape == (128,)


def test_a_replaced_activation_is_used():
    mlp = build("gpt2")
    mlp.act_fn = torch.sin
    assert_close_to(mlp(X), torch.sin(X @ mlp.W_in + mlp.b_in) @ mlp.W_out + mlp.b_out)


def test_gate_and_in_are_neighbours_after_a_cast():
    from fastlens.components.layout import neighbours

    mlp = build("llama").double()
    with torch.no_grad():
        assert neighbours([mlp.W_gate.t(), mlp.W_in.t()]) is not None


def test_the_base_class_is_the_identity_and_needs_a_size():
    cfg = HookedTransformerConfig(**tiny("gpt2"))
    assert CanBeUsedAsMLP(cfg)(X) is X
    cfg.d_mlp = None
    with pytest.raises(ConfigError, match="d_mlp"):
        CanBeUsedAsMLP(cfg)
