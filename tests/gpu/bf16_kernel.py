"""A Triton kernel that does one of everything on bfloat16. Importing it imports triton."""

import torch
import triton
import triton.language as tl

NAMES = ("sum", "product", "difference", "larger", "negative", "rounding", "less", "from integers")


@triton.jit
def _operations_kernel(a_ptr, b_ptr, wide_ptr, out_ptr, reduced_ptr, dot_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b, wide = tl.load(a_ptr + at), tl.load(b_ptr + at), tl.load(wide_ptr + at)
    tl.store(out_ptr + at, a + b)
    tl.store(out_ptr + N + at, a * b)
    tl.store(out_ptr + 2 * N + at, a - b)
    tl.store(out_ptr + 3 * N + at, tl.maximum(a, b))
    tl.store(out_ptr + 4 * N + at, -a)
    tl.store(out_ptr + 5 * N + at, wide.to(tl.bfloat16))
    tl.store(out_ptr + 6 * N + at, (a < b).to(tl.bfloat16))
    tl.store(out_ptr + 7 * N + at, (at * 3).to(tl.bfloat16))
    tl.store(reduced_ptr, tl.max(a, 0))
    square = tl.arange(0, 16)
    x = tl.load(a_ptr + square[:, None] * 16 + square[None, :])
    y = tl.load(b_ptr + square[:, None] * 16 + square[None, :])
    tl.store(dot_ptr + square[:, None] * 16 + square[None, :], tl.dot(x, y))


def results() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name of an operation -> what the kernel gave, what torch gives."""
    n = 256
    a, b = torch.randn(2, n).bfloat16().unbind(0)
    # Small whole numbers: products and sums are exact, in whatever order.
    a[:], b[:] = (torch.randint(-8, 9, (2, n)) + torch.zeros(2, n)).bfloat16().unbind(0)
    wide = torch.randn(n)
    out = torch.full((len(NAMES), n), float("nan")).bfloat16()
    reduced, dot = torch.full((1,), float("nan")).bfloat16(), torch.full((16, 16), float("nan"))
    _operations_kernel[(1,)](a, b, wide, out, reduced, dot, N=n)
    wanted = (
        *(a + b, a * b, a - b, torch.maximum(a, b), -a, wide.bfloat16(), (a < b).bfloat16()),
        (torch.arange(n) * 3).bfloat16(),
    )
    found = dict(zip(NAMES, zip(out.unbind(0), wanted, strict=True), strict=True))
    found["maximum of all"] = reduced, a.max().view(1)
    found["dot"] = dot, a.float().view(16, 16) @ b.float().view(16, 16)
    return found
