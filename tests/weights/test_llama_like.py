"""Heads, rotary fields and tensors that families of Llama's shape share."""

import pytest

from fastlens.weights.llama_like import A, M, heads_and_rotary, keys


def test_heads():
    fields = heads_and_rotary({"num_attention_heads": 8, "hidden_size": 64})
    assert (fields["d_head"], fields["n_key_value_heads"], fields["rotary_dim"]) == (8, None, 8)
    fields = heads_and_rotary(
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}, fraction=0.25
    )
    assert (fields["d_head"], fields["n_key_value_heads"], fields["rotary_dim"]) == (16, 2, 4)


def _biases(**options):
    return {name: key.when for name, key in keys(**options).items() if name.endswith("bias")}


@pytest.mark.parametrize("bias", [True, "switch"])
def test_biases_are_there_always_or_by_a_switch(bias):
    when = None if bias is True else bias
    assert _biases() == {}
    assert _biases(qkv_bias=bias) == {f"{A}{x}_proj.bias": when for x in "qkv"}
    assert _biases(o_bias=bias) == {f"{A}o_proj.bias": when}
    gated = {f"{M}{x}_proj.bias": when for x in ("gate", "up", "down")}
    assert _biases(mlp_bias=bias) == gated
    del gated[f"{M}gate_proj.bias"]
    assert _biases(mlp_bias=bias, gated=False) == gated


def test_an_mlp_without_gate_has_a_bias_of_its_own():
    plain = keys(mlp_bias=True, gated=False)
    assert plain[f"{M}up_proj.bias"].into == "blocks.{l}.mlp.b_in"
    assert f"{M}gate_proj.weight" not in plain
    assert keys(mlp_bias=True)[f"{M}up_proj.bias"].into == ()
