"""``convert_*_weights`` load into a model; values: tests/compat/calls/loading.py."""

import pytest
import torch

from fastlens import HookedTransformer, HookedTransformerConfig
from fastlens.compat import weight_conversions
from fastlens.errors import WeightsError
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.weights.checkpoints import hf_model, prompt

FUNCTIONS = {"gpt2": "gpt2", "neox": "neox", "llama_grouped": "llama", "mistral_plain": "mistral"}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_the_model_computes_what_transformers_does(case):
    source = open_source("x", hf_model=hf_model(case))
    cfg = HookedTransformerConfig(**{**source.config_fields(), "device": "cpu"})
    convert = getattr(weight_conversions, f"convert_{FUNCTIONS[case]}_weights")
    model = HookedTransformer(cfg)
    tensors = convert(hf_model(case), cfg)
    model.load_state_dict(model.fill_missing_keys(tensors))
    with torch.no_grad():
        want = hf_model(case)(prompt()).logits
    assert_close_to(model(prompt()), want, atol=1e-4)
    biases = [key for key in dict(model.named_parameters()) if ".b_" in key or "._b_" in key]
    assert biases and set(biases) <= set(tensors)


def test_another_family_is_refused():
    cfg = HookedTransformerConfig(
        **{**open_source("x", hf_model=hf_model("gpt2")).config_fields(), "device": "cpu"}
    )
    with pytest.raises(WeightsError, match="a llama model was asked, but GPT2LMHeadModel"):
        weight_conversions.convert_llama_weights(hf_model("gpt2"), cfg)
