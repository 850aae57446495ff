import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlens.decompose import FrozenNorm, dot, head_results, neuron_results, remainder
from fastlens.errors import ShapeError
from tests.close import assert_close_to, assert_no_worse

places = st.sampled_from([(), (3,), (2, 3), (1, 4), (2, 1)])
D = 6


def randn(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation inside the block allocated."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.numel = max(self.numel, out.numel())
        return out


@settings(deadline=None)
@given(places)
def test_head_results(batch_pos):
    z, W_O = randn(*batch_pos, 4, 5), randn(4, 5, D)
    rows = head_results(z, W_O)
    assert rows.shape == (4, *batch_pos, D)
    assert_close_to(rows, torch.einsum("...hd,hdm->h...m", z, W_O), atol=1e-12)


def test_head_results_take_strided_weights_and_activations():
    W_O = torch.nn.Parameter(randn(5, 4, D).transpose(0, 1))
    z = randn(4, 2, 3, 5).permute(1, 2, 0, 3)
    truth = torch.einsum("bphd,hdm->hbpm", z, W_O)
    assert_close_to(head_results(z, W_O), truth, atol=1e-12)


def test_head_results_build_nothing_larger_than_the_result():
    z, W_O = randn(2, 8, 4, 5), randn(4, 5, D)
    with LargestTensor() as seen:
        head_results(z, W_O)
    assert seen.numel == 4 * 2 * 8 * D


@settings(deadline=None)
@given(places)
def test_neuron_results(batch_pos):
    post, W_out = randn(*batch_pos, 7), randn(7, D)
    rows = neuron_results(post, W_out)
    assert rows.shape == (7, *batch_pos, D)
    assert_close_to(rows.sum(0), post @ W_out, atol=1e-12)
    assert_close_to(rows[3], post[..., 3, None] * W_out[3], atol=0)


def test_remainder_is_what_is_left():
    total, stacks = randn(2, 3, D), [randn(4, 2, 3, D), randn(1, 2, 3, D)]
    left = remainder(total, stacks)
    assert_close_to(left + sum(stack.sum(0) for stack in stacks), total, atol=1e-12)
    assert remainder(total, []) is total


@settings(deadline=None)
@given(places, st.integers(0, 2), st.booleans())
def test_dot_broadcasts_from_the_right(batch_pos, kept: int, ones: bool):
    stack = randn(4, *batch_pos, D)
    theirs = batch_pos[max(0, len(batch_pos) - kept) :]
    directions = randn(*(1 if ones and i == 0 else n for i, n in enumerate(theirs)), D)
    assert_close_to(dot(stack, directions), (stack * directions).sum(-1), atol=1e-12)


def test_dot_does_not_copy_the_stack():
    stack, directions = randn(9, 2, 30, D), randn(2, 30, D)
    for direction in (directions, directions[:1], directions[0], directions[0, 0]):
        with LargestTensor() as seen:
            dot(stack, direction)
        assert seen.numel <= max(9 * 2 * 30, directions.numel())


@pytest.mark.parametrize("theirs", [(2,), (3, 2), (1, 2, 3), (4, 1, 1)])
def test_dot_refuses_directions_that_do_not_fit(theirs):
    with pytest.raises(ShapeError, match=r"\[batch, 1\]"):
        dot(randn(4, 2, 3, D), randn(*theirs, D))


def norms(batch_pos: tuple[int, ...]) -> list[FrozenNorm]:
    scale = randn(*batch_pos, 1).abs() + 0.5
    return [
        FrozenNorm(),
        FrozenNorm(scale),
        FrozenNorm(scale, centred=True),
        FrozenNorm(scale, centred=True, gain=randn(D), bias=randn(D)),
        FrozenNorm(scale, gain=randn(D)),
    ]


@settings(deadline=None)
@given(places, st.integers(0, 4))
def test_a_frozen_norm_is_linear_and_can_move_into_directions(batch_pos, which: int):
    norm = norms(batch_pos)[which]
    stack, direction = randn(4, *batch_pos, D), randn(D)
    through = norm.apply(stack)
    assert_close_to(through.sum(0), norm.apply(stack.sum(0)), atol=1e-12)
    assert_close_to(norm.dot(stack, direction), through @ direction, atol=1e-12)
    read = norm.pull_back(direction)
    assert_close_to(norm.divide((stack @ read)[..., None])[..., 0], through @ direction, atol=1e-12)
    several = randn(*batch_pos, D)
    assert_close_to(norm.dot(stack, several), (through * several).sum(-1), atol=1e-12)


@pytest.mark.parametrize("centred", [True, False])
def test_a_frozen_norm_is_the_norm_at_the_scale_it_froze(centred: bool):
    x, gain, bias = randn(2, 3, D), randn(D), randn(D)
    inner = x - x.mean(-1, keepdim=True) if centred else x
    scale = (inner.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if centred:
        truth = torch.nn.functional.layer_norm(x, (D,), gain, bias, 1e-5)
    else:
        truth = torch.nn.functional.rms_norm(x, (D,), gain, 1e-5) + bias
    assert_close_to(FrozenNorm(scale, centred, gain, bias).apply(x) + bias, truth, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attribution_is_no_worse_than_the_plain_formula(dtype):
    # A common offset in the stack is what centring must take away without losing digits.
    stack, direction = randn(20, 2, 3, 64) + 10, randn(64)
    scale = randn(2, 3, 1).abs() + 1
    low_stack, low_direction = stack.to(dtype), direction.to(dtype)
    norm = FrozenNorm(scale.float(), centred=True)
    eager = ((low_stack - low_stack.mean(-1, keepdim=True)) / norm.scale * low_direction).sum(-1)
    exact = FrozenNorm(norm.scale.double(), centred=True)
    truth = exact.apply(low_stack.double()) @ low_direction.double()
    ours = norm.dot(low_stack, low_direction)
    assert ours.dtype == eager.dtype == torch.float32
    assert_no_worse(ours, eager, truth)
    assert_close_to(ours, truth, atol=1e-4)  # 16-bit rows are centred in float32 too
    assert FrozenNorm().dot(low_stack, low_direction).dtype == dtype


def test_attribution_builds_no_second_stack(monkeypatch):
    monkeypatch.setattr("fastlens.decompose._ELEMENTS_AT_ONCE", 1000)
    stack, norm = randn(50, 2, 30, D), FrozenNorm(randn(2, 30, 1).abs() + 1, centred=True)
    with LargestTensor() as seen:
        ours = norm.dot(stack, randn(D).fill_(0.5))
    assert seen.numel <= max(1000, ours.numel())


def test_an_empty_stack_has_empty_attributions():
    norm = FrozenNorm(randn(2, 3, 1).abs() + 1, centred=True)
    assert norm.dot(randn(0, 2, 3, D), randn(D)).shape == (0, 2, 3)


def test_gradients_reach_stack_and_directions():
    stack = randn(3, 2, 2, D).requires_grad_()
    direction = randn(D).requires_grad_()
    norm = FrozenNorm(randn(2, 2, 1).abs() + 1, centred=True)
    assert torch.autograd.gradcheck(norm.dot, (stack, direction))
