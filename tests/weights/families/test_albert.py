"""ALBERT: against transformers; one block's parameters in every layer."""

import copy

import pytest
import torch

from fastlens.errors import ConfigError, WeightsError
from fastlens.model.bert_next_sentence_prediction import BertNextSentencePrediction
from fastlens.weights.families.albert import FAMILY
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.weights.families.generated_encoders import TINY, EncoderTests, loaded, small


class TestAlbert(EncoderTests):
    family = FAMILY
    moves_with_padding = True
    cases = {
        "plain": {**TINY, "embedding_size": 16},
        "relu, as wide": {**TINY, "embedding_size": 32, "hidden_act": "relu"},
    }


def test_layers_share_their_parameters():
    model = loaded(small(TestAlbert, "plain"))
    for other in (model, copy.deepcopy(model), model.to(torch.float64)):
        first = dict(other.blocks[0].named_parameters())
        for block in other.blocks:
            assert all(leaf is first[name] for name, leaf in block.named_parameters())
    assert model.W_Q.shape[0] == 3 and not any("blocks.1" in n for n, _ in model.named_parameters())
    meta = copy.deepcopy(model).to("meta")
    assert meta.blocks[2].attn.W_Q is meta.blocks[0].attn.W_Q


def test_each_layer_has_hooks_of_its_own():
    model, tokens = loaded(small(TestAlbert, "plain")), torch.full((1, 5), 7)
    plain = model(tokens)
    seen = []
    hooks = [(f"blocks.{n}.attn.hook_z", lambda z, hook: seen.append(hook.name)) for n in (0, 2)]
    assert_close_to(model.run_with_hooks(tokens, fwd_hooks=hooks), plain)
    assert seen == ["blocks.0.attn.hook_z", "blocks.2.attn.hook_z"]


def test_state_dicts_cannot_tell_layers_apart():
    model = loaded(small(TestAlbert, "plain"))
    state = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert model.blocks[1].mlp.W_in is model.blocks[0].mlp.W_in
    state["blocks.1.mlp.W_in"] += 1
    with pytest.raises(WeightsError, match=r"blocks\.\*\.mlp\.W_in differs between layers"):
        model.load_state_dict(state)


@torch.no_grad()
def test_the_order_of_sentences():
    theirs = small(TestAlbert, "plain", "AlbertForPreTraining")
    tokens = torch.arange(5, 17).view(2, 6)
    types = torch.tensor([[0, 0, 0, 1, 1, 1]]).repeat(2, 1)
    want = theirs(tokens, token_type_ids=types)
    model = loaded(theirs)
    assert_close_to(
        BertNextSentencePrediction(model)(tokens, token_type_ids=types), want.sop_logits
    )
    assert_close_to(model(tokens, token_type_ids=types), want.prediction_logits)


@pytest.mark.parametrize("name", ["num_hidden_groups", "inner_group_num"])
def test_more_blocks_are_refused(name):
    theirs = small(TestAlbert, "plain")
    setattr(theirs.config, name, 2)
    with pytest.raises(ConfigError, match=f"{name}=2"):
        open_source("x", hf_model=theirs)
