"""Two logits of a pooled text."""

import torch

from tests.close import assert_close_to
from tests.encoders import ours


def test_formula():
    head = ours().nsp_head
    x = torch.randn(4, 32)
    assert_close_to(head(x), x @ head.W + head.b)
    assert head(x).shape == (4, 2)
