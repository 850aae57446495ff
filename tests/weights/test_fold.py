"""Processing: TransformerLens' values, flag by flag, and the model's function unchanged."""

import logging
import warnings

import pytest
import torch

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights import fold
from tests.configs import tiny

OFF = dict.fromkeys(fold.FLAGS, False)
ALL = {**dict.fromkeys(fold.FLAGS, True), "refactor_factored_attn_matrices": False}
FLAG_SETS = {
    "fold_ln": {**OFF, "fold_ln": True},
    "center_writing_weights": {**OFF, "center_writing_weights": True},
    "center_unembed": {**OFF, "center_unembed": True},
    "fold_value_biases": {**OFF, "fold_value_biases": True},
    "none": OFF,
    "all": ALL,
}
FAMILIES = ["gpt2", "llama", "llama_mqa", "neox", "attn_only", "solu_ln", "qk_norm", "post_norm"]


def shapes(cfg: HookedTransformerConfig) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of a plain (not gated, not grouped) model."""
    d, h, dh, m = cfg.d_model, cfg.n_heads, cfg.d_head, cfg.d_mlp
    out: dict[str, tuple[int, ...]] = {
        "embed.W_E": (cfg.d_vocab, d),
        "pos_embed.W_pos": (cfg.n_ctx, d),
    }
    for layer in range(cfg.n_layers):
        block = {
            "ln1.w": (d,), "ln1.b": (d,),
            "attn.W_Q": (h, d, dh), "attn.W_O": (h, dh, d), "attn.b_Q": (h, dh), "attn.b_O": (d,),
            "attn.W_K": (h, d, dh), "attn.W_V": (h, d, dh), "attn.b_K": (h, dh),
            "attn.b_V": (h, dh),
            "ln2.w": (d,), "ln2.b": (d,),
            "mlp.W_in": (d, m), "mlp.b_in": (m,), "mlp.W_out": (m, d), "mlp.b_out": (d,),
        }  # fmt: skip
        out |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    final = {"ln_final.w": (d,), "ln_final.b": (d,), "unembed.W_U": (d, cfg.d_vocab)}
    return {**out, **final, "unembed.b_U": (cfg.d_vocab,)}


def random_state(cfg: HookedTransformerConfig, dtype: torch.dtype = torch.float32) -> dict:
    torch.manual_seed(1)
    return {key: torch.randn(shape).to(dtype) for key, shape in shapes(cfg).items()}


def tl_model(tl, fields: dict):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tl.HookedTransformer(tl.HookedTransformerConfig(**fields))


def tl_state(model) -> dict:
    """The model's state dict with every float parameter random, biases and gains included."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same(ours: dict, theirs: dict, tolerance: float = 1e-6) -> None:
    assert list(ours) == list(theirs)
    for key, want in theirs.items():
        got = ours[key]
        assert got.shape == want.shape and got.dtype == want.dtype, key
        if want.is_floating_point() and want.numel() and want.isfinite().all():
            scale = max(1.0, want.abs().max().item())
            assert (got - want).abs().max().item() <= tolerance * scale, key


