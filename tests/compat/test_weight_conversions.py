"""``convert_*_weights`` load into a model; more values: tests/compat/calls/loading.py."""

import copy
import importlib
import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch

from fastlens import HookedTransformer, HookedTransformerConfig
from fastlens.compat import weight_conversions
from fastlens.errors import WeightsError
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.weights.checkpoints import hf_model, prompt
from tests.weights.families.test_mingpt import CONFIG as MINGPT
from tests.weights.families.test_mingpt import weights_of_mingpt
from tests.weights.families.test_qwen import CONFIG as QWEN
from tests.weights.families.test_qwen import as_modules
from tests.weights.families.test_qwen import weights as qwen_weights
from tests.weights.families.tiny import random_model
from tests.weights.toys import SIZES, random_weights

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


# -- every other converter, against TransformerLens' ----------------------------------------------

# Converter -> class of generated tests, and one of its cases.
MODELS = {
    "apertus": "test_apertus.TestApertus.grouped",
    "bloom": "test_bloom.TestBloom",
    "coder": "test_santacoder.TestSantaCoder.plain",
    "gemma": "test_gemma2.TestGemma2.grouped",
    "gpt_oss": "test_gpt_oss.TestGptOss.grouped",
    "gptj": "test_gptj.TestGptJ",
    "mixtral": "test_mixtral.TestMixtral.grouped",
    "neo": "test_gpt_neo.TestGptNeo",
    "olmo": "test_olmo.TestOlmo.full",
    "olmo2": "test_olmo2.TestOlmo2.full",
    "olmo3": "test_olmo3.TestOlmo3.grouped",
    "olmoe": "test_olmoe.TestOlmoe.full",
    "opt": "test_opt.TestOpt",
    "phi": "test_phi.TestPhi",
    "phi3": "test_phi3.TestPhi3.grouped",
    "qwen2": "test_qwen2.TestQwen2.grouped",
    "qwen3": "test_qwen3.TestQwen3.grouped",
}
OTHERS = ("qwen", "mingpt", "nanogpt", "nanogpt_biased", "neel_solu_old")
COMPARED = [
    f"transformer_lens.pretrained.weight_conversions.convert_{name}_weights"
    for name in (*MODELS, *OTHERS)
    if name != "nanogpt_biased"
]


def check_alike(ours: dict, theirs: dict) -> None:
    """The same tensors; either may leave out what is zero, and TransformerLens adds a mask."""
    constants = ("IGNORE", ".mask", "act_fn.beta", "act_fn.eps")
    left = {name: t for name, t in theirs.items() if not name.endswith(constants)}
    for name, tensor in ours.items():
        if not name.endswith(constants):
            want = left.pop(name, torch.zeros_like(tensor))
            # Scalars of an activation are [1] in files.
            assert torch.equal(tensor, want.reshape(tensor.shape)), name
    assert not any(tensor.count_nonzero() for tensor in left.values()), list(left)


def both(name: str, cfg: HookedTransformerConfig, *given: Any) -> tuple[dict, dict]:
    """What the two converters make of the same model or state dict."""
    theirs = pytest.importorskip("transformer_lens.pretrained.weight_conversions")
    lens = pytest.importorskip("transformer_lens")
    known = {field.name for field in fields(lens.HookedTransformerConfig)}
    values = {name: value for name, value in vars(cfg).items() if name in known}
    function = f"convert_{name}_weights"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        their_cfg = lens.HookedTransformerConfig(**values)
        want = getattr(theirs, function)(*copy.deepcopy(given), their_cfg)
    return getattr(weight_conversions, function)(*given, cfg), want


@pytest.mark.tl
@pytest.mark.parametrize("name", MODELS)
def test_converters_of_models(name):
    module, tests, *case = MODELS[name].split(".")
    tests = getattr(importlib.import_module(f"tests.weights.families.{module}"), tests)
    model = random_model(tests, case[0] if case else next(iter(tests.cases)))
    found = open_source("x", hf_model=model).config_fields()
    check_alike(*both(name, HookedTransformerConfig(**found, device="cpu"), model))


class QWenLMHeadModel:
    """As much of the remote class as the converters look at."""

    def __init__(self):
        built = as_modules(qwen_weights())
        self.transformer, self.lm_head = built.transformer, built.lm_head
        self.config = self

    def to_dict(self) -> dict[str, Any]:
        return dict(QWEN)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: tensor.double() for name, tensor in qwen_weights().items()}


def nanogpt(biased: bool) -> dict[str, torch.Tensor]:
    """A state dict of nanoGPT, compiled if it has biases."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"transformer.wte": (60, 32), "transformer.wpe": (24, 32), "transformer.ln_f": (32,)}
    for layer in range(2):
        h = f"transformer.h.{layer}."
        shapes |= {f"{h}ln_1": (32,), f"{h}ln_2": (32,), f"{h}attn.c_attn": (96, 32),
                   f"{h}attn.c_proj": (32, 32), f"{h}mlp.c_fc": (48, 32),
                   f"{h}mlp.c_proj": (32, 48)}  # fmt: skip
    found = {}
    for name, shape in {**shapes, "lm_head": (60, 32)}.items():
        prefix = "_orig_mod." if biased else ""
        found[f"{prefix}{name}.weight"] = torch.randn(shape, generator=generator)
        if (biased and ".h." in name) or (biased and "ln_f" in name):
            found[f"{prefix}{name}.bias"] = torch.randn(shape[0], generator=generator)
    return found


@pytest.mark.tl
@pytest.mark.parametrize("name", OTHERS)
def test_converters_of_state_dicts(name):
    sizes = {name: value for name, value in SIZES.items() if name != "normalization"}
    sizes |= {"d_mlp": 128} if name == "mingpt" else {}
    cfg = HookedTransformerConfig(**sizes, device="cpu")
    if name == "qwen":
        found = open_source("x", hf_model=QWenLMHeadModel()).config_fields()
        cfg = HookedTransformerConfig(**found, device="cpu", dtype=torch.float64)
        given: Any = QWenLMHeadModel()
    elif name == "mingpt":
        assert cfg.n_ctx == MINGPT["n_ctx"]
        given = weights_of_mingpt()
    elif name == "neel_solu_old":
        weights = random_weights({**SIZES, "n_layers": 2})
        given = {
            # As they were called and lay.
            key.replace("ln_final", "norm").replace("ln", "norm"): t.mT if "W_" in key else t
            for key, t in weights.items()
        }
    else:
        given = nanogpt(biased=name.endswith("biased"))
    ours, theirs = both(name.removesuffix("_biased"), cfg, given)
    check_alike(ours, theirs)
    assert set(ours) >= {"embed.W_E", "blocks.1.attn.W_Q", "unembed.W_U"}
