"""Near-ties of routers, and what a sweep that meets one says."""

import copy

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.components import moe
from fastlens.errors import SweepError
from fastlens.patching.metrics import answer_logit
from fastlens.patching.routing import router_gap
from fastlens.patching.sweep import sweep
from tests.configs import tiny

CONFIG = tiny(
    "llama", n_layers=2, num_experts=4, experts_per_token=2, seed=0, init_mode="xavier_normal"
)


def model_with_a_near_tie(gap: float = 1e-7) -> HookedTransformer:
    """In layer 1 one of experts 0 and 1 is chosen, by ``gap`` times the first channel."""
    model = HookedTransformer(copy.deepcopy(CONFIG)).eval()
    with torch.no_grad():
        router = model.blocks[1].mlp.W_gate.weight
        # Whatever its sign, one other expert is far above these two and one below.
        for expert, times in ((1, 1), (2, 2), (3, -3)):
            router[expert] = times * router[0]
        router[1, 0] += gap
    return model


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(2, 20, (1, 6), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_the_nearest_call():
    model, prompt = model_with_a_near_tie(), tokens(0)
    _, cache = model.run_with_cache(prompt)
    want = []
    for layer, block in enumerate(model.blocks):
        logits = cache["normalized", layer, "ln2"][0] @ block.mlp.W_gate.weight.t()
        best = logits.sort(-1, descending=True).values
        want.append((float((best[:, 1] - best[:, 2]).min()), layer))
    found = router_gap(model, lambda: model(prompt))
    assert found is not None and found.layer == min(want)[1]
    assert found.gap == pytest.approx(min(want)[0], abs=1e-6)
    assert not any(block.mlp.W_gate._forward_hooks for block in model.blocks)


def test_a_model_without_routers_has_none():
    model = HookedTransformer(tiny("llama"))
    assert router_gap(model, lambda: pytest.fail("it was run")) is None


def test_listening_ends_with_an_error():
    model = model_with_a_near_tie()
    with pytest.raises(ZeroDivisionError):
        router_gap(model, lambda: 1 / 0)
    assert not any(block.mlp.W_gate._forward_hooks for block in model.blocks)


@pytest.mark.parametrize(("gap", "words"), [(1e-7, "neither run is wrong"), (0.5, "or this is a")])
def test_a_sweep_that_fails_names_the_nearest_call(monkeypatch, gap, words):
    """The sweep's products are nudged by more than rounding, so that choices turn over."""
    model, real = model_with_a_near_tie(gap), moe.linear

    def nudged(x, weight, bias=None):
        out = real(x, weight, bias)
        if weight.shape[0] == model.cfg.num_experts:
            out = out.clone()
            out[:, 1] += 0.05
        return out

    monkeypatch.setattr(moe, "linear", nudged)
    with pytest.raises(SweepError, match="nearest call of a router was in layer") as error:
        sweep(model, tokens(0), tokens(1), metric=answer_logit(3), verify="all")
    assert words in str(error.value)
    assert set(error.value.scores.certificate["router_gap"]) == {"gap", "layer", "rounding"}
