"""T5: v1.0, v1.1 and Flan; what transformers 5 changed in configs; what is refused."""

import json

import pytest
import torch

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, WeightsError
from fastlens.weights.families.t5 import FAMILY
from fastlens.weights.source import open_source
from tests.t5 import CASES, hf_t5
from tests.weights.checkpoints import edit_config, weights_of
from tests.weights.families.facts import check_aliases

COMPARED = ["transformer_lens.pretrained.weight_conversions.convert_t5_weights"]


@pytest.fixture
def folder(tmp_path):
    def save(case="t5", **changes):
        hf_t5(case).save_pretrained(tmp_path)
        edit_config(tmp_path, **changes)
        return tmp_path

    return save


def fields(**config):
    return FAMILY.config_fields({"architectures": ["T5ForConditionalGeneration"], **config})


def test_defaults_are_transformers():
    import transformers

    defaults = transformers.T5Config().to_dict()
    # T5 has no last position; old configs state the length it was trained on.
    ours = {theirs: default for theirs, (_, default) in FAMILY.config.items()}
    assert ours.pop("n_positions") == 512
    assert ours == {theirs: defaults[theirs] for theirs in ours}
    derived = fields()
    assert (derived["act_fn"], derived["gated_mlp"]) == (defaults["dense_act_fn"], False)
    assert derived["tie_word_embeddings"] is defaults["scale_decoder_outputs"] is True
    assert derived["decoder_start_token_id"] == defaults["pad_token_id"] == 0


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "t5-small", "t5-base", "t5-large") >= 6


@pytest.mark.tl
def test_weights_are_transformerlens():
    pytest.importorskip("transformer_lens")
    from transformer_lens.pretrained.weight_conversions import convert_t5_weights

    source = open_source("x", hf_model=hf_t5())
    theirs = convert_t5_weights(
        hf_t5(), HookedTransformerConfig(**source.config_fields(), device="cpu")
    )
    ours = weights_of(source)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("case", list(CASES))
def test_a_folder_and_a_model_in_memory_are_the_same(case, folder):
    live, stored = open_source("x", hf_model=hf_t5(case)), open_source(folder(case))
    ours = {"model_name", "tokenizer_name"}
    assert {k: v for k, v in live.config_fields().items() if k not in ours} == {
        k: v for k, v in stored.config_fields().items() if k not in ours
    }
    weights = weights_of(live)
    for name, tensor in weights_of(stored).items():
        assert torch.equal(weights.pop(name), tensor), name
    assert not weights


@pytest.mark.parametrize(
    ("stated", "act_fn", "is_gated"),
    [("relu", "relu", False), ("gelu", "gelu", False), ("gated-gelu", "gelu_new", True),
     ("gated-silu", "silu", True), ("gated-relu", "relu", True)],
)  # fmt: skip
def test_the_mlp_is_transformers(stated, act_fn, is_gated):
    """From old configs, which say only this, and from new ones, which say all."""
    import transformers

    theirs = transformers.T5Config(feed_forward_proj=stated)
    assert (theirs.dense_act_fn, theirs.is_gated_act) == (act_fn, is_gated)
    for config in ({"feed_forward_proj": stated}, theirs.to_dict()):
        found = fields(**config)
        assert (found["act_fn"], found["gated_mlp"]) == (act_fn, is_gated)


@pytest.mark.parametrize(
    ("config", "is_scaled"),
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        # As transformers 5 writes it: it ties all of them.
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, True),
    ],
)
def test_the_scale_of_the_output_is_transformers(config, is_scaled):
    import transformers

    assert transformers.T5Config(**config).scale_decoder_outputs is is_scaled
    assert fields(**config)["tie_word_embeddings"] is is_scaled


def test_an_old_config_of_a_gated_model(folder):
    """google/t5-v1_1's says no more than this."""
    path = folder("untied", is_gated_act=None, dense_act_fn=None, scale_decoder_outputs=None,
                  tie_word_embeddings=False, n_positions=99)  # fmt: skip
    source = open_source(path)
    assert source.config_fields()["n_ctx"] == 99
    weights = weights_of(source)
    assert torch.equal(weights["unembed.W_U"].T, hf_t5("untied").lm_head.weight)
    assert not torch.equal(weights["unembed.W_U"].T, weights["embed.W_E"])
    wi_0 = hf_t5("untied").decoder.block[1].layer[2].DenseReluDense.wi_0.weight
    assert torch.equal(weights["decoder.1.mlp.W_gate"], wi_0.T)


def state(case="t5"):
    return {name: tuple(tensor.shape) for name, tensor in hf_t5(case).state_dict().items()}


def test_the_bias_that_no_model_reads_is_dropped():
    extra = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (8, 4)}
    plan = FAMILY.plan({**state(), **extra}, hf_t5().config.to_dict())
    assert not any("EncDec" in name and "bias" in name for g in plan.values() for name, *_ in g)
    other = {"decoder.block.1.layer.1.EncDecAttention.relative_attention_bias.weight": (8, 4)}
    with pytest.raises(WeightsError, match=r"unknown: decoder\.block\.1"):
        FAMILY.plan({**state(), **other}, hf_t5().config.to_dict())


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("shared.weight", r"missing: shared\.weight"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
         r"missing: encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias"),
        ("decoder.block.1.layer.1.EncDecAttention.k.weight", r"missing: decoder\.block\.1.*k"),
        ("decoder.block.1.layer.2.DenseReluDense.wi.weight", r"missing: decoder\.block\.1.*wi\."),
        ("encoder.final_layer_norm.weight", r"missing: encoder\.final_layer_norm"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(missing, says):
    shapes = {name: shape for name, shape in state().items() if name != missing}
    with pytest.raises(WeightsError, match=says):
        FAMILY.plan(shapes, hf_t5().config.to_dict())


def test_weights_and_config_of_two_models_are_refused():
    with pytest.raises(WeightsError, match=r"unknown: .*wi_0"):
        FAMILY.plan(state("gated-silu"), hf_t5().config.to_dict())
    with pytest.raises(WeightsError, match=r"missing: .*wi_0"):
        FAMILY.plan(state(), hf_t5("gated-silu").config.to_dict())
    with pytest.raises(WeightsError, match="unknown: .*attention_bias"):
        bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
        FAMILY.plan({**state(), bias: (8, 4)}, hf_t5().config.to_dict())


def test_an_untied_model_needs_its_unembedding(folder):
    path = folder(tie_word_embeddings=False, scale_decoder_outputs=False)
    with pytest.raises(WeightsError, match=r"missing: lm_head\.weight"):
        open_source(path)


def test_stacks_of_two_depths_are_refused():
    with pytest.raises(ConfigError, match="2 layers and the decoder 3"):
        fields(num_layers=2, num_decoder_layers=3)
    assert fields(num_layers=2, num_decoder_layers=2)["n_layers"] == 2


def test_unknown_attributes_are_refused():
    with pytest.raises(ConfigError, match="t5 family does not account for .*local_radius=4"):
        fields(local_radius=4)


def test_relatives_are_not_taken_for_t5(folder):
    """Their attention or biases differ."""
    path = folder()
    for name in ("UMT5ForConditionalGeneration", "LongT5ForConditionalGeneration"):
        edit_config(path, architectures=[name])
        with pytest.raises(ConfigError, match=name):
            open_source(path)
    assert json.loads((path / "config.json").read_text())["model_type"] == "t5"
