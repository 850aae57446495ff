"""The public rotary op: a rotation keeps lengths, and scores depend on distance only."""

import torch

from fastlens.ops.rotary import rotary


def test_lengths_stay_and_scores_depend_on_the_distance():
    angles = torch.arange(12.0, dtype=torch.float64)[:, None] * torch.tensor(
        [1.0, 0.1], dtype=torch.float64
    )
    angles = torch.cat([angles, angles], 1)[None]
    q, k = torch.randn(2, 1, 1, 1, 4, dtype=torch.float64).expand(2, 1, 12, 1, 4)
    q, k = (rotary(x, angles.cos(), angles.sin())[0, :, 0] for x in (q, k))
    assert torch.allclose(q.norm(dim=-1), q[0].norm().expand(12))
    scores = q @ k.T
    assert torch.allclose(scores[5, 2], scores[9, 6])
    assert not torch.allclose(scores[5, 2], scores[5, 3])
