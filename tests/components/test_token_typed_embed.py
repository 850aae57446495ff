"""Which of two texts a token belongs to."""

import torch

from fastlens.components.token_typed_embed import TokenTypeEmbed
from tests.encoders import ours


def test_rows_by_type():
    embed = TokenTypeEmbed(ours().cfg)
    torch.nn.init.normal_(embed.W_token_type)
    found = embed(torch.tensor([[0, 1, 1]]))
    assert torch.equal(found[0], embed.W_token_type[[0, 1, 1]])
