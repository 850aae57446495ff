"""Embeddings: rows, padding, and the unembedding's layout."""

import pytest
import torch

from fastlens.components.embed import Embed, PosEmbed, Unembed
from fastlens.config import HookedTransformerConfig
from tests.close import assert_close_to
from tests.configs import tiny


def build(cls, name="gpt2", **changes):
    part = cls(HookedTransformerConfig(**tiny(name, **changes)))
    for leaf in part.parameters():
        leaf.data.copy_(torch.randn(leaf.shape))
    return part


TOKENS = torch.tensor([[3, 1, 4], [1, 5, 9]])


def test_embed_is_rows_of_w_e():
    embed = build(Embed)
    assert torch.equal(embed(TOKENS), embed.W_E[TOKENS])
    with_norm = build(Embed, "post_embedding_ln")
    assert_close_to(with_norm(TOKENS), with_norm.ln(with_norm.W_E[TOKENS]))


def test_positions_without_and_with_padding():
    pos = build(PosEmbed)
    assert torch.equal(pos(TOKENS)[1], pos.W_pos[:3])
    assert torch.equal(pos(TOKENS, 4)[0], pos.W_pos[4:7])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    out = pos(TOKENS, 0, mask)
    assert torch.equal(out[0], torch.stack([torch.zeros(32), pos.W_pos[0], pos.W_pos[1]]))
    assert torch.equal(out[1], pos.W_pos[:3])
    longer = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert torch.equal(pos(TOKENS, 2, longer)[0], pos.W_pos[:3])


def test_positions_that_do_not_exist_are_refused():
    with pytest.raises(IndexError, match="64"):
        build(PosEmbed)(TOKENS, 62)


def test_unembed():
    unembed, x = build(Unembed, d_vocab_out=7), torch.randn(2, 3, 32)
    assert unembed.W_U.shape == (32, 7) and unembed.W_U.t().is_contiguous()
    assert_close_to(unembed(x), x @ unembed.W_U + unembed.b_U)
