"""What every `from_pretrained` does first. More of it in test_pretrained.py."""

import pytest
import torch

from fastlens.errors import ConfigError
from fastlens.model.open_model import open_model
from tests.encoders import hf_bert
from tests.weights.checkpoints import hf_model


def test_config_with_changes():
    source, cfg, verbose = open_model(
        "HookedTransformer",
        "tiny",
        {"verbose": False, "torch_dtype": torch.bfloat16},
        hf_model=hf_model("gpt2"),
        device="cpu",
        first_n_layers=2,
        n_ctx=16,
        default_prepend_bos=False,
    )
    assert (cfg.n_layers, cfg.n_ctx, cfg.dtype, cfg.default_prepend_bos) == (
        2, 16, torch.bfloat16, False,
    )  # fmt: skip
    assert not verbose and source.family is not None and source.family.name == "gpt2"
    assert not cfg.init_weights


def test_each_class_loads_its_own_families():
    assert open_model("HookedEncoder", "tiny", {}, hf_model=hf_bert()).verbose
    for class_name, model in (
        ("HookedTransformer", hf_bert()),
        ("HookedEncoder", hf_model("neox")),
    ):
        with pytest.raises(ConfigError, match=f"{class_name} was asked to load 'tiny', which is a"):
            open_model(class_name, "tiny", {}, hf_model=model)
    # By name, before anything is fetched.
    with pytest.raises(ConfigError, match=r"bert model\. Use HookedEncoder\.from_pretrained"):
        open_model("HookedTransformer", "google-bert/bert-base-cased", {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"revison": "x"}, "Nearest: 'revision'"),
        ({"load_in_4bit": True}, "load_in_4bit=True was asked"),
        ({"torch_dtype": "float31"}, "must be one of"),
    ],
)
def test_options_are_known(options, words):
    with pytest.raises(ConfigError, match=words):
        open_model("HookedTransformer", "tiny", options, hf_model=hf_model("gpt2"))


def test_a_checkpoint_is_given_once():
    with pytest.raises(ConfigError, match="two names of one thing"):
        open_model("HookedTransformer", "x", {}, checkpoint_value=1, checkpoint_label=1)
    with pytest.raises(ConfigError, match="together with a checkpoint"):
        open_model("HookedTransformer", "pythia-70m", {"revision": "x"}, checkpoint_value=1000)
