"""What compilers and autograd are told of the registered ops holds on the device too."""

import pytest
import torch

from benchmarks.cuda_site_cases import random_blocks
from benchmarks.cuda_work import Branches, packed
from fastlens.kernels.masks import AttentionRule
from tests.on_gpu.kernels import families

FLOATS = torch.float32


def arguments(op, device):
    """One call of each registered op, with gradients where it has them."""
    x = torch.randn(3, 7, 4, 8, device=device)
    sites = torch.tensor([[0, 1, 2], [2, 6, 3]])
    rule = AttentionRule(3.0)
    q, k, v = (torch.randn(2, 9, heads, 8, device=device) for heads in (4, 2, 2))
    if op == "patch_sites":
        return x.requires_grad_(), sites, torch.randn(2, 8, device=device), "add"
    if op == "patch_sites_":
        return x, sites, torch.randn(2, 8, device=device), "scale", False
    if op == "capture":
        return x.requires_grad_(), sites, torch.bfloat16
    if op == "capture_int8":
        return x, sites
    if op == "dequantize":
        return random_blocks("Q4_0", 3, 64)[0].to(device), None, "Q4_0", FLOATS
    if op == "norm":
        return x.requires_grad_(), torch.ones(8, device=device), None, 1e-5, True
    if op == "rotary":
        tables = torch.rand(2, 1, 7, 8, device=device)
        return x.requires_grad_(), tables[0], tables[1], False
    if op == "suffix_attention":
        table, spans, n_rows = packed([Branches(2, 3, 8), Branches(1, 5, 8)])
        q, k, v = (torch.randn(n_rows, heads, 8, device=device) for heads in (4, 2, 2))
        branches = [span.branches.to(device) for span in spans]
        starts, stops = [span.start for span in spans], [span.stop for span in spans]
        return q, k, v, table.to(device), branches, starts, stops, None, *rule
    assert op == "attention", op
    leaves = [leaf.requires_grad_() for leaf in (q, k, v)]
    return *leaves, *rule, 0, None, None


OPS = {
    "attention": ["attention", "attention_lse"],
    "capture": ["capture"],
    "capture_int8": ["capture_int8"],
    "dequantize": ["dequantize"],
    "norm": ["norm"],
    "patch_sites": ["patch_sites"],
    "patch_sites_": ["patch_sites_"],
    "rotary": ["rotary"],
    "suffix_attention": ["suffix_attention", "attention", "attention_lse"],
}


@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, op):
    overload = getattr(torch.ops.fastlens, op).default
    for _, kernels in families(OPS[op], device, FLOATS):
        with kernels:
            torch.library.opcheck(overload, arguments(op, device))
