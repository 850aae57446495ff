"""Mixtures of experts."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from fastlens import HookedTransformer
from fastlens.components.layout import neighbours
from fastlens.components.moe import HIDDEN_BYTES, ExpertWeight, MoE, MoEGatedMLP
from fastlens.components.rows import mlp_output
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, SweepError
from fastlens.patching.sites import available_sites, find_site
from tests.close import assert_close_to
from tests.configs import tiny

# A router that sums to one; one that does not; GPT-OSS'; one beside a shared expert; and without
# a gate on it.
KINDS = {
    "normed": {"norm_topk_prob": True},
    "plain": {},
    "gpt_oss": {"original_architecture": "GptOssForCausalLM", "expert_glu_limit": 0.6},
    "shared": {"d_shared_expert": 28, "gates_shared_expert": True},
    "ungated": {"d_shared_expert": 28},
}
CONFIG = tiny("llama", d_mlp=20, num_experts=5, experts_per_token=2)


def build(kind: str = "plain", dtype: torch.dtype = torch.float64, **changes) -> MoE:
    """Random weights and biases, experts told well apart."""
    cfg = HookedTransformerConfig(**{**CONFIG, **KINDS[kind], "dtype": dtype, **changes})
    moe, generator = MoE(cfg), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            scale = 1.0 if name.startswith("W_gate.") else 0.4
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return moe


def inputs(batch: int = 2, pos: int = 7, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, pos, 32, generator=generator).to(dtype)


def by_hand(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """Token after token, expert after expert."""
    cfg, out = moe.cfg, torch.zeros_like(x)
    for at in torch.cartesian_prod(*map(torch.arange, x.shape[:2])):
        token = x[tuple(at)]
        logits = F.linear(token, moe.W_gate.weight, moe.W_gate.bias)
        chosen = logits.topk(cfg.experts_per_token).indices.tolist()
        weights = logits.softmax(-1)
        if cfg.softmax_after_top_k or cfg.norm_topk_prob:
            weights = weights / weights[chosen].sum()
        for expert in chosen:
            out[tuple(at)] += weights[expert] * _expert(moe.experts[expert], token)
        if moe.shared_expert is not None:
            share = _expert(moe.shared_expert, token)
            if moe.W_shared_gate is not None:
                share = share * torch.sigmoid(moe.W_shared_gate(token))
            out[tuple(at)] += share
    return out


def _expert(expert, token):
    gate, up = expert.W_gate(token), expert.W_in(token)
    limit = expert.cfg.expert_glu_limit
    if limit is None:
        return expert.W_out(F.silu(gate) * up)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return expert.W_out((up + 1) * gate * torch.sigmoid(1.702 * gate))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_sum_over_each_tokens_experts(kind):
    moe, x = build(kind), inputs()
    truth = by_hand(moe, x)
    assert_close_to(moe(x), truth, atol=1e-12)
    with torch.no_grad():
        assert_close_to(moe(x), truth, atol=1e-12)
        assert_close_to(mlp_output(moe, x.flatten(0, 1)), truth.flatten(0, 1), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    moe, x = build(kind), inputs(1, 3).requires_grad_()
    leaves = [x, *moe.parameters()]
    grads = torch.autograd.grad(moe(x).sin().sum(), leaves, allow_unused=True)
    truth = torch.autograd.grad(by_hand(moe, x).sin().sum(), leaves, allow_unused=True)
    for leaf, got, want in zip(leaves, grads, truth, strict=True):
        got, want = (torch.zeros_like(leaf) if grad is None else grad for grad in (got, want))
        assert_close_to(got, want, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_does_not_depend_on_a_tokens_company(kind, dtype):
    moe, x = build(kind, dtype), inputs(3, 5, dtype=dtype)
    atol = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    with torch.no_grad():
        together = moe(x)
        for at in range(3):
            assert_close_to(moe(x[at : at + 1]), together[at : at + 1], atol=atol)
            assert_close_to(mlp_output(moe, x[at]), together[at], atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_nothing(kind):
    moe, x = build(kind), inputs()
    want, seen = moe(x), []
    for name, module in moe.named_modules():
        if name.rsplit(".", 1)[-1].startswith("hook_"):
            module.add_hook(lambda value, hook, name=name: seen.append((name, value)))
    assert_close_to(moe(x), want, atol=1e-12)
    names = [name for name, _ in seen]
    assert names[:2] == ["hook_expert_weights", "hook_expert_indices"]
    values = dict(seen)
    assert values["hook_expert_weights"].shape == (14, 5)
    assert values["hook_expert_indices"].shape == (14, 2)
    sent = values["hook_expert_indices"].flatten().bincount(minlength=5).tolist()
    for expert in range(5):
        if sent[expert] or kind != "gpt_oss":
            assert values[f"experts.{expert}.hook_post"].shape == (sent[expert], 20)
    if kind == "shared":
        assert values["shared_expert.hook_post"].shape == (14, 28)
        assert values["hook_shared_gate"].shape == (14, 1)


def test_rows_come_to_an_expert_choice_by_choice():
    moe, x, seen = build(), inputs(), {}
    moe.hook_expert_indices.add_hook(lambda value, hook: seen.update(indices=value))
    moe.experts[2].hook_pre.add_hook(lambda value, hook: seen.update(pre=value))
    moe(x)
    rows = torch.cat([(seen["indices"][:, choice] == 2).nonzero()[:, 0] for choice in (0, 1)])
    assert len(rows) > 2
    assert_close_to(seen["pre"], moe.experts[2].W_in(x.flatten(0, 1)[rows]), atol=1e-12)


def test_experts_without_rows_are_called_only_where_somebody_looks():
    moe, x, seen = build(), inputs(1, 1), {}
    indices = moe.routed(moe.W_gate(x[0]))[1][0].tolist()
    idle = next(expert for expert in range(5) if expert not in indices)
    moe.experts[idle].register_forward_hook(lambda *_: pytest.fail("it was called"))
    moe(x)
    moe = build()
    moe.experts[idle].hook_gate.add_hook(lambda value, hook: seen.update(shape=value.shape))
    moe(x)
    assert seen["shape"] == (0, 20)


def test_edits_of_the_routers_weights_change_the_choice():
    moe, x = build("normed"), inputs()

    def only(value, hook):
        return torch.zeros_like(value).index_fill_(1, torch.tensor([1, 3]), 0.25)

    moe.hook_expert_weights.add_hook(only)
    rows = x.flatten(0, 1)
    want = 0.5 * moe.experts[1](rows) + 0.5 * moe.experts[3](rows)
    assert_close_to(moe(x).flatten(0, 1), want, atol=1e-12)


def test_behind_the_choice_they_change_weights_alone():
    moe, x = build("gpt_oss"), inputs()
    want = 2 * by_hand(moe, x)
    moe.hook_expert_weights.add_hook(lambda value, hook: value * 2)
    assert_close_to(moe(x), want, atol=1e-12)


def test_edits_of_the_choice_send_rows_elsewhere():
    moe, x = build(), inputs()
    rows, seen = x.flatten(0, 1), {}
    moe.hook_expert_weights.add_hook(lambda value, hook: seen.update(weights=value))
    # Twice the same expert is legal.
    moe.hook_expert_indices.add_hook(lambda value, hook: torch.full_like(value, 4))
    share = moe.routed(moe.W_gate(rows))[0].sum(-1, keepdim=True)
    assert_close_to(moe(x).flatten(0, 1), share * moe.experts[4](rows), atol=1e-12)


def test_what_a_user_puts_in_an_experts_place_is_called():
    moe, x = build(), inputs()
    moe.experts[1] = torch.nn.Identity()
    moe.experts[2].forward = lambda rows: 3 * rows
    weights, indices = moe.routed(moe.W_gate(x.flatten(0, 1)))
    rows = x.flatten(0, 1)
    writes = [expert(rows) for expert in build().experts]
    writes[1], writes[2] = rows, 3 * rows
    chosen = torch.stack(writes, 1).gather(1, indices[..., None].expand(-1, -1, 32))
    want = (weights[..., None] * chosen).sum(1)
    assert_close_to(moe(x).flatten(0, 1), want, atol=1e-12)


def test_a_listener_on_a_linear_layer_is_heard():
    moe, x, heard = build(), inputs(), []
    with torch.no_grad():
        moe.experts[0].W_gate.register_forward_hook(lambda *_: heard.append("gate"))
        moe.experts[0].W_out.register_forward_hook(lambda *_: heard.append("out"))
        moe(x)
    assert heard == ["gate", "out"]


def test_gate_and_in_lie_side_by_side_wherever_the_model_goes():
    def joint(moe):
        with torch.no_grad():
            return [neighbours([e.W_gate.weight, e.W_in.weight]) is not None for e in moe.experts]

    moe = build(dtype=torch.float32)
    assert all(joint(moe))
    assert all(joint(moe.double())) and all(joint(copy.deepcopy(moe).to(torch.bfloat16)))


def test_hidden_activations_are_made_in_parts(monkeypatch):
    moe, x = build("shared"), inputs(4, 300).flatten(0, 1)
    with torch.no_grad():
        whole = mlp_output(moe, x)
        monkeypatch.setattr("fastlens.components.moe.HIDDEN_BYTES", 1)
        assert_close_to(mlp_output(moe, x), whole, atol=1e-12)
    assert HIDDEN_BYTES > 1


def test_no_rows():
    moe = build("shared")
    assert moe(torch.zeros(0, 3, 32, dtype=torch.float64)).shape == (0, 3, 32)
    with torch.no_grad():
        assert mlp_output(moe, torch.zeros(0, 32, dtype=torch.float64)).shape == (0, 32)


def test_the_experts_are_linear_layers():
    moe = build("gpt_oss")
    assert isinstance(moe.W_gate, torch.nn.Linear) and isinstance(moe.experts[0], MoEGatedMLP)
    assert moe.experts[0].W_in.weight.shape == (20, 32) and moe.W_gate.bias.shape == (5,)
    assert ExpertWeight(torch.zeros(2, 3)).bias is None
    state = torch.random.get_rng_state()
    build()
    MoE(moe.cfg)
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match="num_experts"):
        MoE(HookedTransformerConfig(**tiny("llama")))
    with pytest.raises(ConfigError, match="weights of its own"):
        build(act_fn="xielu")
    with pytest.raises(ConfigError, match="experts_per_token=6 must be 1 to num_experts=5"):
        build(experts_per_token=6)


def test_a_model_of_experts_has_no_neurons_all_tokens_share():
    model = HookedTransformer(CONFIG)
    sites = available_sites(model.cfg, model.hook_dict)
    assert {"mlp_in", "mlp_out"} <= set(sites)
    assert not {"mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_mid"} & set(sites)
    with pytest.raises(SweepError, match="each of which sees other tokens"):
        find_site("mlp_post", model.cfg, model.hook_dict, [0])
    with pytest.raises(ConfigError, match=r"mlp\.experts\[expert\]"):
        _ = model.W_out
    with torch.no_grad():
        model.blocks[0].attn.b_O.fill_(2)
    assert torch.equal(model.accumulated_bias(1), torch.full((32,), 2.0))


@pytest.mark.tl
@pytest.mark.parametrize("kind", ["normed", "plain", "gpt_oss"])
def test_everything_is_transformer_lens(kind):
    """Parameters and their order, seeds, hooks and their values, ragged ones too."""
    tl = pytest.importorskip("transformer_lens")
    changes = {k: v for k, v in KINDS[kind].items() if k != "expert_glu_limit"}
    fields = {**CONFIG, **changes, "seed": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = tl.HookedTransformer(tl.HookedTransformerConfig(**fields))
    ours = HookedTransformer(copy.deepcopy(fields))
    assert list(ours.hook_dict) == list(theirs.hook_dict)
    for (name, a), (other, b) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(a, b), name
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, got = ours.run_with_cache(tokens)
        _, want = theirs.run_with_cache(tokens)
    assert list(got) == list(want)
    for name in want:
        assert_close_to(got[name], want[name], atol=2e-6, name=name)
