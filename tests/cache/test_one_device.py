"""A cache over several devices read as on one; with models in tests/model/test_device_map.py."""

from types import SimpleNamespace

import pytest
import torch

from fastlens.cache.activations import Activations
from fastlens.cache.one_device import device_of_sums, sums_on_one_device
from fastlens.errors import HookNameError
from tests.gpu.pretend_cuda import pretend_cuda

NAMES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


class Summing(Activations):
    @sums_on_one_device
    def total(self, more, *, scale=1.0):
        """The sum of both, and where it was made."""
        return (self["resid_post", 0] + self[NAMES[1]] + more) * scale

    @sums_on_one_device
    def put(self, name):
        """What has no name yet."""
        return self[name]


@pytest.fixture(autouse=True)
def gpus():
    with pretend_cuda(triton=False, n_devices=2) as made:
        yield made


def cache_on(*devices, placement=True):
    cfg = SimpleNamespace(device="cuda:1", n_layers=2)
    model = SimpleNamespace(cfg=cfg, placement=placement or None)
    held = {name: torch.ones(2).to(device) for name, device in zip(NAMES, devices, strict=True)}
    return Summing(held, model)


def test_what_lies_on_several_is_read_on_the_models_first():
    cache = cache_on("cuda:0", "cuda:1")
    assert device_of_sums(cache) == torch.device("cuda:1")
    total = cache.total(torch.ones(2).to("cuda:0"), scale=torch.ones(2).to("cuda:0") * 2)
    assert total.device == torch.device("cuda:1") and total.cpu().tolist() == [6.0, 6.0]
    # The entries stay where they are.
    assert cache[NAMES[0]].device == torch.device("cuda:0")
    with pytest.raises(HookNameError, match="hook_resid_mid"):
        cache.put("blocks.0.hook_resid_mid")


def test_what_lies_on_one_stays_there():
    cache = cache_on("cpu", "cpu")
    assert device_of_sums(cache) is None and cache.total(1.0).device.type == "cpu"
    cache = cache_on("cuda:0", "cuda:0")
    assert device_of_sums(cache) is None and cache.total(1.0).device == torch.device("cuda:0")


def test_a_model_on_one_device_is_not_asked():
    cache = cache_on("cuda:0", "cuda:1", placement=False)
    assert device_of_sums(cache) is None
    with pytest.raises(RuntimeError, match="two devices, cuda:0 and cuda:1"):
        cache.total(1.0)
