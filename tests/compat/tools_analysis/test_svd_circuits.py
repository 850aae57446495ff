"""TransformerLens' SVD of a head's maps: its values, blocks and null directions."""

import pytest
import torch

from fastlens.compat.tools_analysis.svd_circuits import (
    DegenerateDirectionError,
    HeadSVD,
    decompose_head,
)
from tests.close import assert_close_to
from tests.models import ours, theirs

_PATH = "transformer_lens.tools.analysis.svd_circuits."
# What tests here compare with TransformerLens 3.9, on equal weights.
COMPARED = [
    _PATH + name
    for name in (
        "DegenerateDirectionError",
        "HeadDecomposition",
        "HeadSVD",
        "HeadSVD.block_of",
        "HeadSVD.degenerate_blocks",
        "HeadSVD.is_degenerate",
        "HeadSVD.require_isolated",
        "RankReportRow",
        "decompose_head",
    )
]


def close_neighbours(model):
    """Give one head singular values that are close, and some that are zero."""
    basis = torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.tensor([3.0, 2.995, 2.99, 1.5, 1.0, 1e-9, 1e-10, 0.0])
    with torch.no_grad():
        model.blocks[1].attn.W_V[2] = basis * values
        model.blocks[1].attn.W_O[2] = torch.linalg.qr(basis.flip(0))[0].T


@pytest.mark.tl
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_values_are_those_of_transformer_lens(name):
    pytest.importorskip("transformer_lens")
    from transformer_lens.tools.analysis import svd_circuits as tl

    a, b = theirs(name), ours(name)
    if name == "gpt2":
        close_neighbours(a)
    b.load_state_dict(a.state_dict())
    for layer, head in ((0, 0), (1, 2), (1, 3)):
        want, got = tl.decompose_head(a, layer, head), decompose_head(b, layer, head)
        for one in ("QK", "OV"):
            mine, its = getattr(got, one), getattr(want, one)
            assert (mine.which, mine.layer, mine.head, mine.eps) == (one, layer, head, its.eps)
            assert mine.null_rtol == its.null_rtol
            assert_close_to(mine.S, its.S, atol=1e-5)
            # Singular vectors have a sign of their own; the product has not.
            products = [x.U @ x.S.diag() @ x.V.T for x in (mine, its)]
            assert_close_to(*products, atol=1e-5)
            flags = [
                [(r.idx, r.is_degenerate, r.is_null, r.block_id) for r in x.rank_report]
                for x in (mine, its)
            ]
            assert flags[0] == flags[1]
            ratios = [[(r.sigma, r.sigma_ratio) for r in x.rank_report] for x in (mine, its)]
            assert_close_to(*ratios, atol=1e-5)
            assert mine.degenerate_blocks() == its.degenerate_blocks()
            for i in range(8):
                assert mine.block_of(i) == its.block_of(i)
                assert mine.is_degenerate(i) == its.is_degenerate(i)
                errors = DegenerateDirectionError, tl.DegenerateDirectionError
                for x, error in zip((mine, its), errors, strict=True):
                    if mine.is_degenerate(i):
                        with pytest.raises(error):
                            x.require_isolated(i)
                    else:
                        x.require_isolated(i)


def test_blocks_and_null_directions():
    model = ours("gpt2")
    close_neighbours(model)
    ov = decompose_head(model, 1, 2, which=["OV"]).OV
    assert isinstance(ov, HeadSVD)
    assert ov.degenerate_blocks() == [[0, 1, 2], [5, 6, 7]]
    assert [row.is_null for row in ov.rank_report] == [False] * 5 + [True] * 3
    with pytest.raises(DegenerateDirectionError, match="not apart from its neighbours"):
        ov.require_isolated(1)
    with pytest.raises(ValueError, match="numerically null"):
        ov.require_isolated(6)
    assert ov.block_of(3) == [3]
    loose = decompose_head(model, 1, 2, which=["OV"], eps=1e-6, null_rtol=0.4).OV
    assert loose.degenerate_blocks() == [[4, 5, 6, 7]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grouped_heads_and_precision(dtype):
    model = ours("llama").to(dtype)
    found = decompose_head(model, 2, 3)
    attn = model.blocks[2].attn
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w_k, w_v, _, _ = attn.key_value_leaves()
    w_q, w_k, w_v, w_o = (w.to(wide) for w in (attn.W_Q[3], w_k[1], w_v[1], attn.W_O[3]))
    maps = {"QK": w_q @ w_k.T, "OV": w_v @ w_o}
    for one, product in maps.items():
        svd = getattr(found, one)
        assert svd.S.dtype == wide and not svd.U.requires_grad
        assert_close_to(svd.U @ svd.S.diag() @ svd.V.T, product)


@pytest.mark.parametrize(
    "arguments",
    [(3, 0), (0, 4), (-1, 0), (0, 0, "QK"), (0, 0, ()), (0, 0, ("QK", "VO"))],
)
def test_what_is_refused(arguments):
    layer, head, *which = arguments
    with pytest.raises(ValueError, match="must be"):
        decompose_head(ours("gpt2"), layer, head, **({"which": which[0]} if which else {}))
