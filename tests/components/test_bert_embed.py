"""The sum of token, position and type, and its norm."""

import pytest
import torch

from tests.close import assert_close_to
from tests.encoders import D_VOCAB, N_CTX, ours


def test_sum_and_norm():
    embed = ours().embed
    tokens = torch.randint(0, D_VOCAB, (2, 5))
    types = torch.tensor([[0, 0, 1, 1, 1]]).repeat(2, 1)
    total = embed.embed.W_E[tokens] + embed.pos_embed.W_pos[:5]
    total = (total + embed.token_type_embed.W_token_type[types]).double()
    normalized = (total - total.mean(-1, keepdim=True)) / total.std(-1, unbiased=False)[..., None]
    assert_close_to(embed(tokens, types), normalized * embed.ln.w + embed.ln.b)
    assert torch.equal(embed(tokens), embed(tokens, torch.zeros_like(tokens)))
    assert not torch.equal(embed(tokens), embed(tokens, types))


def test_a_hook_that_writes_in_place_does_not_write_to_the_weights():
    embed = ours().embed
    before = embed.pos_embed.W_pos.clone()
    embed.hook_pos_embed.add_hook(lambda positions, hook: positions.zero_())
    with torch.no_grad():
        embed(torch.zeros(1, 4, dtype=torch.long))
    assert torch.equal(embed.pos_embed.W_pos, before)


def test_too_many_positions():
    with pytest.raises(IndexError, match=f"W_pos has {N_CTX} positions"):
        ours().embed(torch.zeros(1, N_CTX + 1, dtype=torch.long))
