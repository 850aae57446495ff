"""Triton's own launch path, up to the driver that is not there, a process for each target."""

import pytest
import torch

from tests.gpu import shipped
from tests.gpu.ahead_of_time import TARGETS, assembly, compile_for
from tests.gpu.fake_driver import warm_up
from tests.gpu.launches import launches_of
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.workers import alone

pytestmark = NEEDS_TRITON


def calls():
    yield "attention", shipped.attention(64, torch.bfloat16, "causal")
    yield "attention with all", shipped.attention(80, torch.float16, "everything")
    bias = shipped.attention(64, torch.bfloat16, "everything", is_biased=True)
    yield "attention with a bias", bias
    yield "summary", shipped.summary(64, torch.bfloat16, "everything")
    yield "suffix", shipped.suffix_attention(64, torch.bfloat16, "everything", 17)
    yield "suffix of few rows", shipped.suffix_attention(64, torch.bfloat16, "causal", 1)
    wanted = ("pattern_rows 80 everything", "layer_norm 768", "rms_norm 64", "rotary 80")
    yield from (pair for pair in shipped.others() if pair[0].startswith(wanted))


def bound(target):
    """For each launch: whether the JIT compiles the very code that was compiled ahead of time."""
    same = {}
    for name, call in calls():
        for number, launch in enumerate(launches_of(call)):
            kernel = warm_up(launch, target)
            proven = assembly(compile_for(launch, TARGETS[target]))
            same[f"{name}, launch {number}"] = assembly(kernel) == proven
    return same


@pytest.mark.parametrize("target", TARGETS)
def test_the_jit_binds_and_compiles_what_was_proven(target):
    same = alone(bound, target=target)
    assert len(same) >= 16 and all(same.values()), same


def bind_wrongly():
    """Not what the launcher gives: a name too few, and a block that is no power of two."""
    (launch,) = launches_of(shipped.attention(64, torch.bfloat16, "causal"))
    said = []
    fewer = {name: value for name, value in launch.arguments.items() if name != "scale"}
    for arguments in (fewer, {**launch.arguments, "BLOCK_N": 48}):
        broken = type(launch)(launch.kernel, launch.grid, arguments, launch.options)
        try:
            warm_up(broken, "sm_80")
            said.append("")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_wrong_launches_are_caught():
    missing, block = alone(bind_wrongly)
    assert "scale" in missing and block, (missing, block)


def launch_for_real():
    """The whole public call on a machine without a GPU."""
    try:
        shipped.attention(64, torch.bfloat16, "causal")()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is here")
def test_without_a_driver_a_launch_is_an_error_and_not_silence():
    assert "active drivers" in alone(launch_for_real)
