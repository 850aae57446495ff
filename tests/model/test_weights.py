"""Weight properties: shapes, copies, and what a model without the weight says."""

import pytest
import torch

from fastlens.errors import ConfigError
from tests.close import assert_close_to
from tests.models import ours


def test_single_matrices_are_the_leaves_and_stacks_are_copies():
    model = ours("llama")
    assert model.W_E is model.embed.W_E and model.W_U is model.unembed.W_U
    stack = model.W_in
    assert stack.shape == (3, 32, 48) and model.W_gate.shape == (3, 32, 48)
    with torch.no_grad():
        stack.zero_()
    assert model.blocks[0].mlp.W_in.any()
    assert model.W_K.shape == (3, 4, 32, 8)


def test_what_is_not_there_says_so():
    with pytest.raises(AttributeError, match="rotary"):
        _ = ours("llama").W_pos
    with pytest.raises(ConfigError, match="attn_only"):
        _ = ours("attn_only").W_in
    assert ours("gpt2").W_gate is None
    with pytest.raises(IndexError, match="layer=4"):
        ours("gpt2").accumulated_bias(4)
    with pytest.raises(ValueError, match="'Q', 'K' or 'V'"):
        ours("gpt2").all_composition_scores("q")


def test_circuits_and_composition_scores_by_definition():
    model = ours("gpt2")
    ov = model.W_V @ model.W_O
    qk = model.W_Q @ model.W_K.transpose(-2, -1)
    assert_close_to(model.OV.AB, ov)
    assert_close_to(model.QK.AB, qk)
    scores = model.all_composition_scores("K")
    want = (ov[0, 1] @ qk[2, 3].T).norm() / ov[0, 1].norm() / qk[2, 3].norm()
    assert_close_to(scores[0, 1, 2, 3], want)
    assert not scores[1, :, 1].any() and not scores[2, :, 1].any()


def test_accumulated_bias_is_the_sum_of_output_biases():
    model = ours("attn_only")
    assert_close_to(model.accumulated_bias(2), model.b_O.sum(0))
    model = ours("gpt2")
    want = model.b_O[:2].sum(0) + model.b_out[:1].sum(0)
    assert_close_to(model.accumulated_bias(1, mlp_input=True), want)
