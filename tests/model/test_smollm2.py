"""A real model against what it is known to say, and against Hugging Face on the same weights."""

import pytest
import torch

from fastlens import HookedTransformer
from tests.smollm2 import smollm2

EIFFEL = "The Eiffel Tower is in the city of"
IOI = "When John and Mary went to the store, Mary gave a bottle to"


@pytest.fixture(scope="module")
def model():
    """Unprocessed: the checkpoint's own logits."""
    smollm2()  # skips where the package is not installed
    return HookedTransformer.from_pretrained_no_processing("smollm2-135m", verbose=False)


def last_logits(model, text):
    with torch.no_grad():
        return model(text, prepend_bos=False)[0, -1]


def test_the_known_answers(model):
    paris, john, mary = (model.to_single_token(t) for t in (" Paris", " John", " Mary"))
    logits = last_logits(model, EIFFEL)
    assert logits.argmax() == paris
    assert logits[paris].item() == pytest.approx(13.69, abs=0.01)
    logits = last_logits(model, IOI)
    assert logits.argmax() == john
    assert (logits[john] - logits[mary]).item() == pytest.approx(5.88, abs=0.01)
    processed = last_logits(smollm2(), IOI)
    assert (processed[john] - processed[mary]).item() == pytest.approx(5.88, abs=0.01)


def test_random_tokens_are_foretold_the_second_time(model):
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(1000, 40000, (4, 50), generator=generator)
    with torch.no_grad():
        loss = model(torch.cat([once, once], 1), return_type="loss", loss_per_token=True)
    assert loss[:, :49].mean() > 13 and loss[:, 50:].mean() < 3


def test_logits_equal_hugging_face_on_the_same_weights(model):
    from transformers import LlamaConfig, LlamaForCausalLM

    cfg = model.cfg
    theirs = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=cfg.d_model,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.n_key_value_heads,
            intermediate_size=cfg.d_mlp,
            vocab_size=cfg.d_vocab,
            max_position_embeddings=cfg.n_ctx,
            rms_norm_eps=cfg.eps,
            rope_parameters={"rope_theta": float(cfg.rotary_base), "rope_type": "default"},
        )
    ).eval()
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(model.W_E)
        theirs.lm_head.weight.copy_(model.W_U.T)
        theirs.model.norm.weight.copy_(model.ln_final.w)
        for block, layer in zip(model.blocks, theirs.model.layers, strict=True):
            attn = block.attn
            for name, w in (("q", attn.W_Q), ("k", attn._W_K), ("v", attn._W_V)):
                weight = getattr(layer.self_attn, f"{name}_proj").weight
                weight.copy_(w.transpose(1, 2).reshape(weight.shape))
            layer.self_attn.o_proj.weight.copy_(attn.W_O.flatten(0, 1).T)
            layer.mlp.gate_proj.weight.copy_(block.mlp.W_gate.T)
            layer.mlp.up_proj.weight.copy_(block.mlp.W_in.T)
            layer.mlp.down_proj.weight.copy_(block.mlp.W_out.T)
            layer.input_layernorm.weight.copy_(block.ln1.w)
            layer.post_attention_layernorm.weight.copy_(block.ln2.w)
        for text in (EIFFEL, IOI):
            tokens = model.to_tokens(text, prepend_bos=False)
            want, got = theirs(tokens).logits, model(tokens)
            assert (got - want).abs().max() <= 2e-4 * (want.max() - want.min())
