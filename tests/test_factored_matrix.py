import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlens.errors import ShapeError
from fastlens.factored_matrix import FactoredMatrix, composition_scores

sizes = st.integers(1, 7)
leads = st.sampled_from([((), ()), ((3,), (3,)), ((2, 1), (1, 3)), ((4,), ()), ((), (2, 2))])


def factors(seed: int, lead_a, lead_b, ldim: int, mdim: int, rdim: int, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    A = torch.randn(*lead_a, ldim, mdim, generator=gen, dtype=torch.float64)
    B = torch.randn(*lead_b, mdim, rdim, generator=gen, dtype=torch.float64)
    return A.to(dtype), B.to(dtype)


matrices = st.builds(
    lambda seed, lead, *sides: FactoredMatrix(*factors(seed, *lead, *sides)),
    st.integers(0, 5), leads, sizes, sizes, sizes,
)  # fmt: skip


def close(ours: Tensor, truth: Tensor, tol: float = 1e-10) -> None:
    assert ours.shape == truth.shape
    torch.testing.assert_close(ours, truth.to(ours.dtype), atol=tol, rtol=tol)


@settings(deadline=None)
@given(matrices)
def test_shapes_and_products(fm: FactoredMatrix):
    full = fm.A @ fm.B
    assert fm.shape == full.shape and fm.ndim == full.ndim
    assert (fm.ldim, fm.mdim, fm.rdim) == (fm.A.shape[-2], fm.A.shape[-1], fm.B.shape[-1])
    assert fm.has_leading_dims == (full.ndim > 2)
    assert fm.pair[0] is fm.A and fm.pair[1] is fm.B
    close(fm.AB, full)
    close(fm.T.AB, full.mT)
    close(fm.get_corner(2), full[(slice(2),) * full.ndim])
    assert repr(fm) == f"FactoredMatrix: Shape({full.shape}), Hidden Dim({fm.mdim})"


@settings(deadline=None)
@given(matrices)
def test_svd(fm: FactoredMatrix):
    U, S, V = fm.svd()
    rank = min(fm.ldim, fm.mdim, fm.rdim)
    assert S.shape == (*fm.shape[:-2], rank)
    close(S, torch.linalg.svdvals(fm.AB)[..., :rank])
    close(U * S[..., None, :] @ V.mT, fm.AB)
    eye = torch.eye(rank, dtype=S.dtype).expand(*fm.shape[:-2], rank, rank)
    close(U.mT @ U, eye)
    close(V.mT @ V, eye)
    close(fm.U, U)
    close(fm.S, S)
    close(fm.V, V)
    even = fm.make_even()
    close(even.AB, fm.AB)
    close(even.A.mT @ even.A, torch.diag_embed(S))
    close(even.B @ even.B.mT, torch.diag_embed(S))
    close(fm.collapse_l().mT @ fm.collapse_l(), fm.AB.mT @ fm.AB)
    close(fm.collapse_r() @ fm.collapse_r().mT, fm.AB @ fm.AB.mT)


@settings(deadline=None)
@given(matrices)
def test_norm(fm: FactoredMatrix):
    truth = torch.linalg.matrix_norm(fm.AB)
    close(fm.norm(), truth)
    single = FactoredMatrix(fm.A.float(), fm.B.float())
    assert single.norm().dtype == torch.float32
    close(single.norm(), torch.linalg.matrix_norm(single.A.double() @ single.B.double()), 3e-7)


def test_norm_of_a_product_that_nearly_cancels():
    # B annihilates all of A but a part 1e-6 of its size: float32 Gram matrices would give noise.
    A, _ = factors(0, (), (), 40, 8, 1)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    A = A @ torch.diag(torch.tensor([1.0] * 7 + [1e-6], dtype=torch.float64)) @ basis
    B = basis.T[:, -1:] @ torch.randn(1, 30, dtype=torch.float64)
    for dtype, bound in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
        fm = FactoredMatrix(A.to(dtype), B.to(dtype))
        truth = torch.linalg.matrix_norm(fm.A.double() @ fm.B.double())
        assert abs(fm.norm().double() / truth - 1) < bound
        plain = torch.linalg.matrix_norm(fm.AB)
        assert abs(fm.norm() - truth) <= abs(plain - truth) + 1e-15


def test_svd_is_no_worse_than_the_svds_of_both_factors():
    A, B = factors(0, (8,), (8,), 96, 16, 80, torch.float32)
    truth = torch.linalg.svdvals(A.double() @ B.double())[..., :16]
    _, Sa, Va = torch.linalg.svd(A, full_matrices=False)
    Ub, Sb, _ = torch.linalg.svd(B, full_matrices=False)
    eager = torch.linalg.svdvals(Sa[..., None] * (Va @ Ub) * Sb[..., None, :])
    rms, eager_rms = ((S - truth).square().mean().sqrt() for S in (FactoredMatrix(A, B).S, eager))
    assert rms <= 2 * eager_rms


def test_norm_of_all_pairs_does_not_repeat_the_factors():
    left, right = torch.randn(40, 30, 4), torch.randn(50, 4, 30)
    fm = FactoredMatrix(left[:, None], right[None])
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                sizes.append(out.untyped_storage().nbytes() // out.element_size())
            return out

    with Watch():
        norms = fm.norm()
    assert max(sizes) <= 50 * 30 * 4
    close(norms, torch.linalg.matrix_norm(left[:, None] @ right[None]), 1e-5)


@settings(deadline=None)
@given(matrices.filter(lambda fm: fm.ldim == fm.rdim))
def test_eigenvalues(fm: FactoredMatrix):
    values = fm.eigenvalues
    assert values.shape == (*fm.shape[:-2], fm.mdim)
    close(fm.BA, fm.B @ fm.A)
    # Traces of powers fix the eigenvalues, and do not care for their order.
    full = torch.eye(fm.ldim, dtype=torch.float64).expand(fm.shape)
    for power in (1, 2, 3):
        full = full @ fm.AB
        trace = full.diagonal(dim1=-2, dim2=-1).sum(-1)
        close(values.pow(power).sum(-1).real, trace, 1e-7 * (1 + trace.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_factors_are_worked_on_in_float32(dtype):
    A, B = factors(0, (2,), (2,), 6, 3, 6, dtype)
    fm, wide = FactoredMatrix(A, B), FactoredMatrix(A.float(), B.float())
    for ours, truth in zip((*fm.svd(), fm.norm()), (*wide.svd(), wide.norm()), strict=True):
        assert ours.dtype == torch.float32
        close(ours, truth, 1e-6)
    assert fm.eigenvalues.dtype == torch.complex64


@settings(deadline=None)
@given(matrices, st.integers(1, 7), st.integers(1, 7), st.integers(0, 3))
def test_matrix_products_on_both_sides(fm: FactoredMatrix, inner: int, outer: int, seed: int):
    full = fm.AB
    C, D = factors(seed, (), (), fm.rdim, inner, outer)
    right = fm @ C
    close(right.AB, full @ C)
    assert right.mdim == min(fm.mdim, fm.rdim)
    left = C.T @ fm.T
    close(left.AB, C.T @ full.mT)
    assert left.mdim == min(fm.mdim, fm.rdim)
    both = fm @ FactoredMatrix(C, D)
    close(both.AB, full @ C @ D)
    assert both.mdim == min(fm.mdim, fm.rdim, inner)
    v = C[:, 0]
    close(fm @ v, full @ v)
    close(v @ fm.T, full @ v)


@settings(deadline=None)
@given(matrices, st.sampled_from([2, -0.5, torch.tensor(3.0), torch.tensor([[[[[2.0]]]]])]))
def test_scalars_on_both_sides(fm: FactoredMatrix, scalar):
    number = scalar.item() if isinstance(scalar, Tensor) else scalar
    close((fm * scalar).AB, fm.AB * number)
    close((scalar * fm).AB, fm.AB * number)


@pytest.mark.parametrize(
    ("idx", "same"),
    [
        (0, lambda M: M[0]),
        (-1, lambda M: M[-1]),
        ((1, 2), lambda M: M[1, 2]),
        (slice(1, None), lambda M: M[1:]),
        (None, lambda M: M[None]),
        ((slice(None), None, 0), lambda M: M[:, None, 0]),
        ([0, 0, 1], lambda M: M[[0, 0, 1]]),
        (torch.tensor([1, 0]), lambda M: M[[1, 0]]),
        (([0, 1], [2, 2]), lambda M: M[[0, 1], [2, 2]]),
        (torch.tensor([[True, False, True], [False, True, False]]),
         lambda M: M[[0, 0, 1], [0, 2, 1]]),
        ((0, 1, 2), lambda M: M[0, 1, 2:3]),
        ((0, 1, -1), lambda M: M[0, 1, -1:]),
        ((0, 1, slice(None), 3), lambda M: M[0, 1, :, 3:4]),
        ((0, 1, 2, 3), lambda M: M[0, 1, 2:3, 3:4]),
        ((..., 3), lambda M: M[..., 3:4]),
        ((..., -1, slice(None)), lambda M: M[..., -1:, :]),
        ((0, ..., slice(1, 3), -2), lambda M: M[0, :, 1:3, -2:-1]),
        ((0, 1, [0, 2], [1, 4, 3]), lambda M: M[0, 1][[0, 2]][:, [1, 4, 3]]),
        ((slice(None), 0, torch.tensor(1)), lambda M: M[:, 0, 1:2]),
        ((0, 1, None, 2), lambda M: M[0, 1, None, 2:3]),
        ((), lambda M: M),
    ],
)  # fmt: skip
def test_indexing(idx, same):
    fm = FactoredMatrix(*factors(0, (2, 3), (2, 3), 4, 2, 5))
    close(fm[idx].AB, same(fm.AB))
    assert fm[idx].mdim == 2


def test_indexing_refuses_what_has_no_meaning():
    fm = FactoredMatrix(*factors(0, (2,), (2,), 4, 2, 5))
    with pytest.raises(ShapeError, match="4 indices"):
        fm[0, 0, 0, 0]
    for late in ((0, 1, None), (0, 0, None, 0), (0, 0, 0, None)):
        with pytest.raises(ShapeError, match="leading axes"):
            fm[late]
    for out in ((0, 4), (0, 0, 5), (0, -5), (2,)):
        with pytest.raises(IndexError):
            fm[out]
    with pytest.raises(IndexError, match="ellipsis"):
        fm[..., 0, ...]


def test_unsqueeze():
    fm = FactoredMatrix(*factors(0, (2, 3), (2, 3), 4, 2, 5))
    for k in (0, 1, 2, -3, -4, -5):
        close(fm.unsqueeze(k).AB, fm.AB.unsqueeze(k))
    for k in (3, -2, -6):
        with pytest.raises(ShapeError, match="leading axis"):
            fm.unsqueeze(k)


def test_wrong_shapes_say_so():
    A, B = factors(0, (), (), 4, 2, 5)
    fm = FactoredMatrix(A, B)
    cases = [
        (lambda: FactoredMatrix(A, A), "share the inner axis"),
        (lambda: FactoredMatrix(A.expand(2, 4, 2), B.expand(3, 2, 5)), "do not broadcast"),
        (lambda: fm @ torch.ones(4, 4), "5 meets 4"),
        (lambda: fm @ torch.ones(4), "5 meets 4"),
        (lambda: torch.ones(3, 5) @ fm, "5 meets 4"),
        (lambda: fm * torch.ones(2), "Use @"),
        (lambda: fm.BA, "square"),
        (lambda: fm.eigenvalues, "square"),
    ]
    for act, words in cases:
        with pytest.raises(ShapeError, match=words):
            act()


def test_svd_is_kept_until_a_factor_changes():
    A, B = factors(0, (), (), 6, 2, 5)
    fm = FactoredMatrix(A, B)
    first = fm.svd()
    assert all(x is y for x, y in zip(fm.svd(), first, strict=True))
    A.mul_(2)
    close(fm.S, 2 * first[1])
    with torch.inference_mode():
        close(FactoredMatrix(A.clone(), B.clone()).S, 2 * first[1])


@pytest.mark.parametrize("mdim", [2, 6])
def test_gradients(mdim: int):
    A, B = (x.requires_grad_() for x in factors(0, (), (), 5, mdim, 4))

    def read(A, B):
        fm = FactoredMatrix(A, B)
        return fm.norm(), fm.S, (fm @ B.T).AB

    assert torch.autograd.gradcheck(read, (A, B))
    single = FactoredMatrix(A.detach().float().requires_grad_(), B.detach().float())
    single.norm().backward()
    close(single.A.grad.double(), torch.autograd.grad(FactoredMatrix(A, B).norm(), A)[0], 1e-5)


def test_factors_may_be_strided_parameters():
    W_V = torch.nn.Parameter(torch.randn(3, 4, 8).transpose(1, 2))  # [head, d_model, d_head]
    W_O = torch.nn.Parameter(torch.randn(4, 3, 8).transpose(0, 1))  # [head, d_head, d_model]
    fm = FactoredMatrix(W_V, W_O)
    close(fm.norm(), torch.linalg.matrix_norm(W_V @ W_O), 1e-5)
    close(fm.U * fm.S[..., None, :] @ fm.V.mT, W_V @ W_O, 1e-4)
    close(fm[1, 2].AB, (W_V @ W_O)[1, 2:3], 1e-5)


def test_vh_is_v_and_warns():
    fm = FactoredMatrix(*factors(0, (), (), 4, 2, 5))
    with pytest.warns(DeprecationWarning, match="V"):
        assert fm.Vh is fm.V


@pytest.fixture(scope="module")
def tl():
    module = pytest.importorskip("transformer_lens")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module.FactoredMatrix


@pytest.mark.tl
@settings(deadline=None)
@given(matrices, sizes)
def test_same_as_transformer_lens(tl, fm: FactoredMatrix, inner: int):
    other = tl(fm.A, fm.B)
    right = torch.randn(fm.rdim, inner, dtype=torch.float64)
    for ours, theirs in (
        (fm, other),
        (fm.T, other.T),
        (fm @ right, other @ right),
        (right.T @ fm.T, right.T @ other.T),
        (fm @ fm.T, other @ other.T),
        (fm * 2.0, other * 2.0),
        (fm[0], other[0]),
        (fm[(0,) * fm.ndim], other[(0,) * fm.ndim]),
        (fm.unsqueeze(0), other.unsqueeze(0)),
    ):
        for name in ("shape", "ndim", "ldim", "mdim", "rdim", "has_leading_dims"):
            assert getattr(ours, name) == getattr(theirs, name), name
        close(ours.A, theirs.A)
        close(ours.B, theirs.B)
        assert repr(ours) == repr(theirs)
    close(fm.S, other.S)
    close(fm.norm(), other.norm())
    close(fm.get_corner(), other.get_corner())
    assert fm.U.shape == other.U.shape and fm.V.shape == other.V.shape
    # Each singular direction is fixed up to its sign.
    gaps = (fm.S[..., :-1] - fm.S[..., 1:]).min() if fm.S.shape[-1] > 1 else torch.tensor(1.0)
    if gaps > 1e-3 and fm.S.min() > 1e-3:
        for ours, theirs in ((fm.U, other.U), (fm.V, other.V)):
            close((ours * theirs).sum(-2).abs(), torch.ones_like(fm.S), 1e-6)
        close(fm.make_even().A.abs(), other.make_even().A.abs(), 1e-6)
        close(fm.collapse_l().abs(), other.collapse_l().abs(), 1e-6)
        close(fm.collapse_r().abs(), other.collapse_r().abs(), 1e-6)


def test_composition_scores_are_ratios_of_norms():
    left = FactoredMatrix(*factors(0, (2, 3), (2, 3), 6, 2, 5))
    right = FactoredMatrix(*factors(1, (4,), (4,), 5, 3, 7))
    scores = composition_scores(left, right)
    norms = left.AB.norm(dim=(-2, -1))[..., None] * right.AB.norm(dim=(-2, -1))
    close(scores, (left.AB[:, :, None] @ right.AB).norm(dim=(-2, -1)) / norms)
    assert scores.shape == (2, 3, 4) and 0 <= scores.min() <= scores.max() <= 1
    same = FactoredMatrix(*factors(1, (2, 3), (2, 3), 5, 3, 7))
    pairs = composition_scores(left, same)
    for i in range(2):
        for j in range(3):
            close(composition_scores(left, same, False)[i, j], pairs[i, j, i, j])
    with pytest.raises(ShapeError, match="left writes 5 numbers, right reads 6"):
        composition_scores(left, left)
