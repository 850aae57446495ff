"""The layer before BERT's unembedding, with the activation of the config."""

import pytest
import torch
import torch.nn.functional as F

from tests.close import assert_close_to
from tests.encoders import ours


@pytest.mark.parametrize("act_fn", ["gelu", "relu", "gelu_new"])
def test_formula(act_fn):
    head = ours(act_fn=act_fn).mlm_head
    x = torch.randn(2, 3, 32)
    act = {"gelu": F.gelu, "relu": F.relu}.get(act_fn, lambda x: F.gelu(x, approximate="tanh"))
    want = F.layer_norm(act(x @ head.W + head.b), (32,), head.ln.w, head.ln.b, head.cfg.eps)
    assert_close_to(head(x), want)
