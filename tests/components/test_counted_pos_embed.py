"""Positions that leave out padding."""

import pytest
import torch

from fastlens.components.counted_pos_embed import CountedPosEmbed
from fastlens.config import EncoderConfig, HookedTransformerConfig
from fastlens.errors import ConfigError


def embed(padding_id: int | None = 1) -> CountedPosEmbed:
    encoder = EncoderConfig(padding_id=padding_id)
    cfg = HookedTransformerConfig(
        d_model=4, d_head=2, n_layers=1, n_ctx=5, d_vocab=9, act_fn="gelu", encoder=encoder
    )
    module = CountedPosEmbed(cfg)
    # Row n holds n.
    torch.nn.init.zeros_(module.W_pos)
    module.W_pos.data += torch.arange(len(module.W_pos))[:, None]
    return module


def test_padding_gets_its_row_and_moves_nobody():
    tokens = torch.tensor([[7, 8, 3, 1, 1], [1, 1, 7, 8, 3], [7, 1, 8, 1, 3], [1, 1, 1, 1, 1]])
    found = embed()(tokens)[..., 0].tolist()
    assert found == [[2, 3, 4, 1, 1], [1, 1, 2, 3, 4], [2, 1, 3, 1, 4], [1, 1, 1, 1, 1]]
    assert embed(0)(torch.tensor([[0, 5, 1]]))[0, :, 0].tolist() == [0, 1, 2]


def test_too_many_tokens():
    module = embed()
    assert module.W_pos.shape == (7, 4)
    module(torch.tensor([[1, 1, 7, 7, 7, 7, 7]]))
    with pytest.raises(IndexError, match="a text of 6 tokens was given, but there are 5"):
        module(torch.full((1, 6), 7))


def test_what_padding_is_must_be_said():
    with pytest.raises(ConfigError, match="padding_id"):
        embed(None)
