"""The specification against cases worked out by hand."""

import math

import torch

from fastlens.kernels import reference


def test_layer_norm_of_a_known_row():
    x = torch.tensor([[1.0, 3.0]])
    out = reference.layer_norm(x, torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0]), eps=0.0)
    assert torch.allclose(out, torch.tensor([[-1.0, 2.0]]))


def test_rms_norm_of_a_known_row():
    out = reference.rms_norm(torch.tensor([[3.0, 4.0]]), None, eps=0.0)
    assert torch.allclose(out, torch.tensor([[3.0, 4.0]]) / math.sqrt(12.5))


def test_rotary_by_a_quarter_turn():
    x = torch.tensor([1.0, 0.0, 0.0, 0.0, 9.0]).view(1, 1, 1, 5)
    cos, sin = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    halves = reference.rotary(x, cos, sin, adjacent_pairs=False).flatten()
    pairs = reference.rotary(x, cos, sin, adjacent_pairs=True).flatten()
    assert halves.tolist() == [0.0, 0.0, 1.0, 0.0, 9.0]
    assert pairs.tolist() == [0.0, 1.0, 0.0, 0.0, 9.0]
