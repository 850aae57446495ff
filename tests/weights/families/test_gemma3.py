"""The language model of Gemma 3 with images."""

import json

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.errors import ConfigError
from fastlens.weights.families.gemma3 import FAMILY
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import tokens_of
from tests.weights.families.test_gemma import GemmaTests
from tests.weights.families.test_gemma3_text import GEMMA3
from tests.weights.families.tiny import random_model

VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


class TestGemma3(GemmaTests):
    family = FAMILY
    cases = {"grouped": GEMMA3, "untied": {**GEMMA3, "tie_word_embeddings": False}}

    @classmethod
    def transformers_model(cls, case):
        import transformers

        text = {"bos_token_id": 0, "eos_token_id": 1, **cls.cases[case]}
        tied = text.pop("tie_word_embeddings", True)
        config = transformers.Gemma3Config(
            text_config=text, vision_config=VISION, tie_word_embeddings=tied
        )
        return transformers.Gemma3ForConditionalGeneration._from_config(
            config, attn_implementation="eager"
        )


def test_published_configs():
    """Gemma 3 4B as it was published: what its language model does not say is the default."""
    fields = FAMILY.config_fields(
        {"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
         "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
         "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
         "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
                         "model_type": "gemma3_text", "num_hidden_layers": 34,
                         "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                         "sliding_window": 1024},
         "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"}}
    )  # fmt: skip
    assert (fields["d_model"], fields["n_heads"], fields["n_key_value_heads"]) == (2560, 8, 4)
    assert (fields["rotary_base"], fields["rotary_base_local"]) == (1e6, 1e4)
    assert (fields["rotary_scaling_factor"], fields["window_size"]) == (8.0, 1024)
    assert fields["attn_types"] == ([*["local"] * 5, "global"] * 6)[:34]
    assert (fields["d_vocab"], fields["n_ctx"]) == (262208, 131072)


@pytest.mark.parametrize(
    "stated", [{"text_config": {"surprise": 3}}, {"surprise": 3, "text_config": {}}]
)
def test_attributes_in_and_around_the_language_model_are_accounted_for(stated):
    with pytest.raises(ConfigError, match="does not account for .*surprise=3"):
        FAMILY.config_fields(stated)


def test_capped_logits_are_refused():
    """transformers does not cap them in this architecture, though the config has the attribute."""
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        FAMILY.config_fields({"text_config": {"final_logit_softcapping": 30.0}})


def test_names_on_the_hub(tmp_path):
    """Published checkpoints name the image encoder's inner model; new ones do not."""
    from safetensors.torch import load_file, save_file

    model = random_model(TestGemma3, "grouped")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name.replace("vision_tower.", "vision_tower.vision_model."): tensor
         for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
    )  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["hidden_size"] == 32
    ours = HookedTransformer.from_pretrained_no_processing(str(tmp_path), verbose=False)
    with torch.no_grad():
        gap = ours(tokens_of()) - model(tokens_of()).logits
    assert gap.abs().max() <= 1e-5


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "gemma-") == 18


@pytest.mark.tl
@pytest.mark.parametrize("case", ["grouped", "untied"])
def test_weights_are_transformerlens(case):
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    check_same_as_transformerlens(random_model(TestGemma3, case), convert_gemma_weights)
