"""BLOOM: its table against transformers and TransformerLens."""

import pytest
import torch

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.families.bloom import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import weights_of
from tests.weights.families.facts import check_aliases
from tests.weights.families.generated import FamilyTests

TINY = {"vocab_size": 60, "hidden_size": 32, "n_layer": 3, "n_head": 4}


class TestBloom(FamilyTests):
    family = FAMILY
    cases = {
        "plain": TINY,
        # 176B has 112 heads. The slopes of six are exact in float32 too.
        "six_heads": {**TINY, "hidden_size": 48, "n_head": 6, "tie_word_embeddings": False},
    }
    # transformers rounds sqrt(2 / pi) to 0.79788456; we, as TransformerLens, to 0.7978845608.
    float64_tolerance = 1e-8


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "bloom") == 10


@pytest.mark.tl
def test_weights_are_transformerlens():
    from transformer_lens.pretrained.weight_conversions import convert_bloom_weights

    model = TestBloom.transformers_model("plain")
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            TestBloom.randomise(name, parameter, torch.Generator().manual_seed(len(name)))
    source = open_source("x", hf_model=model)
    cfg = HookedTransformerConfig(**source.config_fields(), device="cpu")
    theirs = convert_bloom_weights(model, cfg)
    ours = weights_of(source)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_names_of_the_first_release():
    old = {"n_embed": 1024, "num_attention_heads": 16, "n_layer": 24, "seq_length": 2048,
           "offset_alibi": 100, "masked_softmax_fusion": True, "n_inner": None}  # fmt: skip
    fields = FAMILY.config_fields({"architectures": ["BloomForCausalLM"], **old})
    assert (fields["d_model"], fields["n_heads"], fields["d_head"]) == (1024, 16, 64)
    assert (fields["n_layers"], fields["n_ctx"], fields["d_vocab"]) == (24, 2048, 250880)


@pytest.mark.parametrize("name", ["apply_residual_connection_post_layernorm", "slow_but_exact"])
def test_other_blocks_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name}=True"):
        FAMILY.config_fields({name: True})
