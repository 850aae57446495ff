"""Initial weights: the right variance, drawn in order, whatever the memory layout."""

import math

import pytest
import torch

from fastlens.errors import ShapeError, WeightsError
from fastlens.weights import initialize

SHAPES = {"embed.W_E": (50, 40), "blocks.0.attn.W_Q": (4, 40, 30), "blocks.0.mlp.W_in": (40, 160)}


def parameters(strided: bool = False) -> dict[str, torch.Tensor]:
    named = {name: torch.full(shape, 7.0) for name, shape in SHAPES.items()}
    if strided:
        named = {name: w.mT.contiguous().mT for name, w in named.items()}
    return {**named, "blocks.0.attn.b_Q": torch.zeros(4, 30), "blocks.0.ln1.w": torch.ones(40)}


SCHEMES = {
    "gpt2": lambda named: initialize.gpt2(named, 0.3),
    "xavier_uniform": lambda named: initialize.xavier(named, 2.0, is_uniform=True),
    "xavier_normal": lambda named: initialize.xavier(named, 2.0, is_uniform=False),
    "kaiming_uniform": lambda named: initialize.kaiming(named, 2.0, is_uniform=True),
    "kaiming_normal": lambda named: initialize.kaiming(named, 2.0, is_uniform=False),
    "muP": lambda named: initialize.mu_p(named, is_uniform=False),
    "muP_uniform": lambda named: initialize.mu_p(named, is_uniform=True),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_variance(scheme):
    torch.manual_seed(0)
    named = parameters()
    SCHEMES[scheme](named.items())
    for name, shape in SHAPES.items():
        fan_in, fan_out = initialize.calc_fan_in_and_fan_out(named[name])
        want = {
            "gpt2": 0.3,
            "xavier": 2 * math.sqrt(2 / (fan_in + fan_out)),
            "kaiming": 2 * math.sqrt(2 / fan_in),
            "muP": 1.0 if "embed" in name else fan_in**-0.5,
        }[scheme.split("_")[0]]
        assert named[name].std().item() == pytest.approx(want, rel=0.05)
        if "uniform" in scheme:
            assert named[name].abs().max().item() <= want * math.sqrt(3) + 1e-6
        assert named[name].shape == shape
    assert not named["blocks.0.attn.b_Q"].any() and (named["blocks.0.ln1.w"] == 1).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strides_do_not_change_the_numbers(scheme):
    drawn = []
    for strided in (False, True):
        torch.manual_seed(0)
        named = parameters(strided)
        strides = {name: w.stride() for name, w in named.items()}
        SCHEMES[scheme](named.items())
        assert {name: w.stride() for name, w in named.items()} == strides
        drawn.append(named)
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in SHAPES)


def test_fans():
    assert initialize.calc_fan_in_and_fan_out(torch.empty(5)) == (1, 5)
    assert initialize.calc_fan_in_and_fan_out(torch.empty(5, 7)) == (5, 7)
    assert initialize.calc_fan_in_and_fan_out(torch.empty(4, 40, 30)) == (40, 120)
    for shape in ((), (2, 3, 4, 5)):
        with pytest.raises(ShapeError, match="a bias, a matrix or one matrix a head"):
            initialize.calc_fan_in_and_fan_out(torch.empty(shape))


def test_one_weight_is_filled_in_place_whatever_its_strides():
    for fill in (
        initialize.init_xavier_uniform_,
        initialize.init_xavier_normal_,
        initialize.init_kaiming_uniform_,
        initialize.init_kaiming_normal_,
    ):
        drawn = []
        for strided in (False, True):
            torch.manual_seed(0)
            weight = torch.nn.Parameter(parameters(strided)["blocks.0.attn.W_Q"])
            assert fill(weight) is weight and weight.requires_grad
            drawn.append(weight)
        assert torch.equal(*drawn)


def test_kaiming_by_fan_and_nonlinearity():
    weight = torch.empty(200, 500)
    for mode, fan in (("fan_in", 200), ("fan_out", 500)):
        initialize.init_kaiming_normal_(weight, nonlinearity="linear", mode=mode)
        assert weight.std().item() == pytest.approx(fan**-0.5, rel=0.02)
    initialize.init_kaiming_normal_(weight, a=1.0, nonlinearity="leaky_relu")
    assert weight.std().item() == pytest.approx(200**-0.5, rel=0.02)
    with pytest.raises(WeightsError, match="'fan_in' or 'fan_out'"):
        initialize.init_kaiming_uniform_(weight, mode="fan_avg")
