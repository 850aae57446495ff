"""The public attention op: dispatched, and the same as the specification."""

import torch

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from fastlens.ops.attention import attention
from tests.close import assert_close_to


def test_attention_equals_the_specification():
    q, k, v = torch.randn(3, 2, 6, 4, 8).unbind(0)
    rule = AttentionRule(2.0)
    truth = reference.attention(q.double(), k.double(), v.double(), rule)
    assert_close_to(attention(q, k, v, rule), truth, atol=1e-6)


def test_long_rows_with_a_mask_hold_no_square_mask():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(out.numel())
            return out

    n = 1600
    q, k, v = torch.randn(3, 1, n, 1, 4).unbind(0)
    mask = torch.ones(1, n, dtype=torch.bool)
    mask[0, :3] = False
    with Watch():
        attention(q, k, v, AttentionRule(2.0), 0, mask)
    assert max(seen) <= 512 * n
