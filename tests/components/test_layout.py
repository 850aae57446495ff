"""The memory layout: TransformerLens' shapes over [out, in] storage, whatever happens to a leaf."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn

from fastlens.components import layout


def test_head_views_show_the_right_entries():
    storage = torch.arange(24.0).view(6, 4)  # [head * d_head, d_model], 2 heads of 3
    w = layout.input_heads(storage, 2)
    assert w.shape == (2, 4, 3) and w[1, 2, 0] == storage[3, 2]
    assert layout.from_input_heads(w).data_ptr() == storage.data_ptr()
    storage = torch.arange(24.0).view(4, 6)  # [d_model, head * d_head]
    w = layout.output_heads(storage, 2)
    assert w.shape == (2, 3, 4) and w[1, 2, 3] == storage[3, 5]
    assert layout.from_output_heads(w).data_ptr() == storage.data_ptr()


def test_a_leaf_of_other_strides_is_copied_but_right():
    w = torch.randn(2, 4, 3)
    assert torch.equal(layout.from_input_heads(w), w.permute(0, 2, 1).reshape(6, 4))
    w = torch.randn(2, 3, 4)
    assert torch.equal(layout.from_output_heads(w), w.reshape(6, 4).T)


def test_neighbours_are_one_view_only_without_gradients():
    parts = layout.side_by_side([2, 3, 1], 4, torch.float32)
    for n, part in enumerate(parts):
        part.fill_(n)
    with torch.no_grad():
        joint = layout.neighbours(parts)
        assert joint.shape == (6, 4) and joint[:, 0].tolist() == [0, 0, 1, 1, 1, 2]
        assert joint.data_ptr() == parts[0].data_ptr()
        assert layout.neighbours([parts[0], parts[2]]) is None
        assert layout.neighbours([parts[1], parts[0]]) is None
        assert layout.neighbours([parts[0], parts[1].clone()]) is None
        assert layout.neighbours([parts[0], parts[1].double()]) is None
    with torch.enable_grad():
        assert layout.neighbours(parts) is None


def two_leaves():
    first, second = layout.side_by_side([4, 2], 3, torch.float32)
    module = nn.Module()
    module.first = nn.Parameter(layout.input_heads(first.normal_(), 2))
    module.second = nn.Parameter(layout.input_heads(second.normal_(), 1))
    return module


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(module):
    fresh = two_leaves()
    fresh.load_state_dict({k: v.contiguous() for k, v in module.state_dict().items()})
    return fresh


def through_optimizer(module):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.0)
    sum(p.square().sum() for p in module.parameters()).backward()
    optimizer.step()
    return module


@pytest.mark.parametrize(
    "journey",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.double().float(),
        through_torch_save,
        through_state_dict,
        through_optimizer,
    ],
)
def test_strides_and_values_survive(journey):
    module = two_leaves()
    strides = [p.stride() for p in module.parameters()]
    values = [p.detach().clone() for p in module.parameters()]
    after = journey(module)
    assert [p.stride() for p in after.parameters()] == strides
    for p, value in zip(after.parameters(), values, strict=True):
        assert torch.equal(p.detach(), value)


def test_gradients_arrive_in_the_same_layout():
    module = two_leaves()
    layout.from_input_heads(module.first).sum().backward()
    assert module.first.grad.shape == module.first.shape
    assert module.first.grad.stride() == module.first.stride()


def test_rejoin_brings_scattered_leaves_together():
    module = copy.deepcopy(two_leaves())
    parts = [layout.from_input_heads(p) for p in module.parameters()]
    with torch.no_grad():
        assert layout.neighbours(parts) is None
        before = [p.detach().clone() for p in module.parameters()]
        layout.rejoin(list(module.parameters()), [(4, 3), (2, 3)])
        assert (
            layout.neighbours([layout.from_input_heads(p) for p in module.parameters()]) is not None
        )
    for p, value in zip(module.parameters(), before, strict=True):
        assert torch.equal(p.detach(), value) and p.requires_grad


def test_linear_takes_a_foreign_dtype_to_the_weights():
    x = torch.randn(2, 3, dtype=torch.float64)
    assert layout.linear(x, torch.randn(4, 3)).dtype == torch.float32
