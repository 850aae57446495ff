"""Attention's linear maps, against TransformerLens."""

import pytest
import torch

from fastlens.compat.utilities import attention as ours
from tests.close import assert_close_to

COMPARED = [
    "transformer_lens.utilities.attention.clamp_qkv",
    "transformer_lens.utilities.attention.complex_attn_linear",
    "transformer_lens.utilities.attention.simple_attn_linear",
]


@pytest.mark.tl
def test_as_transformer_lens(theirs):
    tl = theirs("attention")
    x, split = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 4, 8).double()
    w, b = torch.randn(4, 8, 5).double(), torch.randn(4, 5).double()
    found = ours.simple_attn_linear(input=x, w=w, b=b)
    assert_close_to(found, tl.simple_attn_linear(input=x, w=w, b=b), atol=1e-12)
    found = ours.complex_attn_linear(input=split, w=w, b=b)
    assert_close_to(found, tl.complex_attn_linear(input=split, w=w, b=b), atol=1e-12)
    qkv = x, 2 * x, -x
    before = [part.clone() for part in qkv]
    for found, wanted, given, was in zip(
        ours.clamp_qkv(*qkv, clip=0.5), tl.clamp_qkv(*qkv, clip=0.5), qkv, before, strict=True
    ):
        assert torch.equal(found, wanted) and torch.equal(given, was)
