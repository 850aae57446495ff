"""Views from Hugging Face's layout: TransformerLens' axes, and no copies."""

import pytest
import torch

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, WeightsError
from fastlens.weights import views

CFG = HookedTransformerConfig(
    n_layers=1, d_model=6, d_head=2, n_heads=4, n_key_value_heads=2, n_ctx=5, d_vocab=7,
    device="cpu",
)  # fmt: skip


@pytest.mark.parametrize(
    ("view", "shape", "want"),
    [
        (views.as_it_is, (3, 4), (3, 4)),
        (views.transposed, (3, 4), (4, 3)),
        (views.input_heads, (8, 6), (4, 6, 2)),
        (views.input_heads, (4, 6), (2, 6, 2)),
        (views.output_heads, (6, 8), (4, 2, 6)),
        (views.bias_heads, (8,), (4, 2)),
        (views.first_positions, (9, 6), (5, 6)),
    ],
)
def test_shapes_and_memory(view, shape, want):
    tensor = torch.randn(shape)
    out = view(tensor, CFG)
    assert tuple(out.shape) == want
    assert out.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_heads_give_the_same_product():
    x, w_q, w_o = torch.randn(3, 6), torch.randn(8, 6), torch.randn(6, 8)
    per_head = torch.einsum("pm,hmd->phd", x, views.input_heads(w_q, CFG))
    torch.testing.assert_close(per_head.reshape(3, 8), x @ w_q.T)
    out = torch.einsum("phd,hdm->pm", per_head, views.output_heads(w_o, CFG))
    torch.testing.assert_close(out, x @ w_q.T @ w_o.T)


def test_too_few_positions():
    with pytest.raises(ConfigError, match="n_ctx=5 was asked, but this model learned 4"):
        views.first_positions(torch.zeros(4, 6), CFG)


def test_experts_in_one_tensor():
    down, both = torch.randn(3, 6, 4), torch.randn(3, 8, 6)
    parts = views.each_expert(down, CFG)
    assert len(parts) == 3 and all(torch.equal(part, down[e]) for e, part in enumerate(parts))
    gates_and_ups = views.gates_and_ups(both, CFG)
    assert len(gates_and_ups) == 6
    assert torch.equal(gates_and_ups[2], both[1, :4]) and torch.equal(gates_and_ups[3], both[1, 4:])
    assert all(p._base is not None for p in (*parts, *gates_and_ups))


def test_a_bias_without_a_place_must_be_zero():
    assert views.must_be_zero(torch.zeros(3), CFG) == ()
    with pytest.raises(WeightsError, match="no parameter for them"):
        views.must_be_zero(torch.tensor([0.0, 1e-9]), CFG)


def test_a_tensor_lands_where_the_parameter_lies():
    """The memory given is the parameter's, in the tensor's own shape; none where that cannot be."""
    stored = torch.randn(3, 4)
    parameter = torch.empty(3, 4).t()
    place = views.landing(parameter, (3, 4), views.transposed, CFG, torch.float32)
    assert place is not None
    place.copy_(stored)
    assert torch.equal(parameter, stored.t())
    for elsewhere, view, dtype in (
        (torch.empty(4, 3), views.transposed, torch.float32),
        (parameter, views.transposed, torch.float64),
        (torch.empty(3, 4), views.plus_one, torch.float32),
        (torch.empty(5, 6), views.first_positions, torch.float32),
    ):
        shape = (9, 6) if view is views.first_positions else (3, 4)
        assert views.landing(elsewhere, shape, view, CFG, dtype) is None
