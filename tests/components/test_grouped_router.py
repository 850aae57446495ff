"""DeepSeek's router, token after token."""

import pytest
import torch
import torch.nn.functional as F

from fastlens import HookedTransformer
from fastlens.components.grouped_router import GroupedRouterMoE
from fastlens.components.mlp import GatedMLP, make_mlp
from fastlens.components.moe import MoE
from fastlens.components.rows import mlp_output
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from tests.close import assert_close_to
from tests.configs import tiny

BASE = tiny("llama", d_mlp=20, num_experts=8, experts_per_token=3, dtype=torch.float64)
# V2's router, V3's, and one without groups.
KINDS = {
    "softmax": {"expert_groups": 4, "groups_per_token": 2, "expert_weight_scale": 16.0},
    "sigmoid": {"router_scores": "sigmoid", "expert_groups": 4, "groups_per_token": 2,
                "norm_topk_prob": True, "expert_weight_scale": 2.5},
    "ungrouped": {"router_scores": "sigmoid", "d_shared_expert": 12},
}  # fmt: skip


def build(kind):
    cfg = HookedTransformerConfig(**{**BASE, **KINDS[kind]})
    moe, generator = make_mlp(cfg), torch.Generator().manual_seed(0)
    assert type(moe) is GroupedRouterMoE
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return moe


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 9, 32, generator=generator, dtype=torch.float64)


def choice(moe, token):
    """Expert -> weight, and how near another choice was, in plain Python."""
    cfg, logits = moe.cfg, F.linear(token, moe.W_gate.weight)
    is_sigmoid = cfg.router_scores == "sigmoid"
    scores = (logits.sigmoid() if is_sigmoid else logits.softmax(-1)).tolist()
    seen = [s + b for s, b in zip(scores, moe.b_choice.tolist())] if is_sigmoid else scores  # noqa: B905
    n_groups = cfg.expert_groups or 1
    size = len(scores) // n_groups
    groups = [range(g * size, (g + 1) * size) for g in range(n_groups)]
    counted = 2 if is_sigmoid else 1
    worth = [sum(sorted((seen[e] for e in group), reverse=True)[:counted]) for group in groups]
    best = sorted(range(n_groups), key=lambda g: -worth[g])[: cfg.groups_per_token or 1]
    experts = sorted((e for g in best for e in groups[g]), key=lambda e: -seen[e])
    k = cfg.experts_per_token
    gap = seen[experts[k - 1]] - seen[experts[k]]
    if len(best) < n_groups:
        rest = max(worth[g] for g in range(n_groups) if g not in best)
        gap = min(gap, worth[best[-1]] - rest)
    weights = {e: scores[e] for e in experts[:k]}
    total = sum(weights.values()) if cfg.norm_topk_prob else 1.0
    return {e: w / total * cfg.expert_weight_scale for e, w in weights.items()}, gap


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_sum_over_each_tokens_experts(kind):
    moe, x = build(kind), inputs()
    with torch.no_grad():
        rows = x.flatten(0, 1)
        want, gaps = torch.zeros_like(rows), []
        for i, token in enumerate(rows):
            weights, gap = choice(moe, token)
            gaps.append(gap)
            for expert, weight in weights.items():
                want[i] += weight * moe.experts[expert](token[None])[0]
        if moe.shared_expert is not None:
            want = want + moe.shared_expert(rows)
        assert_close_to(moe(x).flatten(0, 1), want, atol=1e-12)
        assert_close_to(mlp_output(moe, rows), want, atol=1e-12)
        margins = moe.margins(F.linear(rows, moe.W_gate.weight))
        assert_close_to(margins, torch.tensor(gaps, dtype=torch.float64), atol=1e-12)
        chosen = {tuple(sorted(choice(moe, token)[0])) for token in rows}
        assert len(chosen) > 3, "all tokens choose alike: the test shows nothing"


def test_the_bias_chooses_and_does_not_weigh():
    moe, x = build("ungrouped"), inputs().flatten(0, 1)
    with torch.no_grad():
        moe.b_choice.fill_(0.0)
        moe.b_choice[5] = 10.0
        logits = F.linear(x, moe.W_gate.weight)
        weights, indices = moe.routed(logits)
    assert (indices[:, 0] == 5).all()
    assert_close_to(weights[:, 0], logits[:, 5].sigmoid(), atol=1e-12)


def test_edited_scores_change_the_choice():
    moe, x = build("softmax"), inputs()
    seen = {}

    def first_two(scores, hook):
        scores = torch.zeros_like(scores)
        scores[:, [0, 1, 6]] = torch.tensor([0.5, 0.3, 0.2], dtype=scores.dtype)
        return scores

    moe.hook_expert_weights.add_hook(first_two)
    moe.hook_expert_indices.add_hook(lambda found, hook: seen.update(found=found))
    moe(x)
    assert (seen["found"] == torch.tensor([0, 1, 6])).all()


def test_which_layers_are_mixtures():
    cfg = HookedTransformerConfig(**{**BASE, **KINDS["sigmoid"], "n_layers": 3,
                                     "n_dense_layers": 1, "d_mlp_dense": 24})  # fmt: skip
    model = HookedTransformer(cfg)
    kinds = [type(block.mlp) for block in model.blocks]
    assert kinds == [GatedMLP, GroupedRouterMoE, GroupedRouterMoE]
    assert model.blocks[0].mlp.W_in.shape == (32, 24) and cfg.d_mlp == 20
    plain = {**BASE, "n_dense_layers": 0}
    assert type(make_mlp(HookedTransformerConfig(**plain), 0)) is MoE
    matrices = 0
    for block in model.blocks:
        leaves = [*block.attn.parameters(), *block.mlp.parameters()]
        biases = ("b_Q", "b_O", "_b_K", "_b_V")
        leaves = [p for p in leaves if p.ndim > 1]
        matrices += sum(p.numel() for p in leaves)
        matrices -= sum(getattr(block.attn, name).numel() for name in biases if name != "b_O")
    ungrouped = 2 * 32 * cfg.d_head * (cfg.n_heads - (cfg.n_key_value_heads or cfg.n_heads))
    assert cfg.n_params == matrices + 3 * ungrouped


@pytest.mark.parametrize(
    "changes",
    [
        {"expert_groups": 3},
        {"groups_per_token": 5},
        {"groups_per_token": 1},
    ],
)
def test_groups_that_do_not_fit_are_refused(changes):
    with pytest.raises(ConfigError, match="were asked of 8 experts, of which a token takes 3"):
        make_mlp(HookedTransformerConfig(**{**BASE, **KINDS["sigmoid"], **changes}))
    with pytest.raises(ConfigError, match="router_scores='tanh'"):
        HookedTransformerConfig(**{**BASE, "router_scores": "tanh"})
