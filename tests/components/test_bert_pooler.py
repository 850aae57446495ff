"""One vector for a text, read off its first token."""

import torch

from tests.close import assert_close_to
from tests.encoders import ours


def test_only_the_first_token_counts():
    pooler = ours().pooler
    x = torch.randn(2, 3, 32)
    assert_close_to(pooler(x), torch.tanh(x[:, 0] @ pooler.W + pooler.b))
    assert torch.equal(pooler(x), pooler(x[:, :1]))
