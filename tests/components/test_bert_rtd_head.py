"""ELECTRA's discriminator head."""

import torch

from fastlens.components.bert_rtd_head import BertRTDHead
from tests.close import assert_close_to
from tests.encoders import ours


def test_one_logit_a_token():
    torch.manual_seed(0)
    head = BertRTDHead(ours().cfg)
    for leaf in head.parameters():
        torch.nn.init.normal_(leaf)
    x = torch.randn(2, 3, 32)
    seen = []
    head.hook_rtd_out.add_hook(lambda logits, hook: seen.append(logits))
    inner = torch.nn.functional.gelu(x.double() @ head.W.double() + head.b.double())
    want = (inner @ head.W_out.double() + head.b_out.double())[..., 0]
    assert_close_to(head(x), want, atol=1e-4)
    assert seen[0].shape == (2, 3)
