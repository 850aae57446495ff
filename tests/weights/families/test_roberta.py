"""RoBERTa: against transformers; positions that leave out padding, and other pad tokens."""

import pytest
import torch

from fastlens.errors import ConfigError, TokenError
from fastlens.weights.families.roberta import FAMILY
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.weights.families.generated_encoders import TINY, EncoderTests, loaded, small


class TestRoberta(EncoderTests):
    family = FAMILY
    cases = {
        "plain": TINY,
        "released": {
            **TINY, "type_vocab_size": 1, "max_position_embeddings": 22, "layer_norm_eps": 1e-5,
        },
        "other activation, untied, padding 3": {
            **TINY, "hidden_act": "relu", "tie_word_embeddings": False, "pad_token_id": 3,
        },
    }  # fmt: skip


def test_positions():
    model = loaded(small(TestRoberta, "released"))
    assert model.cfg.n_ctx == 20 and model.W_pos.shape == (22, 32)
    model(torch.full((1, 20), 7))
    model(torch.cat([torch.full((1, 9), 1), torch.full((1, 20), 7)], 1))
    with pytest.raises(IndexError, match="a text of 21 tokens was given, but there are 20"):
        model(torch.full((1, 21), 7))


def test_second_texts_need_a_token_type():
    model = loaded(small(TestRoberta, "released"))
    tokens = torch.full((1, 4), 7)
    model(tokens, token_type_ids=torch.zeros_like(tokens))
    with pytest.raises(TokenError, match="this model knows one type of token"):
        model(tokens, token_type_ids=torch.ones_like(tokens))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pad_token_id": None}, "pad_token_id is null"),
        ({"is_decoder": True}, "is a decoder"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ],
)
def test_others_are_refused(change, words):
    theirs = small(TestRoberta, "plain")
    for name, value in change.items():
        setattr(theirs.config, name, value)
    with pytest.raises(ConfigError, match=words):
        open_source("x", hf_model=theirs)


def tokenizer(side: str):
    """Words ``w0 w1 ...`` between ``<s>`` and ``</s>``, RoBERTa's special tokens at its ids."""
    import tokenizers
    import transformers

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"w{n}" for n in range(55))]
    vocab = {word: n for n, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=False, add_prefix_space=False
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", mask_token="<mask>", padding_side=side,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_text(side):
    model = loaded(small(TestRoberta, "released"), tokenizer=tokenizer(side), dtype="float64")
    logits = model(["w1 w2 <mask> w3", "w5 <mask>"])
    assert logits.shape == (2, 6, 60)
    mine = slice(2, 6) if side == "left" else slice(0, 4)
    assert_close_to(logits[1, mine], model("w5 <mask>")[0])
    tokens, types, mask = model.to_tokens(["w1 w2 <mask> w3", "w5 <mask>"])
    assert not types.any() and mask[1].sum() == 4 and tokens[1, mine].tolist() == [0, 10, 4, 2]
    best = model.tokenizer.decode([int(logits[1, mine][2].argmax())])
    assert model("w5 <mask>", return_type="predictions") == best
    assert model.to_tokens("w1 " * 50)[0].shape == (1, model.cfg.n_ctx)
