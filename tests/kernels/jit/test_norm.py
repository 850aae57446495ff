"""LayerNorm and RMSNorm, interpreted, between guard pages. Not run on a GPU."""

import pytest
import torch

from fastlens.kernels import reference
from tests.close import assert_close_to, assert_no_worse
from tests.gpu.guard_pages import guarded, guarded_outputs
from tests.gpu.judged import check_norm
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.mutation import mutated
from tests.gpu.workers import Died, interpreted

pytestmark = NEEDS_TRITON

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def guarded_norm(**kwargs):
    with guarded_outputs():
        check_norm(place=guarded, **kwargs)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 63, 129, 1000, 5000])
@pytest.mark.parametrize("is_affine", [True, False], ids=["affine", "plain"])
def test_norms(op, dtype, d, is_affine):
    interpreted(guarded_norm, op=op, dtype=dtype, d=d, is_affine=is_affine)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_transposed_rows(op):
    interpreted(guarded_norm, op=op, is_transposed=True)


def norm_by_triton(op):
    """The registered op, for the CPU, with the Triton kernel in dispatch's place."""
    from fastlens.kernels.triton_norm import norm
    from fastlens.ops import dispatch
    from fastlens.ops import norm as registered

    for dtype in DTYPES:
        dispatch._CHOSEN["norm", "cpu", dtype] = norm
    assert registered.kernel_for("norm", "cpu", torch.float32) is norm
    return lambda x, *rest: torch.ops.fastlens.norm(
        x, *rest[:-1], *(() if op == "layer_norm" else (None,)), rest[-1], op == "layer_norm"
    )[0]


def check_gradients(op, dtype, is_affine):
    spec = getattr(reference, op)
    n_factors = (2 if op == "layer_norm" else 1) if is_affine else 0
    missing = (None,) * ((2 if op == "layer_norm" else 1) - n_factors)
    x = (torch.randn(3, 4, 36)[..., 2:33] * 2 + 1).to(dtype)
    given = [x, *(torch.randn(31).to(dtype) for _ in range(n_factors))]
    weight = torch.randn(3, 4, 31)

    def gradients(norm, dtype):
        leaves = [g.to(dtype).detach().requires_grad_() for g in given]
        out = norm(*leaves, *missing, 1e-5)
        return torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)

    kernel = norm_by_triton(op)
    truth = gradients(spec, torch.float64)
    triples = zip(gradients(kernel, dtype), gradients(spec, dtype), truth, strict=True)
    for got, plain, want in triples:
        assert got.dtype == dtype
        assert_no_worse(got, plain, want, factor=3, name=f"gradient of {op}")


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_affine", [True, False], ids=["affine", "plain"])
def test_gradients(op, dtype, is_affine):
    interpreted(check_gradients, op=op, dtype=dtype, is_affine=is_affine)


def check_edges():
    from fastlens.kernels.triton_layer_norm import layer_norm, layer_norm_with_scale
    from fastlens.kernels.triton_norm import norm
    from fastlens.kernels.triton_rms_norm import rms_norm

    out, scale = layer_norm_with_scale(torch.zeros(0, 8), None, None, 1e-5)
    assert out.shape == (0, 8) and scale.shape == (0, 1)
    out, _ = layer_norm_with_scale(torch.ones(2, 8).bfloat16(), torch.ones(8), None, 1e-5)
    assert out.dtype == torch.float32
    x = torch.randn(3, 8) + 2
    for centre in (True, False):
        found, expected = (f(x, None, None, 1e-5, centre) for f in (norm, reference.norm))
        for got, want in zip(found, expected, strict=True):
            assert_close_to(got, want, atol=1e-6)
    long = torch.randn(1, 16385)
    for one, spec in ((layer_norm, reference.layer_norm), (rms_norm, reference.rms_norm)):
        factors = (None,) if one is rms_norm else (None, None)
        assert_close_to(one(long, *factors, 1e-5), spec(long, *factors, 1e-5))


def test_edges():
    interpreted(check_edges)


def check_opcheck(centre):
    norm_by_triton("layer_norm")
    x, w, b = torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)
    for leaf in (x, w, b):
        leaf.requires_grad_()
    arguments = (x, w, b if centre else None, 1e-5, centre)
    torch.library.opcheck(torch.ops.fastlens.norm.default, arguments)


@pytest.mark.parametrize("centre", [True, False])
def test_opcheck(centre):
    interpreted(check_opcheck, centre=centre)


def check_mistake(right, wrong):
    with mutated("norm", right, wrong):
        guarded_norm()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("tl.where(inside, x - mean[:, None], 0.0)", "x - mean[:, None]"),
        ("tl.sum(x * x, 1) / d + eps", "tl.sum(x * x, 1) / (d - 1) + eps"),
        ("out + b[None, :]", "out - b[None, :]"),
    ],
    ids=["padding counted", "unbiased variance", "sign of the bias"],
)
def test_a_mistake_is_caught(right, wrong):
    with pytest.raises(AssertionError, match="values differ"):
        interpreted(check_mistake, right=right, wrong=wrong)


def test_a_dropped_mask_hits_a_guard_page():
    with pytest.raises(Died):
        interpreted(check_mistake, right="scale, mask=is_row)", wrong="scale)")
