"""Choosing a device, moving a model with its config; TransformerLens' own is compared with in
tests/compat/utilities."""

import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn

from fastlens import devices
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from tests.configs import tiny


class Model(nn.Module):
    def __init__(self, **cfg: Any):
        super().__init__()
        self.cfg = SimpleNamespace(device="cpu", **cfg)
        self.W = nn.Parameter(torch.ones(2))


@pytest.fixture
def apple(monkeypatch):
    """A machine whose only accelerator is Apple's GPU, which nobody has been warned of."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(devices, "_warned", set())
    monkeypatch.delenv("TRANSFORMERLENS_ALLOW_MPS", raising=False)


def test_a_model_goes_where_there_is_a_gpu(monkeypatch):
    for has_cuda, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_cuda=has_cuda: has_cuda)
        assert devices.get_device() == device
        assert HookedTransformerConfig(**tiny("gpt2", device=None)).device == device


def test_apple_only_if_asked_for(apple, monkeypatch):
    assert devices.get_device() == "cpu"
    monkeypatch.setenv("TRANSFORMERLENS_ALLOW_MPS", "1")
    assert devices.get_device() == "mps"
    assert HookedTransformerConfig(**tiny("gpt2", device=None)).device == "mps"


def test_one_warning(apple, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    with pytest.warns(UserWarning, match="MPS may compute silently wrong results"):
        devices.warn_if_mps("mps:0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        devices.warn_if_mps("mps")
        devices.warn_if_mps("cpu")


def test_torch_2_8_is_warned_of_whatever_is_allowed(apple, monkeypatch):
    monkeypatch.setenv("TRANSFORMERLENS_ALLOW_MPS", "1")
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    with pytest.warns(UserWarning, match="linear layers on MPS wrongly"):
        devices.warn_if_mps(torch.device("mps"))


def test_moving(capsys):
    model = Model(dtype=torch.float32)
    assert devices.move_to_and_update_config(model, "meta") is model
    assert model.W.is_meta and model.cfg.device == "meta"
    assert devices.move_to_and_update_config(model, torch.float64) is model
    assert model.W.dtype == model.cfg.dtype == torch.float64
    said = "Moving model to device:  meta\nChanging model dtype to torch.float64\n"
    assert capsys.readouterr().out == said
    devices.move_to_and_update_config(model, torch.float32, print_details=False)
    assert capsys.readouterr().out == ""
    # A config without a dtype does not get one.
    model = Model()
    devices.move_to_and_update_config(model, torch.float64, print_details=False)
    assert model.W.dtype == torch.float64 and not hasattr(model.cfg, "dtype")


@pytest.mark.parametrize("place", ["cuda:99", torch.int32])
def test_a_move_that_fails_leaves_the_config_alone(place):
    model = Model(dtype=torch.float32)
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        devices.move_to_and_update_config(model, place, print_details=False)
    assert (model.cfg.device, model.cfg.dtype) == ("cpu", torch.float32)


def test_a_dtype_in_second_place_is_not_dropped():
    move: Any = devices.move_to_and_update_config
    # Under pytest its annotation refuses it first.
    with pytest.raises(Exception, match=r"float64"):
        move(Model(dtype=torch.float32), "cpu", torch.float64)
    with pytest.raises(ConfigError, match=r"model\.to\('cpu'\)\.to\(torch\.float64\)"):
        inspect.unwrap(move)(Model(dtype=torch.float32), "cpu", torch.float64)


def test_the_number_of_a_device_is_kept(monkeypatch):
    """TransformerLens writes "cuda" for `torch.device("cuda", 1)`."""
    moved = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moved.append(device))
    model = Model()
    devices.move_to_and_update_config(model, torch.device("cuda", 1), print_details=False)
    assert model.cfg.device == "cuda:1" and moved == [torch.device("cuda", 1)]


def test_a_device_has_its_number():
    one = torch.device("cuda", 1)
    for said in (1, "cuda:1", one):
        assert devices.device_of(said) == one
    assert devices.device_of("cuda") == torch.device("cuda", 0)
    assert devices.device_of("cpu") == torch.device("cpu")
    for wrong, error in ((True, TypeError), ("gpu", RuntimeError)):
        with pytest.raises(error):
            devices.device_of(wrong)


def test_layers_are_spread_in_equal_runs():
    found = [devices.block_device(n, 5, 2, "cuda:1").index for n in range(5)]
    assert found == [1, 1, 1, 2, 2]
    assert devices.block_device(4, 5, 2, "cpu") == torch.device("cpu")
    assert devices.block_device(4, 5, 2, None) == torch.device("cpu")
