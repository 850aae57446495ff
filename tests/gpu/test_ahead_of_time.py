"""Every shipped configuration compiles for four architectures, without spills and within limits.

Compiled is not run: sm_90, sm_100 and gfx942 code has been executed by nobody.
"""

import pytest
import torch

from tests.gpu import shipped
from tests.gpu.ahead_of_time import TARGETS, compile_for, faults, resources
from tests.gpu.launches import launches_of
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.workers import compiling

pytestmark = NEEDS_TRITON


def compile_attention(target, d_head, dtype, rule):
    (launch,) = launches_of(shipped.attention(d_head, dtype, rule))
    compiled = compile_for(launch, TARGETS[target])
    # float32 products are exact ones, which no matrix instruction of NVIDIA's makes.
    wants_matrix = dtype != torch.float32
    return faults(compiled, TARGETS[target], wants_matrix=wants_matrix)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("d_head", shipped.D_HEADS)
@pytest.mark.parametrize("dtype", shipped.DTYPES, ids=str)
@pytest.mark.parametrize("rule", shipped.RULES)
def test_attention(target, d_head, dtype, rule):
    assert not compiling(compile_attention, target=target, d_head=d_head, dtype=dtype, rule=rule)


def compile_all(target, kind, rule):
    """Faults of every launch of ``shipped.<kind>()`` by that rule, by what asked for it."""
    found = {}
    for name, call in getattr(shipped, kind)():
        if (" causal" in name) != (rule == "causal"):
            continue
        for number, launch in enumerate(launches_of(call)):
            # float32 products are exact, and one product a row needs no matrix.
            wants_matrix = "float32" not in name and "offset_mass" not in launch.kernel.fn.__name__
            compiled = compile_for(launch, TARGETS[target])
            what = faults(compiled, TARGETS[target], wants_matrix=wants_matrix)
            found[f"{name}, launch {number}"] = what
    return len(found), {name: what for name, what in found.items() if what}


KINDS = {
    ("biased", "everything"): 10, ("biased", "causal"): 10, ("summaries", "everything"): 33,
    ("summaries", "causal"): 10, ("suffix", "everything"): 42, ("suffix", "causal"): 40,
}  # fmt: skip
# The leaner kernels everywhere take minutes more: `make test-all` compiles them.
COMPILED = [
    pytest.param(target, *kind, marks=[] if kind[1] == "everything" else pytest.mark.full)
    for target in TARGETS
    for kind in KINDS
    if (target, kind[1]) != ("sm_90", "causal")
] + [("sm_90", *kind) for kind in KINDS if kind[1] == "causal"]


@pytest.mark.parametrize(("target", "kind", "rule"), COMPILED)
def test_attention_of_other_kinds(target, kind, rule):
    found = compiling(compile_all, target=target, kind=kind, rule=rule)
    assert found == (KINDS[kind, rule], {})


def compile_others(target):
    found = {}
    for name, call in shipped.others():
        for number, launch in enumerate(launches_of(call)):
            compiled = compile_for(launch, TARGETS[target])
            what = faults(compiled, TARGETS[target], wants_matrix=False)
            found[f"{name}, launch {number}"] = what
    assert len(found) > 40
    return {name: what for name, what in found.items() if what}


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_without_matrix_products(target):
    assert not compiling(compile_others, target=target)


def tables_are_covered():
    """Which rows of the launchers' tables of blocks were compiled: all of them?"""
    from fastlens.kernels import (
        triton_attention,
        triton_attention_summary,
        triton_suffix_attention,
    )

    compiled = {
        (torch.empty(0, dtype=dtype).element_size(), max(16, 1 << (d_head - 1).bit_length()))
        for dtype in shipped.DTYPES
        for d_head in shipped.D_HEADS
    }
    narrow = {
        (torch.empty(0, dtype=dtype).element_size(), d_head)
        for dtype in shipped.ROW_DTYPES
        for d_head in shipped.MATRIX_D_HEADS
    }
    return {
        "attention": compiled == set(triton_attention.BLOCKS),
        "with bias": narrow >= set(triton_attention.BLOCKS_WITH_BIAS),
        "summary": narrow == set(triton_attention_summary.BLOCKS),
        "suffix": narrow == set(triton_suffix_attention.BLOCKS),
        "suffix of few": narrow == set(triton_suffix_attention.BLOCKS_OF_FEW),
    }


def test_every_row_of_the_tables_of_blocks_is_compiled():
    assert all(compiling(tables_are_covered).values())


def launches_of_suffix():
    """(BLOCK_M, leaves its state, starts from one) of the launches for many rows and for one."""
    wanted = "BLOCK_M", "LEAVES_STATE", "HAS_STATE"
    return [
        [tuple(launch.arguments[name] for name in wanted) for launch in launches_of(call)]
        for call in (
            shipped.suffix_attention(64, torch.bfloat16, "everything", n_rows) for n_rows in (17, 1)
        )
    ]


def test_both_launches_of_the_suffix_kernel_are_compiled():
    many, one = compiling(launches_of_suffix)
    assert many == [(64, True, False), (64, False, True)]
    assert one == [(64, True, False), (16, False, True)]


def compile_badly():
    call = shipped.attention(128, torch.bfloat16, "everything")
    (launch,) = launches_of(call)
    greedy = launch.with_constants(BLOCK_M=128, BLOCK_N=128).with_options(num_warps=4)
    (wide,) = launches_of(shipped.attention(256, torch.float32, "causal"))
    wide = wide.with_constants(BLOCK_M=64, BLOCK_N=64).with_options(num_warps=8, num_stages=3)
    (norm,) = launches_of(next(call for name, call in shipped.others() if "norm" in name))
    target = TARGETS["sm_80"]
    return [
        faults(compile_for(kernel, target), target, wants_matrix=True)
        for kernel in (greedy, wide, norm)
    ]


def test_bad_configurations_are_caught():
    spilling, too_much_shared, no_matrix = compiling(compile_badly)
    assert any("spills" in fault for fault in spilling)
    assert any("shared memory, limit 166912" in fault for fault in too_much_shared)
    assert no_matrix == [r"no mma\.sync instruction"]


def numbers_of(target):
    (launch,) = launches_of(shipped.attention(64, torch.bfloat16, "causal"))
    return resources(compile_for(launch, TARGETS[target]))


@pytest.mark.parametrize("target", TARGETS)
def test_resources_are_read(target):
    needs = compiling(numbers_of, target=target)
    assert 32 < needs.registers <= 512 and 2**12 <= needs.shared_bytes < 2**17
