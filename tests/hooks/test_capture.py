"""What a cache keeps of an activation: the slice that was asked for and no more memory."""

import pytest
import torch

from fastlens.errors import ShapeError
from fastlens.hooks.capture import CaptureSpec, capture
from fastlens.hooks.point import HookPoint
from fastlens.slices import Slice


def spec(pos_slice=None, **kwargs):
    return CaptureSpec(Slice.unwrap(pos_slice), **kwargs)


def test_unsliced_capture_shares_memory_and_detaches():
    x = torch.randn(2, 5, 3, requires_grad=True) * 1
    kept = capture(x, HookPoint("batch pos d_model"), spec())
    assert kept.data_ptr() == x.data_ptr() and not kept.requires_grad


@pytest.mark.parametrize(
    ("axes", "shape", "kept_shape"),
    [
        ("batch pos d_model", (2, 6, 3), (2, 2, 3)),
        ("batch pos head d_head", (2, 6, 4, 3), (2, 2, 4, 3)),
        ("batch head query_pos key_pos", (2, 4, 6, 6), (2, 4, 2, 6)),
        ("batch pos ... one", (2, 6, 4, 1), (2, 2, 4, 1)),
        ("row d_head", (48, 3), (48, 3)),
    ],
)
def test_positions_are_sliced_on_the_named_axis(axes, shape, kept_shape):
    x = torch.randn(shape)
    kept = capture(x, HookPoint(axes), spec((1, 3)))
    assert kept.shape == kept_shape


def test_a_slice_keeps_no_larger_tensor_alive():
    x = torch.randn(1, 100, 8)
    kept = capture(x, HookPoint("batch pos d_model"), spec((0, 1)))
    assert kept.untyped_storage().nbytes() == 8 * 4


def test_remove_batch_dim_needs_a_batch_of_one():
    point = HookPoint("batch pos d_model")
    point.name = "hook_embed"
    assert capture(torch.randn(1, 4, 3), point, spec(remove_batch_dim=True)).shape == (4, 3)
    with pytest.raises(ShapeError, match="batch of one"):
        capture(torch.randn(2, 4, 3), point, spec(remove_batch_dim=True))
    # An activation without a batch axis is left alone, not beheaded.
    rows = capture(torch.randn(12, 3), HookPoint("row d_head"), spec(remove_batch_dim=True))
    assert rows.shape == (12, 3)
