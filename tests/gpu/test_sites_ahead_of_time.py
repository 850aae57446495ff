"""The kernels on sites and packed weights, compiled for four architectures and bound by the JIT."""

import re

import pytest

from tests.gpu import shipped_sites
from tests.gpu.ahead_of_time import TARGETS, assembly, compile_for, faults
from tests.gpu.fake_driver import warm_up
from tests.gpu.launches import launches_of
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.workers import alone, compiling

pytestmark = NEEDS_TRITON


def compile_all(target, kind):
    found = {}
    for name, call in getattr(shipped_sites, kind)():
        (launch,) = launches_of(call)
        assert launch.options["enable_fp_fusion"] is False, name
        compiled = compile_for(launch, TARGETS[target])
        found[name] = faults(compiled, TARGETS[target], wants_matrix=False)
    assert len(found) > 12
    return {name: what for name, what in found.items() if what}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["patching", "capturing", "unpacking"])
def test_without_spills_and_within_limits(target, kind):
    assert not compiling(compile_all, target=target, kind=kind)


def compile_badly():
    """A block of 64 times as many elements, and a product that is fused."""
    calls = shipped_sites.by_name()
    target = TARGETS["sm_80"]
    (mean,) = launches_of(calls["patch_sites_ mean 4096 torch.float32"])
    greedy = compile_for(mean.with_constants(BLOCK_ROWS=64), target)
    (packed,) = launches_of(calls["dequantize Q4_1 torch.float32"])
    texts = [
        assembly(compile_for(launch, target))
        for launch in (packed, packed.with_options(enable_fp_fusion=True))
    ]
    return faults(greedy, target, wants_matrix=False), texts


def test_bad_configurations_are_caught():
    spills, (apart, fused) = compiling(compile_badly)
    assert any("spills" in fault for fault in spills)
    # What the flag is there for: with it, the minimum would be added before the product is rounded.
    multiply_add = re.compile(r"\bfma\.rn")
    assert multiply_add.search(fused) and not multiply_add.search(apart)


def bound(target):
    """For each kernel: whether the JIT compiles the very code that was compiled ahead of time."""
    calls = shipped_sites.by_name()
    same = {}
    for name in (
        "patch_sites_ add 64 torch.float16",
        "patch_sites_ mean 4096 torch.float32",
        "patch_sites_ zero 1 torch.bfloat16",
        "capture 64 torch.bfloat16 torch.float32",
        "capture_int8 4096 torch.float16",
        "capture_int8 strided",
        "dequantize Q4_1 torch.bfloat16",
        "dequantize int8 64 torch.float32",
    ):
        (launch,) = launches_of(calls[name])
        kernel = warm_up(launch, target)
        same[name] = assembly(kernel) == assembly(compile_for(launch, TARGETS[target]))
    return same


@pytest.mark.parametrize("target", TARGETS)
def test_the_jit_binds_and_compiles_what_was_proven(target):
    same = alone(bound, target=target)
    assert len(same) == 8 and all(same.values()), same


def bind_wrongly():
    (launch,) = launches_of(shipped_sites.by_name()["capture strided"])
    said = []
    fewer = {name: value for name, value in launch.arguments.items() if name != "step"}
    for arguments in (fewer, {**launch.arguments, "BLOCK_D": 48}):
        try:
            warm_up(type(launch)(launch.kernel, launch.grid, arguments, launch.options), "sm_80")
            said.append("")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_wrong_launches_are_caught():
    missing, block = alone(bind_wrongly)
    assert "step" in missing and block, (missing, block)
