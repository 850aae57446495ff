"""Norms behind the sums, and the two forms of the padding mask."""

import pytest
import torch

from fastlens.components.bert_block import BertBlock
from fastlens.errors import ConfigError
from tests.close import assert_close_to
from tests.encoders import ours


def test_norms_stand_behind_the_sums():
    block = ours().blocks[0]
    x = torch.randn(2, 5, 32)
    mid = block.ln1(x + block.attn(x, x, x))
    assert_close_to(block(x), block.ln2(mid + block.mlp(mid)))


def test_both_masks_say_the_same():
    block = ours().blocks[0]
    x = torch.randn(2, 5, 32)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    additive = torch.zeros(2, 1, 1, 5).masked_fill(mask[:, None, None] == 0, -torch.inf)
    assert_close_to(block(x, additive), block(x, attention_mask=mask))
    assert not torch.allclose(block(x), block(x, additive))


def test_what_cannot_be_computed_is_refused():
    cfg = ours().cfg
    cfg.load_in_4bit = True
    with pytest.raises(ConfigError, match="4-bit"):
        BertBlock(cfg)
