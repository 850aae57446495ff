"""Dispatch: the best kernel that does not refuse, and the reasons of those that do."""

import inspect

import pytest
import torch

from fastlens.errors import FastlensError
from fastlens.kernels import reference
from fastlens.kernels.kernel import Kernel
from fastlens.ops import dispatch


def test_every_op_has_a_reference_and_a_kernel():
    assert set(dispatch.kernels()) >= {"attention", "layer_norm", "rms_norm", "rotary"}
    for op in dispatch.kernels():
        assert callable(getattr(reference, op))


def test_each_reference_is_called_as_its_kernels_are():
    def parameters(fn):
        return [(p.name, p.default, p.kind) for p in inspect.signature(fn).parameters.values()]

    for op, kernels in dispatch.kernels().items():
        specified = parameters(getattr(reference, op))
        for kernel in kernels:
            found = parameters(kernel.fn)
            assert found[: len(specified)] == specified, (op, kernel.name)
            # What one kernel takes beside, it can do without.
            assert all(default is not inspect._empty for _, default, _ in found[len(specified) :])


def test_a_refusing_kernel_is_passed_over_and_its_sentence_kept(monkeypatch):
    table = dict(dispatch.kernels())
    table["rotary"] = [
        Kernel("rotary", "fast", lambda: 1, lambda device, dtype: "needs a card", 99),
        Kernel("rotary", "slow", lambda: 2, lambda device, dtype: None),
    ]
    monkeypatch.setattr(dispatch, "kernels", lambda: table)
    choice = dispatch.explain("rotary")
    assert (choice.kernel, choice.refused) == ("slow", {"fast": "needs a card"})
    assert dispatch.choose("rotary", "cpu", torch.float32)() == 2
    table["rotary"] = table["rotary"][:1]
    assert dispatch.choose("rotary", "cpu", torch.float32) is reference.rotary
    assert dispatch.explain("rotary").kernel.startswith("reference")


def test_an_unknown_op_has_near_names():
    with pytest.raises(FastlensError, match="Nearest: 'attention'"):
        dispatch.explain("atention")
