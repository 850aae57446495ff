"""The public rotary op: a rotation keeps lengths, and scores depend on distance only."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlens.errors import FastlensError
from fastlens.ops import dispatch
from fastlens.ops.rotary import rotary
from tests.close import assert_close_to


def tables(adjacent_pairs, rotary_dim=4, batch=1, dtype=torch.float64):
    angles = torch.rand(batch, 5, rotary_dim // 2, dtype=torch.float64) * 6
    angles = angles.repeat_interleave(2, -1) if adjacent_pairs else torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def test_lengths_stay_and_scores_depend_on_the_distance():
    angles = torch.arange(12.0, dtype=torch.float64)[:, None] * torch.tensor(
        [1.0, 0.1], dtype=torch.float64
    )
    angles = torch.cat([angles, angles], 1)[None]
    q, k = torch.randn(2, 1, 1, 1, 4, dtype=torch.float64).expand(2, 1, 12, 1, 4)
    q, k = (rotary(x, angles.cos(), angles.sin())[0, :, 0] for x in (q, k))
    assert torch.allclose(q.norm(dim=-1), q[0].norm().expand(12))
    scores = q @ k.T
    assert torch.allclose(scores[5, 2], scores[9, 6])
    assert not torch.allclose(scores[5, 2], scores[5, 3])


@pytest.mark.parametrize("adjacent_pairs", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_gradient_of_the_op_is_the_turn_backwards(adjacent_pairs, batch):
    cos, sin = tables(adjacent_pairs, batch=batch)
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)

    def turn(x):
        return torch.ops.fastlens.rotary(x, cos, sin, adjacent_pairs)

    assert torch.autograd.gradcheck(turn, (x,))
    assert torch.autograd.gradgradcheck(turn, (x,), fast_mode=True)
    # Turned there and back, the channels that pass as well.
    (back,) = torch.autograd.grad(turn(x), x, turn(x).detach())
    assert_close_to(back, x, atol=1e-12)
    assert torch.equal(turn(x), rotary(x, cos, sin, adjacent_pairs))


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("adjacent_pairs", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(adjacent_pairs, needs_grad, dtype):
    x = torch.randn(2, 6, 5, 3).permute(0, 2, 3, 1).to(dtype).requires_grad_(needs_grad)
    cos, sin = tables(adjacent_pairs, dtype=torch.float32)
    torch.library.opcheck(torch.ops.fastlens.rotary.default, (x, cos, sin, adjacent_pairs))


def test_the_op_has_no_gradient_in_the_tables_and_says_so():
    x, (cos, sin) = torch.randn(1, 5, 2, 4, dtype=torch.float64), tables(False)
    with pytest.raises(FastlensError, match="detach the tables"):
        torch.ops.fastlens.rotary(x, cos.requires_grad_(), sin, False)
    # In plain PyTorch they have one.
    assert rotary(x, cos, sin).requires_grad


def test_an_opaque_kernel_is_reached_by_the_registered_op(monkeypatch):
    def forbidden(*args):
        raise AssertionError("called directly")

    key = "rotary", "cuda", torch.bfloat16
    monkeypatch.setitem(dispatch._CHOSEN, key, forbidden)
    monkeypatch.setattr(dispatch, "_OPAQUE", dispatch._OPAQUE | {key})
    with FakeTensorMode():
        x = torch.empty(2, 5, 3, 8, device="cuda", dtype=torch.bfloat16)
        cos = torch.empty(1, 5, 4, device="cuda")
        out = rotary(x, cos, cos)
    assert (out.device.type, out.shape, out.dtype) == ("cuda", x.shape, torch.float32)