@pytest.mark.tl
@pytest.mark.parametrize("flags", FLAG_SETS.values(), ids=FLAG_SETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_transformerlens(family, flags):
    tl = pytest.importorskip("transformer_lens")
    from transformer_lens.weight_processing import ProcessWeights

    model = tl_model(tl, tiny(family))
    state = tl_state(model)
    ours = fold.process_state_dict(state, HookedTransformerConfig(**tiny(family)), **flags)
    theirs = ProcessWeights.process_weights(dict(state), model.cfg, **flags)
    assert_same(ours, theirs)


@pytest.mark.tl
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_do_not_change(family):
    tl = pytest.importorskip("transformer_lens")
    fields = tiny(family)
    model = tl_model(tl, fields)
    state = tl_state(model)
    processed = fold.process_state_dict(state, HookedTransformerConfig(**fields), **ALL)
    folded = tl_model(tl, {**fields, "normalization_type": fields["normalization_type"] + "Pre"})
    folded.load_state_dict(processed, strict=False)
    tokens = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        before, after = model(tokens), folded(tokens)
    assert (before - after).abs().max() > 1e-3, "centring moved no logit: the test shows nothing"
    gap = (before.log_softmax(-1) - after.log_softmax(-1)).abs().max()
    assert gap <= 2e-4 * before.abs().max()


@pytest.mark.tl
def test_refactored_products_are_transformerlens():
    tl = pytest.importorskip("transformer_lens")
    from transformer_lens.weight_processing import ProcessWeights

    model = tl_model(tl, tiny("gpt2"))
    state = tl_state(model)
    cfg = HookedTransformerConfig(**tiny("gpt2"))
    ours = fold.refactor_factored_attn_matrices(state, cfg)
    theirs = ProcessWeights.refactor_factored_attn_matrices(state, model.cfg)
    for layer in range(cfg.n_layers):
        get = [{k.split(".")[-1]: v for k, v in s.items() if f"blocks.{layer}.attn." in k}
               for s in (ours, theirs)]  # fmt: skip
        ours_qk, theirs_qk = (
            torch.cat([g["W_Q"], g["b_Q"][:, None]], 1)
            @ torch.cat([g["W_K"], g["b_K"][:, None]], 1).mT
            for g in get
        )
        torch.testing.assert_close(ours_qk, theirs_qk, rtol=1e-4, atol=1e-4)
        ours_ov, theirs_ov = (g["W_V"] @ g["W_O"] for g in get)
        torch.testing.assert_close(ours_ov, theirs_ov, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(get[0]["b_O"], get[1]["b_O"], rtol=1e-5, atol=1e-5)
        rotation = get[0]["W_O"] @ get[0]["W_O"].mT
        torch.testing.assert_close(
            rotation, torch.eye(cfg.d_head).expand_as(rotation), atol=1e-5, rtol=0
        )


def test_a_layer_by_hand():
    cfg = HookedTransformerConfig(**tiny("gpt2", n_layers=1))
    state = random_state(cfg)
    out = fold.process_state_dict(state, cfg, **ALL)
    ln_w, ln_b = state["blocks.0.ln1.w"], state["blocks.0.ln1.b"]
    w, b = state["blocks.0.attn.W_Q"], state["blocks.0.attn.b_Q"]
    scaled = w * ln_w[None, :, None]
    torch.testing.assert_close(out["blocks.0.attn.W_Q"], scaled - scaled.mean(1, keepdim=True))
    torch.testing.assert_close(out["blocks.0.attn.b_Q"], b + torch.einsum("m,hmd->hd", ln_b, w))
    assert (out["blocks.0.ln1.w"] == 1).all() and (out["blocks.0.ln1.b"] == 0).all()
    assert (out["blocks.0.attn.b_V"] == 0).all()
    for name in (
        *("embed.W_E", "pos_embed.W_pos", "blocks.0.attn.W_O", "blocks.0.attn.b_O"),
        *("blocks.0.mlp.W_out", "blocks.0.mlp.b_out", "unembed.W_U", "unembed.b_U"),
    ):
        assert out[name].mean(-1).abs().max() < 1e-6, name


def test_the_input_is_not_touched():
    cfg = HookedTransformerConfig(**tiny("gpt2"))
    state = random_state(cfg)
    copies = {key: tensor.clone() for key, tensor in state.items()}
    fold.process_state_dict(state, cfg, **ALL)
    assert list(state) == list(copies)
    assert all(torch.equal(state[key], copies[key]) for key in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_consuming_gives_the_same_in_the_same_memory(dtype):
    cfg = HookedTransformerConfig(**tiny("gpt2", dtype=dtype))
    group = dict(fold.split_groups(random_state(cfg, dtype)))["blocks.1"]
    want = fold.process_group("blocks.1", group, cfg)
    memory = {key: tensor.data_ptr() for key, tensor in group.items()}
    out = fold.process_group("blocks.1", group, cfg, consume=True)
    assert out is group and all(torch.equal(out[key], want[key]) for key in want)
    if dtype != torch.bfloat16:
        kept = {key for key in memory if out[key].data_ptr() == memory[key]}
        assert {f"blocks.1.{name}" for name in ("attn.W_Q", "mlp.W_in", "mlp.W_out")} <= kept


def test_gradients_are_not_recorded():
    cfg = HookedTransformerConfig(**tiny("gpt2"))
    state = {key: torch.nn.Parameter(tensor) for key, tensor in random_state(cfg).items()}
    out = fold.process_state_dict(state, cfg, **ALL)
    assert not out["blocks.0.attn.W_Q"].requires_grad


def test_a_group_needs_no_other_group():
    cfg = HookedTransformerConfig(**tiny("gpt2"))
    state = random_state(cfg)
    whole = fold.process_state_dict(state, cfg, **ALL)
    for name, group in fold.split_groups(state):
        for key, tensor in fold.process_group(name, group, cfg, **ALL).items():
            assert torch.equal(tensor, whole[key])


def test_float64_stays_float64():
    cfg = HookedTransformerConfig(**tiny("gpt2", dtype=torch.float64))
    state = random_state(cfg, torch.float64)
    out = fold.process_state_dict(state, cfg, **ALL)
    assert all(tensor.dtype == torch.float64 for tensor in out.values())
    w, gain = state["unembed.W_U"], state["ln_final.w"]
    scaled = w * gain[:, None]
    scaled = scaled - scaled.mean(0, keepdim=True)
    want = scaled - scaled.mean(1, keepdim=True)
    assert (out["unembed.W_U"] - want).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_processed_in_float32(dtype):
    cfg = HookedTransformerConfig(**tiny("gpt2", dtype=dtype))
    state = random_state(cfg, dtype)
    out = fold.process_state_dict(state, cfg, **ALL)
    exact = fold.process_state_dict({k: v.float() for k, v in state.items()}, cfg, **ALL)
    for key, tensor in out.items():
        assert tensor.dtype == dtype and torch.equal(tensor, exact[key].to(dtype)), key


def test_missing_biases_are_zero():
    cfg = HookedTransformerConfig(**tiny("gpt2"))
    state = random_state(cfg)
    bare = {k: v for k, v in state.items() if not k.split(".")[-1].startswith("b_")}
    zeros = {k: torch.zeros_like(v) if k not in bare else v for k, v in state.items()}
    got, want = (fold.process_state_dict(s, cfg, **ALL) for s in (bare, zeros))
    # Nothing is added to b_out, so it stays absent.
    assert {key.split(".")[-1] for key in set(want) - set(got)} == {"b_out"}
    assert all(torch.equal(got[key], want[key]) for key in got)


def test_a_parallel_block_without_ln2_reads_ln1():
    cfg = HookedTransformerConfig(**tiny("gpt2", parallel_attn_mlp=True, n_layers=1))
    state = {k: v for k, v in random_state(cfg).items() if ".ln2." not in k}
    out = fold.process_state_dict(state, cfg, **{**OFF, "fold_ln": True})
    scaled = state["blocks.0.mlp.W_in"] * state["blocks.0.ln1.w"][:, None]
    torch.testing.assert_close(out["blocks.0.mlp.W_in"], scaled - scaled.mean(0, keepdim=True))


def test_a_final_rms_norm_keeps_the_mean():
    cfg = HookedTransformerConfig(**tiny("gpt2", final_rms=True))
    state = {k: v for k, v in random_state(cfg).items() if k != "ln_final.b"}
    out = fold.process_state_dict(state, cfg, **{**ALL, "center_unembed": False})
    want = state["unembed.W_U"] * state["ln_final.w"][:, None]
    torch.testing.assert_close(out["unembed.W_U"], want)
    assert torch.equal(out["embed.W_E"], state["embed.W_E"])


def test_experts_share_the_gain():
    """Routers too, and the expert that all tokens pass."""
    cfg = HookedTransformerConfig(
        **tiny("llama", n_layers=1, n_key_value_heads=None, num_experts=2, experts_per_token=1)
    )
    state = random_state(cfg)
    state = {k: v for k, v in state.items() if ".mlp." not in k and not k.endswith((".b", "W_pos"))}
    shape = (cfg.d_mlp, cfg.d_model)
    state["blocks.0.mlp.W_gate.weight"] = torch.randn(2, cfg.d_model)
    for e in range(2):
        for name in ("W_in", "W_gate"):
            state[f"blocks.0.mlp.experts.{e}.{name}.weight"] = torch.randn(shape)
            state[f"blocks.0.mlp.shared_expert.{name}.weight"] = torch.randn(shape)
    state["blocks.0.mlp.W_shared_gate.weight"] = torch.randn(1, cfg.d_model)
    out = fold.process_state_dict(state, cfg, **ALL)
    for key in (k for k in state if ".mlp." in k):
        torch.testing.assert_close(out[key], state[key] * state["blocks.0.ln2.w"])


@pytest.mark.parametrize(
    ("changes", "off"),
    [
        (
            {"positional_embedding_type": "shortformer"},
            {"fold_ln", "center_writing_weights", "center_unembed"},
        ),
        ({"output_logits_soft_cap": 10.0}, {"center_unembed"}),
        ({"original_architecture": "Olmo2ForCausalLM"}, {"fold_ln", "center_writing_weights"}),
        ({"normalization_type": None}, {"fold_ln"}),
        ({"gated_mlp": True}, {"fold_ln"}),
        ({"num_experts": 2, "experts_per_token": 1}, {"fold_ln", "center_writing_weights"}),
        ({"use_attention_sinks": True}, {"fold_value_biases"}),
        ({}, set()),
    ],
)
def test_flags_that_would_change_the_model_are_off(changes, off, caplog):
    cfg = HookedTransformerConfig(**tiny("gpt2", **changes))
    with caplog.at_level(logging.WARNING):
        flags = fold.possible_flags(cfg, **ALL)
    assert {flag for flag in ALL if ALL[flag] and not flags[flag]} == off
    assert len(caplog.records) == len(off)
    caplog.clear()
    assert fold.possible_flags(cfg, **OFF) == OFF and not caplog.records


def test_refactoring_needs_one_qk_matrix():
    cfg = HookedTransformerConfig(**tiny("neox"))
    with pytest.raises(ConfigError, match="rotary positions"):
        fold.process_state_dict(
            random_state(cfg), cfg, **{**OFF, "refactor_factored_attn_matrices": True}
        )


@pytest.mark.parametrize(
    "changes", [{"use_qk_norm": True}, {"use_attention_sinks": True}, {"clip_qkv": 0.5}]
)
def test_refactoring_needs_nothing_between_the_factors(changes):
    cfg = HookedTransformerConfig(**tiny("gpt2", **changes))
    with pytest.raises(ConfigError, match="QK-norms, clipping or attention sinks"):
        fold.possible_flags(cfg, refactor_factored_attn_matrices=True)
