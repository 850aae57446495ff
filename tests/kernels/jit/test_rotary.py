"""Rotary embedding, interpreted, between guard pages. Not run on a GPU."""

import pytest
import torch

from fastlens.kernels import reference
from tests.close import assert_no_worse
from tests.gpu.guard_pages import guarded, guarded_outputs
from tests.gpu.judged import check_rotary
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.mutation import mutated
from tests.gpu.workers import Died, interpreted

pytestmark = NEEDS_TRITON

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def guarded_rotary(**kwargs):
    with guarded_outputs():
        check_rotary(place=guarded, **kwargs)


@pytest.mark.parametrize("adjacent_pairs", [True, False], ids=["adjacent", "halves"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rotary_dim", "d_head"), [(8, 8), (6, 20), (2, 64), (64, 80)])
def test_rotary(adjacent_pairs, dtype, rotary_dim, d_head):
    interpreted(
        guarded_rotary,
        adjacent_pairs=adjacent_pairs,
        dtype=dtype,
        rotary_dim=rotary_dim,
        d_head=d_head,
    )


@pytest.mark.parametrize("heads", [1, 40])
def test_heads_and_strides(heads):
    interpreted(guarded_rotary, heads=heads, d_head=80, rotary_dim=64, is_transposed=True)


def rotary_by_triton():
    """The registered op, for the CPU, with the Triton kernel in dispatch's place."""
    from fastlens.kernels.triton_rotary import rotary
    from fastlens.ops import dispatch
    from fastlens.ops import rotary as registered

    for dtype in DTYPES:
        dispatch._CHOSEN["rotary", "cpu", dtype] = rotary
    assert registered.kernel_for("rotary", "cpu", torch.float32) is rotary
    return torch.ops.fastlens.rotary


def check_gradients(adjacent_pairs, dtype):
    from fastlens.errors import FastlensError

    rotary = rotary_by_triton()
    angles = torch.rand(2, 5, 3) * 6
    angles = angles.repeat_interleave(2, -1) if adjacent_pairs else torch.cat([angles, angles], -1)
    x, weight = torch.randn(2, 2, 5, 3, 10).to(dtype).unbind(0)

    def gradient(turn, dtype):
        leaf = x.to(dtype).requires_grad_()
        out = turn(leaf, angles.cos().to(dtype), angles.sin().to(dtype), adjacent_pairs)
        return torch.autograd.grad((out * weight.to(dtype)).sum(), leaf)[0]

    assert_no_worse(
        gradient(rotary, dtype),
        gradient(reference.rotary, dtype),
        gradient(reference.rotary, torch.float64),
        factor=3,
        floor=torch.finfo(dtype).eps * 8,  # eager rounds cos and sin too
    )
    with pytest.raises(FastlensError, match="no gradient in cos and sin"):
        rotary(x, angles.cos().to(dtype).requires_grad_(), angles.sin().to(dtype), adjacent_pairs)
    arguments = x.requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype), adjacent_pairs
    torch.library.opcheck(rotary.default, arguments)


@pytest.mark.parametrize("adjacent_pairs", [True, False], ids=["adjacent", "halves"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(adjacent_pairs, dtype):
    interpreted(check_gradients, adjacent_pairs=adjacent_pairs, dtype=dtype)


def check_mistake(right, wrong):
    with mutated("rotary", right, wrong):
        guarded_rotary(d_head=13)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("cos_b[None, :] + a", "cos_b[None, :] - a"),
        ("pair, pair + half", "pair, pair + half - 1"),
        ("2 * half + tl.arange(0, BLOCK_PASSING)", "2 * half + 1 + tl.arange(0, BLOCK_PASSING)"),
    ],
    ids=["turned the wrong way", "off by one", "a passing channel left out"],
)
def test_a_mistake_is_caught(right, wrong):
    with pytest.raises(AssertionError, match="values differ"):
        interpreted(check_mistake, right=right, wrong=wrong)


def test_a_dropped_mask_hits_a_guard_page():
    with pytest.raises(Died):
        interpreted(
            check_mistake,
            right="passing = is_head & (channel[None, :] < d_head)",
            wrong="passing = is_head & (channel[None, :] >= 0)",
        )
