"""ModernBERT: against transformers; windows, configs of old versions, refusals."""

import pytest
import torch

from fastlens.errors import ConfigError, WeightsError
from fastlens.model.hooked_encoder import HookedEncoder
from fastlens.weights.families.modernbert import FAMILY
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.weights.checkpoints import edit_config
from tests.weights.families.generated_encoders import TINY, EncoderTests, loaded, small

MODERN = {
    **TINY, "local_attention": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip


class TestModernBert(EncoderTests):
    family = FAMILY
    cases = {
        "released": MODERN,
        "all biases, other layers": {
            **MODERN, "norm_bias": True, "attention_bias": True, "mlp_bias": True,
            "classifier_bias": True, "decoder_bias": False, "classifier_activation": "relu",
            "hidden_activation": "silu", "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 300.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    }  # fmt: skip

    @classmethod
    def is_zero(cls, name):
        return name.endswith("mlp.Wi.bias")


@torch.no_grad()
def test_long_texts():
    """More tokens than one block of query rows has."""
    model = loaded(small(TestModernBert, "released"))
    theirs = small(TestModernBert, "released")
    tokens = torch.randint(5, 50, (2, 1100), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 700:] = 0
    real = mask.bool()
    got = model(tokens, one_zero_attention_mask=mask)
    want = theirs(tokens, attention_mask=mask).logits
    assert_close_to(got[real], want[real])


@torch.no_grad()
def test_configs_of_old_versions(tmp_path):
    theirs = small(TestModernBert, "released")
    theirs.config.rope_parameters["full_attention"]["rope_theta"] = 300.0
    theirs = type(theirs)(theirs.config).eval()
    theirs.save_pretrained(tmp_path)
    edit_config(
        tmp_path, layer_types=None, rope_parameters=None, global_attn_every_n_layers=3,
        global_rope_theta=300.0, local_rope_theta=10000.0, layer_norm_eps=1e-5,
        position_embedding_type="absolute", repad_logits_with_grad=False, reference_compile=True,
    )  # fmt: skip
    model = HookedEncoder.from_pretrained(str(tmp_path), verbose=False)
    assert model.cfg.attn_types == ["global", "local", "local"] and model.cfg.window_size == 3
    tokens = torch.arange(5, 25)[None]
    assert_close_to(model(tokens), theirs(tokens).logits)


def test_biases_inside_a_gated_mlp_are_refused():
    theirs = small(TestModernBert, "all biases, other layers")
    with torch.no_grad():
        theirs.model.layers[0].mlp.Wi.bias.fill_(0.1)
    with pytest.raises(WeightsError, match="biases that are not zero"):
        loaded(theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_att"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type='yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "are scaled"),
        ({"rope_parameters": None, "global_rope_theta": None}, "global_rope_theta is null"),
    ],
)
def test_others_are_refused(change, words):
    config = {**small(TestModernBert, "released").config.to_dict(), **change}
    with pytest.raises(ConfigError, match=words):
        FAMILY.config_fields(config)


def test_the_parts_it_has():
    model = loaded(small(TestModernBert, "released"))
    assert "blocks.0.ln1.w" not in model.state_dict() and "blocks.1.ln1.w" in model.state_dict()
    assert "ln_final.hook_scale" in model.hook_dict
    with pytest.raises(AttributeError, match="W_pos: this kind of encoder has none"):
        model.W_pos  # noqa: B018
    with pytest.raises(AttributeError, match="no sum of what its components wrote"):
        model.accumulated_bias  # noqa: B018
    assert open_source("x", hf_model=small(TestModernBert, "released")).family is FAMILY
