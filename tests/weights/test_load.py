"""Filling parameters: in place, all problems at once, nothing lost."""

import logging

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.errors import WeightsError
from fastlens.weights import fold, load
from fastlens.weights.source import open_source
from tests.configs import tiny
from tests.weights.checkpoints import hf_model

OFF = dict.fromkeys(fold.FLAGS, False)
ON = {**dict.fromkeys(fold.FLAGS, True), "refactor_factored_attn_matrices": False}


def empty_model(case: str, **changes) -> tuple[HookedTransformer, object]:
    source = open_source(case, hf_model=hf_model(case))
    fields = {**source.config_fields(), "init_weights": False, "device": "cpu", **changes}
    return HookedTransformer(fields), source


@pytest.mark.parametrize("case", ["gpt2", "neox", "llama_grouped"])
def test_parameters_keep_their_memory(case):
    model, source = empty_model(case)
    before = {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    load.load_source(model, source, OFF)
    assert {n: (p.data_ptr(), p.stride()) for n, p in model.named_parameters()} == before
    assert all(p.isfinite().all() and p.requires_grad for p in model.parameters())


def test_hugging_faces_linear_weights_are_copied_straight():
    """Our memory is ``[out, in]`` too: the bytes are the same, not only the values."""
    model, source = empty_model("llama_grouped")
    load.load_source(model, source, OFF)
    theirs = hf_model("llama_grouped").model.layers[1]
    for ours, linear in (
        (model.blocks[1].attn.W_Q, theirs.self_attn.q_proj),
        (model.blocks[1].attn._W_K, theirs.self_attn.k_proj),
        (model.blocks[1].mlp.W_gate, theirs.mlp.gate_proj),
        (model.blocks[1].mlp.W_out, theirs.mlp.down_proj),
        (model.blocks[1].attn.W_O, theirs.self_attn.o_proj),
    ):
        flat = ours.detach().as_strided((ours.numel(),), (1,))
        assert torch.equal(flat, linear.weight.detach().flatten())


def test_the_source_is_not_written_to():
    before = {key: p.clone() for key, p in hf_model("gpt2").state_dict().items()}
    model, source = empty_model("gpt2", normalization_type="LNPre")
    load.load_source(model, source, ON)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(p, before[key]) for key, p in hf_model("gpt2").state_dict().items())


def test_store_empties_the_dict_and_names_what_it_filled():
    model = HookedTransformer(tiny("gpt2"))
    parameters = dict(model.named_parameters())
    tensors = {"unembed.b_U": torch.ones(50), "blocks.0.attn.mask": torch.zeros(0, 0)}
    assert load.store(parameters, tensors) == {"unembed.b_U"}
    assert tensors == {} and (model.b_U == 1).all()
    with pytest.raises(WeightsError, match=r"ln_x\.w, which is not folded"):
        load.store(parameters, {"ln_x.w": torch.zeros(3)})


def test_what_is_left_is_zero_or_an_error():
    model = HookedTransformer(tiny("gpt2"))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        model.b_U.fill_(3.0)
    load.fill_rest(parameters, [key for key in parameters if key != "unembed.b_U"])
    assert not model.b_U.any()
    with pytest.raises(WeightsError, match=r"no weights were given for ln_final\.w"):
        load.fill_rest(parameters, [key for key in parameters if key != "ln_final.w"])


def test_biases_of_norms_and_what_nobody_reads_may_be_absent():
    model = HookedTransformer(tiny("alibi"))
    parameters = dict(model.named_parameters())
    absent = {"ln_final.b", *load.unread(model.cfg)}
    assert absent == {"ln_final.b", "pos_embed.W_pos"}
    with torch.no_grad():
        for name in absent:
            parameters[name].fill_(3.0)
    filled = set(parameters) - absent
    load.fill_rest(parameters, filled, load.unread(model.cfg))
    assert not any(parameters[name].any() for name in absent)
    with pytest.raises(WeightsError, match=r"no weights were given for pos_embed\.W_pos"):
        load.fill_rest(parameters, filled, load.unread(HookedTransformer(tiny("gpt2")).cfg))


def test_check_fit_lists_everything():
    model = HookedTransformer(tiny("gpt2"))
    parameters = dict(model.named_parameters())
    shapes = {key: tuple(p.shape) for key, p in parameters.items()}
    load.check_fit(parameters, {**shapes, "blocks.0.attn.mask": (64, 64)}, model.cfg)
    load.check_fit(parameters, {**shapes, "blocks.9.ln1.w": (3,)}, model.cfg)
    del shapes["unembed.b_U"], shapes["embed.W_E"]
    shapes |= {"ln_final.w": (1,), "blocks.0.attn.W_QQ": (2,)}
    with pytest.raises(WeightsError) as error:
        load.check_fit(parameters, shapes, model.cfg)
    text = str(error.value)
    assert "(3 problems)" in text and "missing: embed.W_E" in text
    assert "wrong shape: ln_final.w is [1], expected [32]" in text
    assert "unknown: blocks.0.attn.W_QQ [2]" in text


def test_missing_norms_are_named(caplog):
    model = HookedTransformer(tiny("gpt2"))
    state = {key: t for key, t in model.state_dict().items() if not key.startswith("ln_final")}
    with caplog.at_level(logging.WARNING):
        load.fill_missing_keys(model, state)
    assert "ln_final.w, ln_final.b" in caplog.text and (state["ln_final.w"] == 1).all()


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        ("gpt2", set()),
        ("solu_ln", set()),
        ("attn_only", set()),
        ("qk_norm", {"q_norm", "k_norm"}),
        ("post_norm", {"ln1_post", "ln2_post"}),
        ("post_embedding_ln", {"ln"}),
    ],
)
def test_norms_that_are_folded_away(family, kept):
    model = HookedTransformer(tiny(family))
    load.fold_norms_away(model)
    assert model.cfg.normalization_type.endswith("Pre")
    with_gain = {n.split(".")[-2] for n, _ in model.named_parameters() if n.endswith(".w")}
    assert with_gain == kept
    load.fold_norms_away(model)
    assert model.cfg.normalization_type.count("Pre") == 1


def test_a_legacy_mask_is_dropped():
    model = HookedTransformer(tiny("gpt2"))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["blocks.0.attn.mask"] = torch.ones(64, 64, dtype=torch.bool)
    load.load_state_dict(model, state, OFF)
    assert model.blocks[0].attn.mask.shape == (0, 0)
