"""The public norm ops: values, the scale, gradients, and which kernel is called in which way."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlens.kernels import reference
from fastlens.ops import dispatch
from fastlens.ops.norm import layer_norm, layer_norm_with_scale, rms_norm, rms_norm_with_scale
from tests.close import assert_close_to, assert_no_worse

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)) * 4
W, B = torch.rand(16), torch.rand(16)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_norms_equal_the_specification():
    x, w, b = X.double(), W.double(), B.double()
    assert_close_to(layer_norm(X, W, B), reference.layer_norm(x, w, b, 1e-5), atol=2e-6)
    assert_close_to(layer_norm(X), reference.layer_norm(x, None, None, 1e-5), atol=2e-6)
    assert_close_to(rms_norm(X, W), reference.rms_norm(x, w, 1e-5), atol=2e-6)
    assert_close_to(rms_norm(X, eps=1e-2), reference.rms_norm(x, None, 1e-2), atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 63, 129, 1000])
def test_the_scale_is_what_each_row_was_divided_by(dtype, d):
    x = (torch.randn(5, 3, d + 2).transpose(0, 1)[..., 1 : d + 1] * 3 + 1).to(dtype)
    w, b = torch.randn(2, d).to(dtype).unbind(0)
    out, scale = layer_norm_with_scale(x, w, b)
    spec = reference.layer_norm
    truth = spec(x.double(), w.double(), b.double(), 1e-5)
    assert_no_worse(out, spec(x, w, b, 1e-5), truth)
    var = x.double().var(-1, correction=0, keepdim=True)
    assert_close_to(scale, (var + 1e-5).sqrt(), atol=0, rtol=1e-6)
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    out, scale = rms_norm_with_scale(x, w, eps=0.1)
    spec = reference.rms_norm
    assert_no_worse(out, spec(x, w, 0.1), spec(x.double(), w.double(), 0.1))
    square = x.double().square().mean(-1, keepdim=True)
    assert_close_to(scale, (square + 0.1).sqrt(), atol=0, rtol=1e-6)


def test_the_scale_makes_the_norm_linear():
    """What `layer_norm_with_scale` promises of a direction's share."""
    part, rest = X, torch.randn(2, 3, 16)
    out, scale = layer_norm_with_scale(part + rest)
    shares = sum((p - p.mean(-1, keepdim=True)) / scale for p in (part, rest))
    assert_close_to(out, shares, atol=1e-6)


@pytest.mark.parametrize("is_affine", [True, False])
@pytest.mark.parametrize("centre", [True, False])
def test_gradients(centre, is_affine):
    x = (torch.randn(2, 5, dtype=torch.float64) + 1).requires_grad_()
    w, b = torch.randn(2, 5, dtype=torch.float64).unbind(0)
    leaves = [x]
    if is_affine:
        leaves += [w.requires_grad_()] + ([b.requires_grad_()] if centre else [])

    def norm(x, w=None, b=None):
        out, mean, scale = torch.ops.fastlens.norm(x, w, b, 1e-3, centre)
        return (out, mean, scale) if centre else (out, scale)

    assert torch.autograd.gradcheck(norm, leaves)
    assert torch.autograd.gradgradcheck(norm, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("centre", [True, False])
def test_gradients_are_no_worse_than_plain_ones(dtype, centre):
    given = [x.to(dtype) for x in (X * 2 + 1, W, B)][: 3 if centre else 2]
    weight = torch.linspace(-1, 1, X.numel()).view(X.shape)

    def gradients(norm, dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in given]
        return torch.autograd.grad((norm(*leaves) * weight.to(dtype)).sum(), leaves)

    def op(x, w, b=None):
        return torch.ops.fastlens.norm(x, w, b, 1e-5, centre)[0]

    def spec(*leaves):
        return (reference.layer_norm if centre else reference.rms_norm)(*leaves, 1e-5)

    for got, plain, want in zip(
        gradients(op, dtype), gradients(spec, dtype), gradients(spec, torch.float64), strict=True
    ):
        assert got.dtype == dtype
        assert_no_worse(got, plain, want, factor=3)


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(centre, needs_grad, dtype):
    x = torch.randn(4, 2, 8).transpose(0, 1).to(dtype).requires_grad_(needs_grad)
    w, b = torch.randn(2, 8).unbind(0)
    w, b = w.to(dtype), b.requires_grad_(needs_grad)
    for arguments in ((x, w, b, 1e-5, centre), (x, None, None, 1e-5, centre)):
        torch.library.opcheck(torch.ops.fastlens.norm.default, arguments)


def test_the_widest_dtype_is_that_of_the_output():
    out, scale = layer_norm_with_scale(X.bfloat16(), W, B.half())
    assert (out.dtype, scale.dtype) == (torch.float32, torch.float32)


def test_traced_whole():
    """The checks of shapes under pytest cannot be traced, so the op itself is."""

    def run(x):
        return torch.ops.fastlens.norm(x * 2, W, B, 1e-5, True)[0].sin()

    traced = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(X), run(X))


# -- how a kernel is called ------------------------------------------------------------------------


def test_no_kernel_for_the_cpu_is_opaque():
    """So the public functions need not ask there."""
    for kernels in dispatch.kernels().values():
        for kernel in kernels:
            if kernel.is_opaque:
                assert kernel.refuses(torch.device("cpu"), torch.float32) is not None


@pytest.fixture
def opaque_on_cuda(monkeypatch):
    """As on a GPU with Triton on: what serves CUDA may only be reached by the op."""

    def forbidden(*args):
        raise AssertionError("called directly")

    for op in ("layer_norm", "rms_norm", "norm"):
        key = op, "cuda", torch.bfloat16
        monkeypatch.setitem(dispatch._CHOSEN, key, forbidden)
        monkeypatch.setattr(dispatch, "_OPAQUE", dispatch._OPAQUE | {key})


def test_an_opaque_kernel_is_reached_by_the_registered_op(opaque_on_cuda):
    with FakeTensorMode():
        x = torch.empty(2, 3, 16, device="cuda", dtype=torch.bfloat16)
        w = torch.empty(16, device="cuda", dtype=torch.bfloat16)
        for out in (layer_norm(x, w, w), rms_norm(x, w)):
            assert (out.device.type, out.shape, out.dtype) == ("cuda", x.shape, x.dtype)
        for out, scale in (layer_norm_with_scale(x), rms_norm_with_scale(x)):
            assert (out.shape, scale.shape, scale.dtype) == (x.shape, (2, 3, 1), torch.float32)
