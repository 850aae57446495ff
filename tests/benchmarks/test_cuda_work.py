"""The formulas of docs/gpu.md counted by hand, and rules of occupancy as CUDA's header has them."""

import math

import pytest
import torch

from benchmarks import cuda_work
from benchmarks.cuda_devices import GPUS, SMS, occupancy
from benchmarks.cuda_report import gpu_of
from benchmarks.cuda_work import Branches, Work
from fastlens.kernels.masks import AttentionRule, visibility


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (7, 7), (2, 9), (1, 40)])
def test_pairs_are_those_of_the_mask(is_causal, window, n_queries, n_keys):
    rule = AttentionRule(1.0, causal=is_causal, window=window)
    keys = torch.arange(n_keys)
    mask = visibility(rule, keys[n_keys - n_queries :], keys, None)
    expected = n_queries * n_keys if mask is None else int(mask.sum())
    assert cuda_work.visible_pairs(n_queries, n_keys, is_causal, window) == expected


def test_attention_by_hand():
    """2 examples, 3 tokens, 4 heads on 2 KV heads of 8 channels, 2 bytes."""
    work = cuda_work.attention(2, 3, 3, 4, 2, 8, 2)
    assert work.flops == 4 * 2 * 4 * 6 * 8 and work.exponentials == 2 * 4 * 6
    q = z = 2 * 3 * 4 * 8 * 2
    k = v = 2 * 3 * 2 * 8 * 2
    assert work.n_bytes == q + k + v + z + 4 * 2 * 3 * 4 and work.is_matrix
    assert not cuda_work.attention(2, 3, 3, 4, 2, 8, 4).is_matrix
    capped = cuda_work.attention(2, 3, 3, 4, 2, 8, 2, is_capped=True)
    assert capped.exponentials == 2 * work.exponentials


def test_suffixes_by_hand():
    """Two runs from position 2 and one from 3, of 4 positions, behind a base run."""
    branches = [Branches(2, 2, 4), Branches(1, 3, 4)]
    table, spans, n_rows = cuda_work.packed(branches)
    assert table.tolist() == [[0, 1, 4, 5], [0, 1, 6, 7], [0, 1, 2, 8]] and n_rows == 9
    assert [(s.branches.tolist(), s.start, s.stop) for s in spans] == [([0, 1], 2, 4), ([2], 3, 4)]
    work = cuda_work.suffix_attention(branches, 4, 2, 8, 2)
    # Rows at 2 and 3 of two runs, at 3 of one; three packed rows of the base run are read.
    assert work.flops == 4 * 8 * 4 * (2 * (3 + 4) + 4)
    assert work.n_bytes == 2 * 2 * 8 * (4 * 5 + 2 * (5 + 3)) + 8 * 4 * 5


def test_the_sweep_has_its_sites():
    assert sum(b.n * (b.stop - b.start) for b in cuda_work.Z_SWEEP) == 2160
    assert sum(b.n for b in cuda_work.Z_SWEEP) == 720


def test_bytes_of_rows_and_sites():
    assert cuda_work.norm(10, 8, 2, True).n_bytes == 2 * 160 + 80 + 32
    assert cuda_work.rotary(5, 3, 4, 8, 2).n_bytes == 2 * (2 * 120 + 2 * 20)
    assert cuda_work.patch_sites(7, 8, 2).n_bytes == 2 * 7 * 8 * 2 + 7 * 16
    assert cuda_work.patch_sites(7, 8, 2, 100).n_bytes == 2 * 7 * 8 * 2 + 7 * 16 + 400
    assert cuda_work.capture(7, 8, 4, 2).n_bytes == 7 * (8 * 6 + 8)
    assert cuda_work.capture_int8(7, 8, 2).n_bytes == 7 * (8 * 3 + 12)
    assert cuda_work.dequantize(64, 32, 18, 2, 0).n_bytes == 36 + 128
    rows = cuda_work.pattern_rows(3, 10, 8, 2, 1)
    assert rows.flops == 480 and rows.n_bytes == 2 * 8 * 13 + 4 * 30 + 28 * 3
    summary = cuda_work.attention_summary(1, 3, 4, 2, 8, 2, 1)
    assert summary.flops == 2 * 4 * 6 * 8 and summary.n_bytes == 2 * 8 * (12 + 6) + 4 * 12 * 3


def test_a_roofline_is_the_longest_part():
    a100 = GPUS[0]
    moves = Work(flops=1.0, n_bytes=2.039e12)
    assert moves.roofline(a100) == pytest.approx(1.0) and moves.bound(a100) == "memory"
    on_tensor_cores = Work(312e12, 1.0, is_matrix=True)
    assert on_tensor_cores.roofline(a100) == pytest.approx(1.0)
    assert Work(312e12, 1.0).roofline(a100) == pytest.approx(16.0)
    assert Work(1.0, 1.0, 16.0 * 108 * 1.41e9).bound(a100) == "exp"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_card_is_known_by_its_name(name, found):
    gpu = gpu_of(name)
    assert (gpu.name if gpu else None) == found


def test_occupancy_by_hand():
    sm = SMS["sm_80"]
    # 177 registers: 5,888 a warp, two in a partition of 16,384: eight warps, two blocks of four.
    found = occupancy(sm, 177, 4, 24 * 1024)
    assert (found.blocks, found.share, found.limit) == (2, 0.125, "registers")
    assert occupancy(sm, 32, 4, 0).limit == "warps" and occupancy(sm, 32, 4, 0).share == 1.0
    assert occupancy(sm, 16, 1, 0).blocks == 32
    # 41 KiB and the driver's: 42, of which 164 hold three.
    assert occupancy(sm, 32, 4, 41 * 1024).blocks == 3
    assert occupancy(sm, 256, 4, 0).blocks == 0
    assert occupancy(SMS["sm_100"], 32, 4, 0, 256).limit == "tensor memory"


def test_rates_are_those_of_the_sheets():
    """Products of units and clocks give the sheets' rates, within their rounding."""
    a100, h100, _ = GPUS
    # 1,024 and 2,048 dense 16-bit multiply-adds a clock and multiprocessor.
    assert math.isclose(2 * 1024 * a100.sms * a100.clock, a100.matrix, rel_tol=0.01)
    assert math.isclose(2 * 2048 * h100.sms * h100.clock, h100.matrix, rel_tol=0.01)
