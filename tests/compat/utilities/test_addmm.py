"""Bias plus product, against TransformerLens."""

import pytest
import torch

from fastlens.compat.utilities.addmm import batch_addmm, vanilla_addmm

COMPARED = [
    "transformer_lens.utilities.addmm.batch_addmm",
    "transformer_lens.utilities.addmm.vanilla_addmm",
]


@pytest.mark.tl
def test_as_transformer_lens(theirs):
    tl = theirs("addmm")
    bias, weight, x = torch.randn(7), torch.randn(5, 7), torch.randn(2, 3, 5)
    assert torch.equal(vanilla_addmm(bias, x[0], weight), tl.vanilla_addmm(bias, x[0], weight))
    assert torch.equal(batch_addmm(bias, weight, x), tl.batch_addmm(bias, weight, x))


def test_any_strides():
    """TransformerLens takes a view of x, which then fails."""
    bias, weight, x = torch.randn(7), torch.randn(5, 7), torch.randn(3, 2, 5).transpose(0, 1)
    assert torch.equal(batch_addmm(bias, weight, x), batch_addmm(bias, weight, x.contiguous()))
