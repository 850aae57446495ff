"""Which compute capability kernels are chosen by."""

import pytest
import torch

from fastlens.kernels.capability import capability, supposing
from fastlens.ops import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))


def test_it_is_the_devices_own(a_gpu):
    assert capability(CUDA) == (8, 6) and capability(CPU) is None


def test_there_is_none_without_a_gpu_of_nvidias(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert capability(CUDA) is None
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert capability(CUDA) is None


def test_one_may_be_supposed(a_gpu):
    with supposing((9, 0)):
        assert capability(CUDA) == (9, 0) and capability(CPU) is None
        with pytest.raises(ZeroDivisionError), supposing((7, 5)):
            assert capability(CUDA) == (7, 5)
            1 / 0  # noqa: B018
        assert capability(CUDA) == (9, 0)
    assert capability(CUDA) == (8, 6)


def test_dispatch_refuses_by_it(monkeypatch):
    monkeypatch.setenv("FASTLENS_TRITON", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with supposing((9, 0)):
        assert dispatch.explain("attention", CUDA).kernel == "triton attention"
    with supposing((7, 5)):
        refused = dispatch.explain("attention", CUDA).refused
    assert "compute capability is 7.5" in refused["triton attention"]
