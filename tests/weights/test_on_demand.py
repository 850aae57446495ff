"""Parameters that come when they are read."""

import copy

import pytest
import torch
import torch.nn as nn

from fastlens.components.attention import GroupedQueryAttention
from fastlens.errors import StreamError
from fastlens.weights.on_demand import Layout, OnDemand, StreamedParameter, parameters_on_meta

GROUPED = {
    "n_layers": 1, "d_model": 16, "n_ctx": 8, "d_head": 4, "n_heads": 4, "d_vocab": 5,
    "n_key_value_heads": 2, "act_fn": "silu", "d_mlp": 8, "device": "cpu",
}  # fmt: skip


class Counted:
    """A group that counts what is asked of it."""

    name = "blocks.0"

    def __init__(self):
        self.brought = 0
        self.kept: list[str] = []

    def bring(self):
        self.brought += 1

    def keep(self, why):
        self.kept.append(why)


@pytest.fixture
def linear():
    module, group = nn.Linear(2, 3), Counted()
    module.__dict__["_parameters"] = OnDemand(module._parameters, group)
    return module, group


def test_reading_brings_and_iterating_does_not(linear):
    module, group = linear
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    assert sum(p.numel() for p in module.parameters()) == 9
    assert group.brought == 0
    module(torch.ones(1, 2))
    assert group.brought == 2
    assert module._parameters.get("nothing") is None
    assert module._parameters.get("bias") is not None
    assert group.brought == 3


def test_an_absent_bias_brings_nothing():
    module, group = nn.Linear(2, 3, bias=False), Counted()
    module.__dict__["_parameters"] = OnDemand(module._parameters, group)
    assert module.bias is None
    assert group.brought == 0


def test_replacing_and_removing_keep(linear):
    module, group = linear
    module.weight = nn.Parameter(torch.zeros(3, 2))
    assert group.kept == ["weight was replaced"]
    del module.bias
    assert group.kept[-1] == "bias was removed"
    assert "bias" not in module._parameters


def test_data_keeps():
    group = Counted()
    parameter = StreamedParameter(torch.ones(2), requires_grad=False)
    assert parameter.data.tolist() == [1, 1]
    parameter.fastlens_group = group
    parameter.data.mul_(3)
    parameter.data = parameter.detach() + 1
    assert parameter.tolist() == [4, 4]
    assert group.kept == ["its .data was asked for", "its .data was set"]


def test_copies_are_refused(linear):
    with pytest.raises(StreamError, match="cannot be copied or pickled"):
        copy.deepcopy(linear[0])


def test_modules_on_meta_keep_their_layout():
    real = GroupedQueryAttention(GROUPED)
    with parameters_on_meta():
        away = GroupedQueryAttention(GROUPED)
    assert nn.Module.register_parameter.__name__ == "register_parameter"
    assert all(p.is_meta and not p.requires_grad for p in away.parameters())
    assert not any(b.is_meta for b in away.buffers())
    for name, parameter in real.named_parameters():
        other = away.get_parameter(name)
        assert other.shape == parameter.shape
        assert other.stride() == parameter.stride()
        assert other.storage_offset() == parameter.storage_offset()
    layouts = [Layout(dict(module.named_parameters())) for module in (real, away)]
    assert layouts[0].places == layouts[1].places
    assert layouts[0].nbytes == layouts[1].nbytes == sum(p.nbytes for p in real.parameters())
    # Queries, keys and values are one block, and so are their biases.
    assert len(layouts[1].sizes) == 4
    blocks = {n: torch.arange(size, dtype=dtype) for n, (size, dtype) in layouts[1].kinds().items()}
    placed = layouts[1].place(blocks)
    assert placed["W_Q"].untyped_storage().data_ptr() == placed["_W_K"].untyped_storage().data_ptr()
    assert layouts[1].largest == max(block.nbytes for block in blocks.values())
