import inspect
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from fastlens.config import HookedTransformerConfig
from fastlens.errors import TokenError
from fastlens.model.text import TextMixin
from tests.configs import tiny
from tests.fixtures_tokens import (
    EOS,
    TOKENIZERS,
    char_tokenizer,
    colon_bos,
    gpt2_like,
    llama_like,
    python_tokenizer,
    reloadable,
    smollm2_tokenizer,
    t5_like,
)

TEXTS = ["the cat in the can", "Hi", " a\n\ttab  and é 日本", EOS + "the", ""]


class OnlyText(TextMixin):
    """As much of a model as the text methods need."""

    def __init__(self, tokenizer=None, W_U=None, padding_side=None, **changes):
        self.cfg = HookedTransformerConfig(**tiny("gpt2", **{"d_vocab": -1, **changes}))
        self.tokenizer = None
        self.W_U = W_U
        if tokenizer is not None:
            self.set_tokenizer(tokenizer, default_padding_side=padding_side)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """Both libraries' models on one tokenizer; TransformerLens' unembedding in both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tl = pytest.importorskip("transformer_lens")

    made = {}

    def build(name, **changes):
        key = (name, *changes.items())
        if key not in made:
            tokenizer = reloadable(TOKENIZERS[name](), tmp_path_factory.mktemp(name))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cfg = tl.HookedTransformerConfig(**tiny("gpt2", d_vocab=-1, **changes))
                theirs = tl.HookedTransformer(cfg, tokenizer=tokenizer)
            W_U = theirs.W_U.detach().t().contiguous().t()
            made[key] = OnlyText(tokenizer, W_U=W_U, **changes), theirs
        return made[key]

    return build


SAME_AS_TL = ["gpt2_like", "llama_like", "pad_is_eos", "colon_bos"]


# -- against TransformerLens ---------------------------------------------------------------------


@pytest.mark.tl
@pytest.mark.parametrize("name", SAME_AS_TL)
def test_set_tokenizer_as_transformer_lens(pair_of, name):
    ours, theirs = pair_of(name)
    assert ours.cfg.tokenizer_prepends_bos == theirs.cfg.tokenizer_prepends_bos
    assert ours.cfg.d_vocab == theirs.cfg.d_vocab
    assert ours.cfg.d_vocab_out == theirs.cfg.d_vocab_out
    for token in ("bos_token", "eos_token", "pad_token", "bos_token_id", "pad_token_id"):
        assert getattr(ours.tokenizer, token) == getattr(theirs.tokenizer, token)
    assert ours.tokenizer.padding_side == theirs.tokenizer.padding_side


@pytest.mark.tl
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("prepend_bos", [None, True, False])
@pytest.mark.parametrize("name", SAME_AS_TL)
def test_to_tokens_as_transformer_lens(pair_of, name, prepend_bos, side):
    ours, theirs = pair_of(name)
    for text in [*TEXTS, TEXTS, TEXTS[:1]]:
        got = ours.to_tokens(text, prepend_bos, side)
        want = theirs.to_tokens(text, prepend_bos=prepend_bos, padding_side=side)
        assert torch.equal(got, want) and got.dtype == want.dtype


@pytest.mark.tl
@pytest.mark.parametrize("name", SAME_AS_TL)
def test_default_prepend_bos_as_transformer_lens(pair_of, name):
    ours, theirs = pair_of(name, default_prepend_bos=False)
    assert torch.equal(ours.to_tokens(TEXTS), theirs.to_tokens(TEXTS))
    assert torch.equal(ours.to_tokens("Hi", True), theirs.to_tokens("Hi", True))


@pytest.mark.tl
@pytest.mark.parametrize("truncate", [True, False])
def test_truncation_as_transformer_lens(pair_of, truncate):
    for name in SAME_AS_TL:
        ours, theirs = pair_of(name, n_ctx=4)
        got = ours.to_tokens("the cat in the can", truncate=truncate)
        assert torch.equal(got, theirs.to_tokens("the cat in the can", truncate=truncate))


@pytest.mark.tl
@pytest.mark.parametrize("name", SAME_AS_TL)
def test_strings_as_transformer_lens(pair_of, name):
    ours, theirs = pair_of(name)
    batch = ours.to_tokens(TEXTS)
    row = batch[0]
    for tokens in (batch, row, row[2], row.tolist(), row.numpy(), batch.numpy(), batch.tolist()):
        assert ours.to_string(tokens) == theirs.to_string(tokens)
    assert ours.to_str_tokens("") == theirs.to_str_tokens("")
    inputs = [
        *TEXTS[:4],
        TEXTS[:4],
        [TEXTS[:4]],
        row,
        row[None],
        row[:1],
        row.numpy(),
        [row, batch[1]],
    ]
    for value in inputs:
        assert ours.to_str_tokens(value) == theirs.to_str_tokens(value)
        assert ours.to_str_tokens(value, False) == theirs.to_str_tokens(value, False)
    assert ours.to_single_str_token(257) == theirs.to_single_str_token(257) == "the"
    for string in ("the", " cat", "Hi", "x"):
        assert ours.to_single_token(string) == theirs.to_single_token(string)


@pytest.mark.tl
@pytest.mark.parametrize("name", SAME_AS_TL)
def test_token_positions_as_transformer_lens(pair_of, name):
    ours, theirs = pair_of(name)
    text = "the cat the can"
    for mode in ("first", "last"):
        for token in ("the", " ca", ours.to_single_token(" ca"), torch.tensor(257)):
            for prompt in (text, ours.to_tokens(text), ours.to_tokens(text)[0]):
                for bos in (None, False):
                    arguments = (token, prompt, mode, bos)
                    try:
                        want = theirs.get_token_position(*arguments)
                    except AssertionError:
                        with pytest.raises(AssertionError, match="does not occur"):
                            ours.get_token_position(*arguments)
                    else:
                        assert ours.get_token_position(*arguments) == want


@pytest.mark.tl
def test_residual_directions_as_transformer_lens(pair_of):
    ours, theirs = pair_of("gpt2_like")
    batch = ours.to_tokens(["the cat in", "Hi"])
    for tokens in (
        "the",
        5,
        torch.tensor(5),
        torch.tensor([5]),
        torch.tensor([[5]]),
        batch[0],
        batch,
    ):
        got = ours.tokens_to_residual_directions(tokens)
        assert torch.equal(got, theirs.tokens_to_residual_directions(tokens))


@pytest.mark.tl
@pytest.mark.parametrize("method", [name for name in vars(TextMixin) if not name.startswith("_")])
def test_arguments_as_transformer_lens(pair_of, method):
    ours, theirs = pair_of("gpt2_like")
    want = inspect.signature(getattr(theirs, method)).parameters.values()
    got = inspect.signature(getattr(ours, method)).parameters.values()
    assert [(p.name, p.default) for p in got] == [(p.name, p.default) for p in want]


# -- where TransformerLens is wrong --------------------------------------------------------------


def test_an_appended_eos_is_not_taken_for_a_bos():
    model = OnlyText(t5_like())
    eos = model.tokenizer.eos_token_id
    assert model.cfg.tokenizer_prepends_bos is False
    plain = model.to_tokens("the cat", prepend_bos=False)[0].tolist()
    assert model.to_string(plain) == "the cat</s>"
    assert model.to_tokens("the cat")[0].tolist() == [eos, *plain]


@pytest.mark.parametrize("make", [gpt2_like, colon_bos])
def test_a_bos_that_is_not_wanted_costs_no_token_of_text(make):
    model = OnlyText(make(), n_ctx=4)
    whole = model.to_tokens("the cat in the can", prepend_bos=False, truncate=False)
    assert whole.shape[1] > 4
    assert torch.equal(model.to_tokens("the cat in the can", prepend_bos=False), whole[:, :4])


def test_no_bos_is_spelled_out_in_letters():
    model = OnlyText(char_tokenizer())
    assert model.tokenizer.bos_token is None and model.tokenizer.pad_token is None
    assert model.to_str_tokens("abc") == ["a", "b", "c"]
    with pytest.raises(TokenError, match="prepend_bos=True.*no BOS token"):
        model.to_tokens("abc", prepend_bos=True)
    with pytest.raises(TokenError, match="no pad token"):
        model.to_tokens(["abc", "ab"])


def test_a_vocabulary_with_endoftext_uses_it():
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [EOS]})
    model = OnlyText(tokenizer)
    assert model.tokenizer.bos_token == model.tokenizer.pad_token == EOS
    assert model.to_str_tokens(["ab", "a"]) == [[EOS, "a", "b"], [EOS, "a"]]


def test_empty_text_gives_integers():
    model = OnlyText(gpt2_like())
    tokens = model.to_tokens("", prepend_bos=False)
    assert tokens.shape == (1, 0) and tokens.dtype == torch.long
    assert model.to_str_tokens("", prepend_bos=False) == []
    assert model.to_string(tokens[0]) == ""


# -- the rest ------------------------------------------------------------------------------------


def test_the_tokenizer_given_is_not_changed():
    given = gpt2_like()
    model = OnlyText(given, padding_side="left")
    assert model.tokenizer is not given
    assert given.pad_token is None and given.padding_side == "right" and given.encode("") == []
    assert model.tokenizer.padding_side == "left"


def test_padding_side_of_one_call_does_not_stay():
    model = OnlyText(gpt2_like())
    left = model.to_tokens(["the cat", "Hi"], padding_side="left")
    right = model.to_tokens(["the cat", "Hi"])
    assert left[1].tolist() == [268, 268, 267] and right[1].tolist() == [268, 267, 268]
    assert model.tokenizer.padding_side == "right"


def test_olmo_keeps_its_tokenizer():
    given = gpt2_like()
    model = OnlyText(given, original_architecture="OlmoForCausalLM")
    assert model.tokenizer is given
    assert model.to_tokens("Hi").tolist() == [[268, 267]]


def test_d_vocab_is_kept_where_it_is_set():
    assert OnlyText(gpt2_like()).cfg.d_vocab == 269
    model = OnlyText(gpt2_like(), d_vocab=300)
    assert model.cfg.d_vocab == model.cfg.d_vocab_out == 300


def test_texts_round_trip():
    model = OnlyText(gpt2_like())
    for text in TEXTS:
        tokens = model.to_tokens(text, prepend_bos=False)
        assert model.to_string(tokens) == [text]
        assert "".join(model.to_str_tokens(text, False)).count("�") or (
            "".join(model.to_str_tokens(text, False)) == text
        )
    rows = [model.to_tokens(text, False)[0] for text in ("the cat", "Hi")]
    assert model.to_string(rows) == ["the cat", "Hi"]


def test_ids_in_lists_and_arrays():
    model = OnlyText(gpt2_like())
    assert model.to_str_tokens([257, 266]) == ["the", " cat"]
    assert model.to_str_tokens(np.array([[257, 266]])) == ["the", " cat"]
    assert model.to_str_tokens(list(np.array([257, 266]))) == ["the", " cat"]
    assert model.to_str_tokens(torch.tensor(257)) == ["the"]
    assert model.to_string(np.int64(257)) == "the"
    assert model.get_token_position(266, [257, 266]) == 1


def test_residual_directions_copy_only_what_is_asked_for():
    W_U = torch.randn(100, 8).t()
    W_U.requires_grad_()
    model = OnlyText(gpt2_like(), W_U=W_U)
    one = model.tokens_to_residual_directions(7)
    assert one.untyped_storage().data_ptr() == W_U.untyped_storage().data_ptr()
    assert torch.equal(one, W_U[:, 7])
    several = model.tokens_to_residual_directions(torch.tensor([[3, 4, 3]]))
    assert several.shape == (1, 3, 8) and several.is_contiguous()
    assert several.untyped_storage().nbytes() == 3 * 8 * 4
    several.sum().backward()
    assert W_U.grad is None or W_U.grad[:, 3].tolist() == [2.0] * 8


def test_a_tokenizer_written_in_python():
    model = OnlyText(python_tokenizer(bos_token="<s>", eos_token="</s>"), n_ctx=4)
    assert model.cfg.tokenizer_prepends_bos is False
    assert model.to_str_tokens("ab") == ["<s>", "a", "b"]
    assert model.to_tokens("abcdef").tolist() == [[model.tokenizer.bos_token_id, 0, 1, 2]]
    left = model.to_tokens(["abc", "a"], prepend_bos=False, padding_side="left")
    assert model.to_string(left) == ["abc", "</s></s>a"]
    assert model.to_single_token("b") == 1


# -- errors --------------------------------------------------------------------------------------


def test_several_tokens_are_shown():
    model = OnlyText(gpt2_like())
    with pytest.raises(
        TokenError, match=r"' Kal' must be a single token, but is 4: \[' ', 'K'"
    ) as e:
        model.to_single_token(" Kal")
    assert isinstance(e.value, AssertionError) and isinstance(e.value, ValueError)
    with pytest.raises(TokenError, match=r"'' must be a single token, but is 0"):
        model.to_single_token("")
    with pytest.raises(TokenError, match=r"' Hi' must be.*'Hi', without a space, is one"):
        model.to_single_token(" Hi")
    with pytest.raises(TokenError, match=r"'cat' must be.*' cat', with a space, is one"):
        model.to_single_token("cat")


def test_an_absent_token_shows_the_prompt():
    model = OnlyText(gpt2_like())
    with pytest.raises(TokenError, match=r"'Hi' \(id 267\).*\['<\|endoftext\|>', 'the', ' cat'\]"):
        model.get_token_position("Hi", "the cat")
    with pytest.raises(TokenError, match="and 36 more"):
        model.get_token_position("Hi", torch.full((100,), 257))
    with pytest.raises(ValueError, match="mode='firts'.*Nearest: 'first'"):
        model.get_token_position("the", "the cat", mode="firts")
    with pytest.raises(TokenError, match=r"one text.*\[2, 3\]"):
        model.get_token_position("the", torch.zeros(2, 3, dtype=torch.long))


def test_token_positions_need_no_tokenizer_for_ids():
    model = OnlyText()
    assert model.get_token_position(5, torch.tensor([[4, 5, 5]]), mode="last") == 2
    with pytest.raises(TokenError, match=r"id 9.*\[4, 5, 5\]"):
        model.get_token_position(9, torch.tensor([4, 5, 5]))


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.to_tokens("a"),
        lambda m: m.to_string([1]),
        lambda m: m.to_str_tokens([1]),
        lambda m: m.to_single_token("a"),
        lambda m: m.to_single_str_token(1),
        lambda m: m.tokens_to_residual_directions("a"),
    ],
)
def test_a_model_without_tokenizer_says_how_to_give_one(call):
    with pytest.raises(TokenError, match=r"needs a tokenizer.*set_tokenizer"):
        call(OnlyText(W_U=torch.zeros(2, 3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.set_tokenizer("gpt2"), "set_tokenizer got str, which has no"),
        (lambda m: m.to_string(torch.zeros(1, 1, 1, dtype=torch.long)), r"found shape \[1, 1, 1\]"),
        (lambda m: m.to_str_tokens(torch.zeros(2, 2, dtype=torch.long)), r"\[2, 2\]. Give one row"),
        (
            lambda m: m.tokens_to_residual_directions(torch.zeros(0, dtype=torch.long)),
            r"shape \[0\]",
        ),
        (lambda m: m.to_tokens([]), "empty list"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(TokenError, match=message):
        call(OnlyText(llama_like(), W_U=torch.zeros(2, 3)))


def test_an_assigned_tokenizer_is_noticed():
    model = OnlyText()
    model.tokenizer = gpt2_like()
    with pytest.raises(TokenError, match=r"Call model.set_tokenizer"):
        model.to_tokens("a")


def test_importing_the_text_methods_loads_no_transformers():
    code = "import sys, fastlens.model.text; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- a real tokenizer ----------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2():
    model = OnlyText(smollm2_tokenizer())
    assert model.cfg.d_vocab == 49152
    assert model.to_str_tokens("The Eiffel Tower is in", prepend_bos=False) == [
        "The", " E", "iffel", " Tower", " is", " in",
    ]  # fmt: skip
    assert model.to_str_tokens("Hi")[0] == "<|im_start|>"
    assert model.to_single_str_token(model.to_single_token(" Paris")) == " Paris"
    with pytest.raises(
        TokenError, match=r"' Kaliningrad' must be.*is 3: \[' Kal', 'ining', 'rad'\]"
    ):
        model.to_single_token(" Kaliningrad")
    tokens = model.to_tokens(["Hi there, you", "Hi"], padding_side="left")
    assert tokens[1].tolist() == [2] * (tokens.shape[1] - 2) + [1, model.to_single_token("Hi")]
    for text in ("  two  spaces\n\ttab", "é 日本 🙂", "def f(x):\n    return x"):
        assert model.to_string(model.to_tokens(text, prepend_bos=False)[0]) == text
