"""What hooked models share: flags, caches, moving. More of it in the tests of each model."""

import pytest
import torch
import torch.nn as nn

from fastlens.cache import ActivationCache
from fastlens.config import HookedTransformerConfig
from fastlens.errors import FlagError, TokenError
from fastlens.hooks.point import HookPoint
from fastlens.model.root import FLAG_OF_PLACE, TransformerRoot, named_tokenizer
from tests.configs import tiny


class Small(TransformerRoot):
    """One weight, and one place that a flag switches."""

    def __init__(self):
        super().__init__()
        self.cfg = HookedTransformerConfig(**tiny("gpt2"))
        self.w = nn.Parameter(torch.ones(3))
        self.hook_result = HookPoint("batch d_model")
        self.setup()

    def forward(self, x):
        return self.hook_result(x * self.w) if self.cfg.use_attn_result else x * self.w


X = torch.ones(2, 3)


def test_a_named_place_is_switched_on_for_one_run():
    model = Small()
    assert model.required_flag("blocks.0.attn.hook_result") == "use_attn_result"
    assert model.is_switched_off("hook_result")
    _, cache = model.run_with_cache(X, names_filter="hook_result")
    assert type(cache) is ActivationCache and list(cache) == ["hook_result"]
    assert not model.cfg.use_attn_result
    _, plain = model.run_with_cache(X, return_cache_object=False)
    assert plain == {}
    with pytest.raises(FlagError, match="use_attn_result is False"):
        model.add_hook("hook_result", lambda x, hook: None)


def test_every_flag_is_a_config_field():
    assert all(hasattr(Small().cfg, flag) for flag in FLAG_OF_PLACE.values())


def test_moving_keeps_the_config_in_step(capsys):
    model = Small()
    assert model.to(torch.float64) is model and model.cfg.dtype == model.w.dtype == torch.float64
    model.cpu()
    assert model.cfg.device == "cpu"
    said = capsys.readouterr().out
    assert said == "Changing model dtype to torch.float64\nMoving model to device:  cpu\n"
    for name in ("bfloat16", "half", "float", "double"):
        assert getattr(model, name)() is model and model.cfg.dtype == model.w.dtype
    assert capsys.readouterr().out == ""


def test_a_tokenizer_that_is_nowhere(tmp_path):
    with pytest.raises(TokenError, match="gave no tokenizer"):
        named_tokenizer(str(tmp_path))
