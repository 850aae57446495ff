"""Norms and rotary embedding by every kernel that the device has, against float64."""

import pytest
import torch

from fastlens.kernels import reference
from fastlens.ops import norm
from fastlens.ops.rotary import rotary
from tests.on_gpu.kernels import DTYPES, SIZES, judge, placed

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_strides = pytest.mark.parametrize("strides", ["whole", "sliced", "transposed"])
pytestmark = pytest.mark.usefixtures("poison_empty")
OPS = {"layer_norm": ["layer_norm", "norm"], "rms_norm": ["rms_norm", "norm"]}


@each_dtype
@each_strides
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("d", [*SIZES, 16384, 20000])
@pytest.mark.parametrize("is_affine", [True, False])
def test_norms(device, dtype, strides, op, d, is_affine):
    x = placed(torch.randn(3, 5, d) * 3 + 1, strides, device, dtype)
    n_factors = {"layer_norm": 2, "rms_norm": 1}[op]
    factors = [torch.randn(d).to(device, dtype) for _ in range(n_factors)]
    none = [None] * n_factors

    def of(function):
        if is_affine:
            return lambda x, *factors: function(x, *factors, 1e-5)
        return lambda x: function(x, *none, 1e-5)

    inputs = [x, *factors] if is_affine else [x]
    kernel, spec = getattr(norm, op), getattr(reference, op)
    # One channel is its own mean: the gradient is zero, and what is left of it is rounding. Of very
    # many PyTorch's own gradient is worse than its eager one.
    # Squares of very many numbers, summed in another order than eager PyTorch's tree of them.
    floor = 1e-6 if d > 1000 and dtype == torch.float32 else None
    rest = {"gradients": 1 < d <= 1000, "floor": floor, "smallest": 3.0}
    judge(OPS[op], device, of(kernel), of(spec), inputs, **rest)


@each_dtype
@each_strides
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("d", SIZES)
def test_scales(device, dtype, strides, op, d):
    x = placed(torch.randn(3, 5, d) * 3 + 1, strides, device, dtype)
    n_factors = {"layer_norm": 2, "rms_norm": 1}[op]
    none = [None] * n_factors

    def spec(x):
        mean = x.mean(-1, keepdim=True) if op == "layer_norm" else 0.0
        return ((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    function = getattr(norm, f"{op}_with_scale")
    # float32 whatever the input: held to eager float32.
    judge(
        *(OPS[op], device),
        lambda x: function(x.to(dtype), *none, 1e-5)[1],
        spec,
        [x.float()],
        floor=2e-6,
    )


@each_dtype
@each_strides
@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize(("rotary_dim", "d_head"), [(2, 2), (8, 20), (64, 64), (128, 256)])
@pytest.mark.parametrize("n_pos", [1, 63])
def test_rotary(device, dtype, strides, adjacent, rotary_dim, d_head, n_pos):
    x = placed(torch.randn(2, n_pos, 3, d_head), strides, device, dtype)
    angles = torch.rand(1, n_pos, rotary_dim // 2, dtype=torch.float64) * 6
    angles = angles.repeat_interleave(2, -1) if adjacent else torch.cat([angles, angles], -1)
    tables = [table.to(dtype) for table in (angles.cos(), angles.sin())]

    def of(function):
        return lambda x: function(x, *(t.to(x.device, x.dtype) for t in tables), adjacent)

    judge(["rotary"], device, of(rotary), of(reference.rotary), [x], gradients=True)
