"""TransformerLens' projection kernel: its values, and subspaces one can see through."""

import math
from types import SimpleNamespace

import pytest
import torch

from fastlens.compat.tools_analysis import projection_kernel as ours_module
from fastlens.compat.tools_analysis.projection_kernel import (
    AttentionHeadRef,
    attention_head_subspace_affinity,
    orthonormal_subspace,
    projection_kernel,
    random_projection_kernel_moments,
)
from tests.close import assert_close_to
from tests.models import ours, theirs

_PATH = "transformer_lens.tools.analysis.projection_kernel."
# What tests here compare with TransformerLens 3.9, on equal weights.
COMPARED = [
    _PATH + name
    for name in (
        "AttentionHeadRef",
        "AttentionHeadRef.label",
        "HeadAffinityPair",
        "HeadAffinityResult",
        "HeadAffinityResult.top_pairs",
        "ProjectionKernelResult",
        "RandomSubspaceReference",
        "SubspaceBasis",
        "SubspaceBasis.ambient_dim",
        "attention_head_subspace_affinity",
        "orthonormal_subspace",
        "projection_kernel",
        "random_projection_kernel_moments",
    )
]


@pytest.fixture
def tl():
    # The package has a function of the module's name.
    return pytest.importorskip("transformer_lens.tools.analysis.projection_kernel")


def matrix(rows, columns, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.tl
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_those_of_transformer_lens(tl, dtype):
    a, b = matrix(20, 5, 0, dtype), matrix(20, 7, 1, dtype)
    a[:, 4] = a[:, 3]  # of rank four
    bases = []
    for library in (tl, ours_module):
        first, second = library.orthonormal_subspace(a), library.orthonormal_subspace(b, rank=3)
        bases.append((first, second))
    for its, mine in zip(*bases, strict=True):
        for name in ("rank", "measured_rank", "rtol", "input_shape", "ambient_dim"):
            assert getattr(mine, name) == getattr(its, name), name
        assert mine.threshold == pytest.approx(its.threshold)
        assert_close_to(mine.singular_values, its.singular_values, atol=1e-6)
        assert_close_to(mine.basis @ mine.basis.T, its.basis @ its.basis.T, atol=1e-5)
    want, got = tl.projection_kernel(*bases[0]), projection_kernel(*bases[1])
    for name in ("score", "normalized", "cosines"):
        assert_close_to(getattr(got, name), getattr(want, name), atol=1e-5, name=name)
    assert_close_to(got.angles.cos(), want.angles.cos(), atol=1e-5)
    assert (got.rank_a, got.rank_b, got.ambient_dim) == (4, 3, 20)
    moments = tl.random_projection_kernel_moments(20, 4), random_projection_kernel_moments(20, 4)
    assert vars(moments[0]) == vars(moments[1])


@pytest.mark.tl
@pytest.mark.parametrize("role", ["Q", "K", "V"])
@pytest.mark.parametrize("order", ["forward", "all"])
def test_affinities_are_those_of_transformer_lens(tl, role, order):
    """Which takes its bridge only: one is held up in front of its model."""
    a, b = theirs("gpt2"), ours("gpt2")
    b.load_state_dict(a.state_dict())
    bridge = SimpleNamespace(cfg=a.cfg, blocks_with=lambda part: list(enumerate(a.blocks)))
    for rank in (None, 3):
        options = {"target_role": role, "layer_order": order, "rank": rank}
        want = tl.attention_head_subspace_affinity(bridge, **options)
        got = attention_head_subspace_affinity(b, **options)
        for name, value in vars(want).items():
            mine = getattr(got, name)
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                assert_close_to(mine, value, atol=1e-5, name=name)
            elif isinstance(value, torch.Tensor):
                assert torch.equal(mine, value), name
            else:
                assert mine == value, name
        for normalized in (False, True):
            pairs = [x.top_pairs(4, normalized=normalized) for x in (want, got)]
            for its, mine in zip(*pairs, strict=True):
                assert vars(mine.source) == vars(its.source)
                assert vars(mine.target) == vars(its.target)
                assert mine.source.label == its.source.label
                assert mine.score == pytest.approx(its.score, abs=1e-5)
                assert mine.normalized == pytest.approx(its.normalized, abs=1e-5)


def test_subspaces_one_can_see_through():
    axes = torch.eye(6)
    a, b = (orthonormal_subspace(axes[:, chosen]) for chosen in ([0, 1, 2], [1, 2, 3, 4]))
    found = projection_kernel(a, b)
    assert found.score.item() == pytest.approx(2.0)
    assert found.normalized.item() == pytest.approx(2 / math.sqrt(12))
    assert_close_to(found.cosines, [1.0, 1.0, 0.0], atol=1e-6)
    mixed = orthonormal_subspace(axes[:, [1, 2, 3, 4]] @ matrix(4, 4, 3))
    assert projection_kernel(a, mixed).score.item() == pytest.approx(2.0, abs=1e-5)
    assert AttentionHeadRef(3, 7, "O", "query").label == "L3H7"


def test_grouped_heads_are_not_repeated():
    model = ours("llama", dtype=torch.float64)
    found = attention_head_subspace_affinity(model, target_role="K")
    assert found.scores.shape == (3, 4, 3, 2) and found.target_head_kind == "kv"
    want = projection_kernel(
        orthonormal_subspace(model.blocks[0].attn.W_O[1].detach().T),
        orthonormal_subspace(model.blocks[2].attn._W_K[1].detach()),
    )
    assert_close_to(found.scores[0, 1, 2, 1], want.score, atol=1e-12)
    assert not found.scores[1:, :, :2].any()


def test_random_moments_are_the_mean_of_random_subspaces():
    moments = random_projection_kernel_moments(12, 3)
    kernels = torch.stack(
        [
            projection_kernel(
                orthonormal_subspace(matrix(12, 3, 2 * i)),
                orthonormal_subspace(matrix(12, 3, 2 * i + 1)),
            ).score
            for i in range(300)
        ]
    )
    assert kernels.mean().item() == pytest.approx(moments.mean, abs=0.1)
    assert kernels.var().item() == pytest.approx(moments.variance, rel=0.3)


def test_what_is_refused():
    good = orthonormal_subspace(matrix(6, 2, 0))
    for call, message in (
        (lambda: orthonormal_subspace(torch.zeros(4, 2)), "has rank 0"),
        (lambda: orthonormal_subspace(matrix(4, 2, 0), rank=3), "from 1 to 2"),
        (lambda: orthonormal_subspace(torch.ones(4, 2), rank=2), "has rank 1"),
        (lambda: orthonormal_subspace(torch.full((4, 2), torch.nan)), "must be finite"),
        (lambda: orthonormal_subspace(matrix(4, 2, 0), rtol=-1.0), "not below zero"),
        (lambda: projection_kernel(good, orthonormal_subspace(matrix(5, 2, 0))), "in one space"),
        (lambda: random_projection_kernel_moments(1, 1), "from 2"),
        (lambda: random_projection_kernel_moments(4, 5), "from 1 to 4"),
        (lambda: attention_head_subspace_affinity(ours("gpt2"), target_role="O"), "target_role"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    from dataclasses import replace

    skew = replace(good, basis=good.basis * 1.5)
    with pytest.raises(ValueError, match="not orthonormal"):
        projection_kernel(good, skew)
    with pytest.raises(ValueError, match="positive integer"):
        attention_head_subspace_affinity(ours("gpt2"), target_role="Q").top_pairs(0)
