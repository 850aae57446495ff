"""ESM-2 and ESM-1b: against transformers; masked tokens, frequencies of checkpoints, refusals."""

import pytest
import torch

from fastlens.errors import ConfigError
from fastlens.model.hooked_encoder import HookedEncoder
from fastlens.weights.families.esm import FAMILY
from fastlens.weights.native import write_safetensors
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.weights.families.generated_encoders import (
    MASK_TOKEN,
    TINY,
    EncoderTests,
    loaded,
    small,
)

ESM2 = {
    **TINY, "position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": MASK_TOKEN,
    "token_dropout": True, "emb_layer_norm_before": False, "layer_norm_eps": 1e-5,
}  # fmt: skip


class TestEsm(EncoderTests):
    family = FAMILY
    cases = {
        "released": ESM2,
        "no dropping, a norm first, untied": {
            **ESM2, "token_dropout": False, "emb_layer_norm_before": True, "rope_theta": 500.0,
            "tie_word_embeddings": False,
        },
        "ESM-1b": {**ESM2, "position_embedding_type": "absolute", "emb_layer_norm_before": True},
    }  # fmt: skip


@torch.no_grad()
def test_masked_tokens_are_nothing_and_scale_the_others():
    model = loaded(small(TestEsm, "released"), dtype="float64")
    tokens = torch.full((1, 8), 7)
    tokens[0, 2:4] = MASK_TOKEN
    _, cache = model.run_with_cache(tokens)
    assert not cache["embed.hook_embed"][0, 2:4].any()
    assert_close_to(cache["embed.hook_embed"][0, 0], model.W_E[7] * 0.88 / 0.75)


@torch.no_grad()
@pytest.mark.parametrize("is_old", [True, False])
def test_frequencies_are_the_checkpoints(is_old, tmp_path):
    theirs = small(TestEsm, "released")
    # As of checkpoints whose buffers once were 16 bits wide.
    theirs.esm.rotary_embeddings.inv_freq.copy_(theirs.esm.rotary_embeddings.inv_freq.half())
    theirs.save_pretrained(tmp_path)
    if is_old:
        tensors = {
            **theirs.state_dict(),
            "esm.embeddings.position_embeddings.weight": torch.ones(64, 32),
        }
        frequencies = tensors.pop("esm.rotary_embeddings.inv_freq")
        for layer in range(3):
            name = f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"
            tensors[name] = frequencies.clone()
        tensors["lm_head.decoder.weight"] = tensors["lm_head.decoder.weight"].clone()
        write_safetensors(tmp_path / "model.safetensors", tensors)
    tokens = torch.randint(5, 50, (1, 60), generator=torch.Generator().manual_seed(0))
    model = HookedEncoder.from_pretrained(str(tmp_path), verbose=False)
    want = theirs(tokens).logits
    assert_close_to(model(tokens), want)
    assert (loaded(small(TestEsm, "released"))(tokens) - want).abs().max() > 1e-4
    half = HookedEncoder.from_pretrained(str(tmp_path), verbose=False, dtype="bfloat16")
    assert torch.equal(half.blocks[0].attn.frequencies, model.blocks[0].attn.frequencies)
    assert torch.equal(half.float().blocks[1].attn.rotary_sin, model.blocks[1].attn.rotary_sin)


@torch.no_grad()
def test_frequencies_are_made_where_a_checkpoint_has_none(tmp_path):
    theirs = small(TestEsm, "released")
    theirs.save_pretrained(tmp_path)
    tensors = {k: v.clone() for k, v in theirs.state_dict().items() if "inv_freq" not in k}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    model = HookedEncoder.from_pretrained(str(tmp_path), verbose=False)
    assert model.absent_parts == {"pooler"}
    tokens = torch.arange(5, 25)[None]
    assert_close_to(model(tokens), theirs(tokens).logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position_embedding_type": "alibi"}, "must be 'absolute' or 'rotary'"),
        ({"position_embedding_type": "absolute", "pad_token_id": None}, "pad_token_id is null"),
        ({"is_folding_model": True}, "is_folding_model=True"),
        ({"mask_token_id": None}, "token_dropout is set, but mask_token_id is not"),
        ({"is_decoder": True}, "is a decoder"),
    ],
)
def test_others_are_refused(change, words):
    theirs = small(TestEsm, "released")
    for name, value in change.items():
        setattr(theirs.config, name, value)
    with pytest.raises(ConfigError, match=words):
        open_source("x", hf_model=theirs)
