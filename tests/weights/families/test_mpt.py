"""MPT: its table against transformers."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.mpt import FAMILY
from tests.weights.families.generated import FamilyTests

TINY = {"vocab_size": 60, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}


class TestMpt(FamilyTests):
    family = FAMILY
    cases = {
        "plain": TINY,
        "clipped": {**TINY, "attn_config": {"clip_qkv": 0.4, "softmax_scale": 0.25}},
        "six_heads": {**TINY, "d_model": 48, "n_heads": 6, "tie_word_embeddings": False},
    }


def test_the_clip_clips():
    """The clipped case shows something: without the clip it is another model."""
    import torch

    from tests.weights.families.generated import tokens_of

    model = TestMpt().load("clipped")
    with torch.no_grad():
        clipped = model(tokens_of())
        model.cfg.clip_qkv = None
        assert (model(tokens_of()) - clipped).abs().max() > 1e-2


@pytest.mark.parametrize(
    "stated",
    [
        {"alibi": False},
        {"alibi_bias_max": 16},
        {"qk_ln": True},
        {"attn_type": "multiquery_attention"},
        {"prefix_lm": True},
        {"kv_n_heads": 2},
    ],
)
def test_attention_that_transformers_does_not_compute_is_refused(stated):
    ((name, value),) = stated.items()
    with pytest.raises(ConfigError, match=f"attn_config.{name}={value!r}"):
        FAMILY.config_fields({"attn_config": stated})
    with pytest.raises(ConfigError, match="norm_type='rmsnorm'"):
        FAMILY.config_fields({"norm_type": "rmsnorm"})


def test_the_hub_config():
    """What the repositories' config.json hold besides."""
    theirs = {
        "architectures": ["MPTForCausalLM"],
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "triton", "attn_pdrop": 0,
                        "attn_type": "multihead_attention", "attn_uses_sequence_id": False,
                        "clip_qkv": None, "prefix_lm": False, "qk_ln": False,
                        "softmax_scale": None},
        "d_model": 4096, "n_heads": 32, "n_layers": 32, "no_bias": True, "verbose": 0,
        "init_config": {"name": "kaiming_normal_"}, "logit_scale": None, "expansion_ratio": 4,
    }  # fmt: skip
    fields = FAMILY.config_fields(theirs)
    assert (fields["d_head"], fields["clip_qkv"], fields["n_ctx"]) == (128, None, 2048)
