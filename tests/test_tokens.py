import inspect
import warnings

import pytest
import torch

from fastlens import tokens as fl
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ShapeError, TokenError
from tests.close import assert_close_to, assert_no_worse
from tests.configs import tiny
from tests.fixtures_tokens import (
    EOS,
    TOKENIZERS,
    bpe_tokenizer,
    char_tokenizer,
    colon_bos,
    digit_tokenizer,
    gpt2_like,
    llama_like,
    reloadable,
    smollm2_tokenizer,
    t5_like,
)


@pytest.fixture(scope="module")
def tl_utilities():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformer_lens")
        import transformer_lens.utilities as utilities
    return utilities


class FakeTokenizer:
    """As much of a tokenizer as the mask functions read."""

    def __init__(self, bos=0, pad=0, eos=0, side="right"):
        self.bos_token_id, self.pad_token_id, self.eos_token_id = bos, pad, eos
        self.padding_side = side


# -- the tokenizer's BOS -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2_like", "pad_is_eos", "llama_like"])
def test_bos_is_turned_on_in_a_copy(name):
    given = TOKENIZERS[name]()
    before = given.encode("the cat")
    with_bos = fl.get_tokenizer_with_bos(given)
    plain = given.encode("the cat", add_special_tokens=False)
    assert with_bos.encode("the cat") == [given.bos_token_id, *plain]
    assert given.encode("the cat") == before
    assert with_bos is not given


def test_tokens_added_after_loading_stay():
    given = gpt2_like()
    given.add_tokens(["the cat sat"])
    with_bos = fl.get_tokenizer_with_bos(given)
    assert len(with_bos.encode("the cat sat")) == 2


@pytest.mark.parametrize("make", [colon_bos, t5_like, lambda: char_tokenizer(bos_token=None)])
def test_a_tokenizer_that_cannot_prepend_bos_comes_back_as_it_is(make):
    given = make()
    before = given.encode("the cat")
    assert fl.get_tokenizer_with_bos(given) is given
    assert given.encode("the cat") == before
    assert not given.add_bos_token


def test_a_tokenizer_that_cannot_be_copied_comes_back_as_it_is():
    class Uncopyable:
        bos_token = "<s>"
        add_bos_token = False

        def __deepcopy__(self, memo):
            raise Exception("custom parts cannot be serialized")

    given = Uncopyable()
    assert fl.get_tokenizer_with_bos(given) is given
    assert given.add_bos_token is False


@pytest.mark.tl
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_with_bos_encodes_as_transformer_lens(tl_utilities, name, tmp_path):
    given = reloadable(TOKENIZERS[name](), tmp_path)
    theirs = tl_utilities.get_tokenizer_with_bos(given)
    ours = fl.get_tokenizer_with_bos(given)
    for text in ("", "the cat", " the\n\ncat ", "Hi é 日本"):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.padding_side == theirs.padding_side


def test_only_a_token_in_front_counts_as_prepending():
    assert fl.prepends_something(llama_like())
    assert not fl.prepends_something(t5_like())
    assert not fl.prepends_something(gpt2_like())
    assert fl.prepends_something(fl.get_tokenizer_with_bos(gpt2_like()))


@pytest.mark.parametrize(("single", "prepends"), [("<s> $A", True), ("$A </s>", False)])
def test_prepending_is_seen_without_letters_in_the_vocabulary(single, prepends):
    tokenizer = digit_tokenizer(single, bos_token="<s>", eos_token="</s>")
    assert tokenizer.encode("a", add_special_tokens=False) == []
    assert fl.prepends_something(tokenizer) is prepends


def test_a_token_is_known_only_if_the_vocabulary_has_it():
    tokenizer = bpe_tokenizer(unk_token="<unk>")
    assert fl.token_is_known(tokenizer, "<unk>")
    assert fl.token_is_known(tokenizer, "an")
    assert not fl.token_is_known(tokenizer, EOS)
    assert not fl.token_is_known(char_tokenizer(), EOS)
    assert not fl.token_is_known(tokenizer, None)


# -- text to tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_batched_text_is_each_text_and_padding(name, side, prepend_bos):
    tokenizer = fl.get_tokenizer_with_bos(TOKENIZERS[name]())
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = ["the cat", "Hi", EOS + "an in", ""]
    options = {
        "prepend_bos": prepend_bos,
        "tokenizer_prepends_bos": fl.prepends_something(tokenizer),
        "padding_side": side,
    }
    tokens, mask = fl.tokenize(tokenizer, texts, **options)
    assert tokens.dtype == torch.long and tokens.shape == mask.shape
    has_bos = prepend_bos and tokenizer.bos_token is not None
    for row, kept, text in zip(tokens, mask.bool(), texts, strict=True):
        plain = tokenizer.encode(text, add_special_tokens=False)
        suffix = [tokenizer.eos_token_id] if name == "t5_like" else []
        expected = [tokenizer.bos_token_id] * has_bos + plain + suffix
        assert row[kept].tolist() == expected
        assert (row[~kept] == tokenizer.pad_token_id).all()
        first_or_last = kept.flip(0) if side == "left" else kept
        assert first_or_last[: len(expected)].all()


@pytest.mark.parametrize("make", [llama_like, colon_bos])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_texts_are_cut_to_the_length_asked_for(make, prepend_bos):
    tokenizer = make()
    prepends = fl.prepends_something(tokenizer)
    options = {"prepend_bos": prepend_bos, "tokenizer_prepends_bos": prepends}
    whole, _ = fl.tokenize(tokenizer, ["the cat in the can"], **options)
    for length in (1, 3, whole.shape[1], whole.shape[1] + 1):
        cut, _ = fl.tokenize(tokenizer, ["the cat in the can"], max_length=length, **options)
        assert cut.tolist() == whole[:, :length].tolist()


def test_texts_of_one_length_need_no_pad_token():
    tokenizer = char_tokenizer()
    options = {"prepend_bos": False, "tokenizer_prepends_bos": False}
    tokens, mask = fl.tokenize(tokenizer, ["abc", "xyz"], **options)
    assert tokens.shape == (2, 3) and mask.all()
    with pytest.raises(TokenError, match=r"\[2, 3\] tokens.*no pad token.*add_special_tokens"):
        fl.tokenize(tokenizer, ["abc", "xy"], **options)
    with pytest.raises(TokenError, match="empty list"):
        fl.tokenize(tokenizer, [], **options)


@pytest.mark.tl
def test_manual_bos_as_transformer_lens(tl_utilities):
    for bos in (None, "<s>"):
        for text in ("a", ["a", "b"], ""):
            assert fl.get_input_with_manually_prepended_bos(
                bos, text
            ) == tl_utilities.get_input_with_manually_prepended_bos(bos, text)


# -- masks ---------------------------------------------------------------------------------------

MASK_CASES = [
    [[0, 0, 0, 5, 6], [0, 5, 0, 6, 0], [5, 6, 7, 8, 0], [7, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    [[9, 5, 6, 7, 8]],
    [[1, 5, 6, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 5, 6]],
]


@pytest.mark.tl
@pytest.mark.parametrize("tokens", MASK_CASES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("ids", [(0, 0), (1, 0)])
def test_attention_mask_as_transformer_lens(tl_utilities, tokens, side, prepend_bos, ids):
    tokenizer = FakeTokenizer(bos=ids[0], pad=ids[1], side=side)
    tokens = torch.tensor(tokens)
    theirs = tl_utilities.get_attention_mask(tokenizer, tokens, prepend_bos)
    assert torch.equal(fl.get_attention_mask(tokenizer, tokens, prepend_bos), theirs)
    other = "left" if side == "right" else "right"
    assert torch.equal(
        fl.get_attention_mask(tokenizer, tokens, prepend_bos, padding_side=other),
        tl_utilities.get_attention_mask(tokenizer, tokens, prepend_bos, padding_side=other),
    )


def test_attention_mask_without_pad_token_keeps_everything():
    tokens = torch.tensor([[0, 0, 5]])
    assert fl.get_attention_mask(None, tokens, True).all()
    assert fl.get_attention_mask(FakeTokenizer(pad=None), tokens, True).all()


def test_attention_mask_of_one_row():
    tokenizer = FakeTokenizer(side="left")
    assert fl.get_attention_mask(tokenizer, torch.tensor([0, 0, 5]), True).tolist() == [0, 1, 1]


@pytest.mark.tl
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ids", [(0, 0), (1, 0), (None, 0)])
def test_bos_is_removed_as_in_transformer_lens(tl_utilities, side, ids):
    bos, pad = ids
    tokenizer = FakeTokenizer(bos=bos, pad=pad, side=side)
    first = 0 if bos is None else bos
    rows = {
        "left": [[0, 0, first, 5], [first, 5, 6, 0], [0, first, 5, first]],
        "right": [[first, 5, 0, 0], [first, 5, 6, 7], [first, first, 0, 0]],
    }
    tokens = torch.tensor(rows[side])
    theirs = tl_utilities.get_tokens_with_bos_removed(tokenizer, tokens)
    assert torch.equal(fl.get_tokens_with_bos_removed(tokenizer, tokens), theirs)


def test_bos_removal_of_a_row_without_bos_takes_its_first_token():
    tokenizer = FakeTokenizer(side="left")
    tokens = torch.tensor([[5, 6, 7]])
    assert fl.get_tokens_with_bos_removed(tokenizer, tokens).tolist() == [[6, 7]]


@pytest.mark.tl
def test_positions_and_cumsum_as_transformer_lens(tl_utilities):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]])
    for offset in (0, 2, 5):
        theirs = tl_utilities.get_offset_position_ids(offset, mask)
        assert torch.equal(fl.get_offset_position_ids(offset, mask), theirs)
    assert fl.get_offset_position_ids(1, mask.bool())[0].tolist() == [0, 0, 1, 2]
    for reverse in (True, False):
        theirs = tl_utilities.get_cumsum_along_dim(mask, -1, reverse=reverse)
        assert torch.equal(fl.get_cumsum_along_dim(mask, -1, reverse=reverse), theirs)


@pytest.mark.parametrize(
    ("tokens", "side", "prepend_bos", "expected"),
    [
        # A lone BOS that is also the pad token is text.
        ([[0], [0]], "right", True, [[1], [1]]),
        ([[0], [0]], "left", False, [[1], [1]]),
        ([[5, 6, 0]], "right", True, [[1, 1, 1]]),
        # Padded right, padded left, and left although the tokenizer pads right.
        ([[0, 5, 0, 0], [0, 5, 6, 7]], "right", True, [[1, 1, 0, 0], [1, 1, 1, 1]]),
        ([[0, 0, 0, 5], [0, 6, 7, 8]], "left", True, [[0, 0, 1, 1], [1, 1, 1, 1]]),
        ([[0, 0, 0, 5], [0, 6, 7, 8]], "right", True, [[0, 0, 1, 1], [1, 1, 1, 1]]),
        ([[0, 0, 5, 6], [5, 6, 7, 8]], "left", False, [[0, 0, 1, 1], [1, 1, 1, 1]]),
        # A row of pads keeps one token.
        ([[0, 0, 0], [0, 5, 6]], "right", True, [[0, 0, 1], [1, 1, 1]]),
        ([[0, 0, 0], [5, 6, 7]], "left", False, [[0, 0, 1], [1, 1, 1]]),
        # Pads that end a text of a left-padded batch are text.
        ([[0, 5, 0], [5, 6, 0]], "left", False, [[0, 1, 1], [1, 1, 1]]),
    ],
)
def test_prompt_mask_where_pad_is_also_bos(tokens, side, prepend_bos, expected):
    mask = fl.get_prompt_mask(FakeTokenizer(side=side), torch.tensor(tokens), prepend_bos)
    assert mask.tolist() == expected


@pytest.mark.parametrize(
    ("tokens", "side", "expected"),
    [
        ([[1, 5, 9]], "right", [[1, 1, 0]]),
        ([[9, 1, 5]], "right", [[0, 1, 1]]),
        ([[9, 1, 9]], "left", [[0, 1, 1]]),
        ([[9, 9, 9]], "right", [[1, 0, 0]]),
        ([[9, 9, 9]], "left", [[0, 0, 1]]),
    ],
)
def test_prompt_mask_where_pad_means_nothing_else(tokens, side, expected):
    tokenizer = FakeTokenizer(bos=1, pad=9, eos=2, side=side)
    assert fl.get_prompt_mask(tokenizer, torch.tensor(tokens), True).tolist() == expected
    assert fl.get_prompt_mask(None, torch.tensor(tokens), True).all()


# -- defaults ------------------------------------------------------------------------------------


class Model:
    def __init__(self, tokenizer):
        self.cfg = HookedTransformerConfig(**tiny("gpt2"))
        self.tokenizer = tokenizer


def test_defaults_are_overridden_and_restored_even_if_the_block_raises():
    model = Model(FakeTokenizer())
    with pytest.raises(KeyboardInterrupt):
        with fl.LocallyOverridenDefaults(model, prepend_bos=False, padding_side="left"):
            assert model.cfg.default_prepend_bos is False
            assert model.tokenizer.padding_side == "left"
            raise KeyboardInterrupt
    assert model.cfg.default_prepend_bos is True
    assert model.tokenizer.padding_side == "right"


def test_defaults_stay_where_nothing_is_given():
    model = Model(None)
    with fl.LocallyOverridenDefaults(model, prepend_bos=None, padding_side="left"):
        assert model.cfg.default_prepend_bos is True
    assert fl.USE_DEFAULT_VALUE is None
    assert fl.override_or_use_default_value(3, None) == 3
    assert fl.override_or_use_default_value(3, False) is False


@pytest.mark.parametrize("wrong", [{"padding_side": "top"}, {"prepend_bos": "yes"}, {"bos": True}])
def test_a_wrong_override_changes_nothing(wrong):
    model = Model(FakeTokenizer())
    with pytest.raises(AssertionError, match=next(iter(wrong))):
        with fl.LocallyOverridenDefaults(model, **{"prepend_bos": False, **wrong}):
            pass
    assert model.cfg.default_prepend_bos is True
    assert model.tokenizer.padding_side == "right"


# -- loss ----------------------------------------------------------------------------------------


def _loss_case(dtype=torch.float32, batch=3, pos=7, d_vocab=50):
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(batch, pos, d_vocab, generator=generator, dtype=torch.float64)
    tokens = torch.randint(d_vocab, (batch, pos), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    mask[1, -3:] = 0
    return logits.to(dtype), tokens, mask


def _plain_loss(logits, tokens, mask=None, per_token=False):
    log_probs = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    n = log_probs.numel()
    if mask is not None:
        pairs = mask[:, :-1].bool() & mask[:, 1:].bool()
        log_probs = log_probs.masked_fill(~pairs, 0.0)
        n = pairs.sum()
    return -log_probs if per_token else -log_probs.sum() / n


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_loss_is_the_cross_entropy_of_the_next_token(dtype, grad, masked, per_token):
    logits, tokens, mask = _loss_case(dtype)
    mask = mask if masked else None
    loss = fl.lm_cross_entropy_loss(logits.requires_grad_(grad), tokens, mask, per_token)
    assert loss.dtype == dtype and loss.shape == ((3, 6) if per_token else ())
    truth = _plain_loss(logits.double(), tokens, mask, per_token)
    eager = _plain_loss(logits, tokens, mask, per_token)
    assert_no_worse(loss, eager, truth, factor=1.0, name="loss")


@pytest.mark.parametrize("masked", [True, False])
def test_loss_gradients(masked):
    logits, tokens, mask = _loss_case(torch.float64, batch=2, pos=4, d_vocab=5)
    mask = mask if masked else None
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fl.lm_cross_entropy_loss(x, tokens, mask), [logits])
    assert torch.autograd.gradgradcheck(
        lambda x: fl.lm_cross_entropy_loss(x, tokens, mask), [logits]
    )


def test_loss_in_pieces_is_the_same(monkeypatch):
    logits, tokens, mask = _loss_case()
    whole = fl.lm_cross_entropy_loss(logits, tokens, mask, per_token=True)
    monkeypatch.setattr(fl, "_LOSS_ROWS_BYTES", 4 * 50 * 4)
    assert torch.equal(fl.lm_cross_entropy_loss(logits, tokens, mask, per_token=True), whole)


def test_loss_without_gradients_makes_no_second_tensor_of_logits(monkeypatch):
    logits, tokens, _ = _loss_case(batch=4, pos=64, d_vocab=500)
    monkeypatch.setattr(fl, "_LOSS_ROWS_BYTES", 500 * 4 * 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            nonlocal largest
            for item in out if isinstance(out, tuple | list) else [out]:
                shares = item.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
                largest = max(largest, 0 if shares else item.numel())
            return out

    with Watch():
        fl.lm_cross_entropy_loss(logits, tokens)
    assert 0 < largest <= 8 * 500


def test_loss_of_many_tokens_fits_float16():
    logits = torch.zeros(1, 40_000, 2, dtype=torch.float16)
    logits[..., 1] = 8
    tokens = torch.zeros(1, 40_000, dtype=torch.long)
    assert fl.lm_cross_entropy_loss(logits, tokens, torch.ones_like(tokens)).item() == 8.0
    assert fl.lm_cross_entropy_loss(logits, tokens).item() == 8.0


@pytest.mark.tl
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_loss_as_transformer_lens(tl_utilities, masked, per_token):
    logits, tokens, mask = _loss_case()
    arguments = (logits, tokens, mask if masked else None, per_token)
    theirs = tl_utilities.lm_cross_entropy_loss(*arguments)
    assert_close_to(fl.lm_cross_entropy_loss(*arguments), theirs, atol=1e-6)


def test_accuracy_of_the_next_token():
    tokens = torch.tensor([[3, 1, 2], [0, 0, 4]])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 0, 9], [0, 4, 0]]), 10).float()
    hits = torch.tensor([[True, False], [True, True]])
    assert torch.equal(fl.lm_accuracy(logits, tokens, per_token=True), hits)
    assert fl.lm_accuracy(logits, tokens) == 0.75


def test_loss_of_unbatched_text():
    logits, tokens, _ = _loss_case()
    whole = fl.lm_cross_entropy_loss(logits, tokens, per_token=True)
    assert_close_to(fl.lm_cross_entropy_loss(logits[0], tokens[0], per_token=True), whole[0])


def test_loss_refuses_shapes_that_do_not_fit():
    logits, tokens, mask = _loss_case()
    # Without the shape checks that only tests have.
    loss = inspect.unwrap(fl.lm_cross_entropy_loss)
    with pytest.raises(ShapeError, match=r"\(3, 7, 50\) need tokens \(3, 7\), found \(3, 6\)"):
        loss(logits, tokens[:, :-1])
    with pytest.raises(TokenError, match=r"attention_mask \(1, 7\) must have"):
        loss(logits, tokens, mask[:1])


# -- showing -------------------------------------------------------------------------------------


def test_alignment_marks_what_differs():
    a = ["<s>", "The", " E", "iff", "el", " is", " in"]
    b = ["<s>", "The", " Col", "osse", "um", "s", " is", " in"]
    lines = fl.align_tokenizations(a, b).split("\n")
    assert lines[0] == "    clean (7): <s>|The| E  |iff |el| | is| in"
    assert lines[1] == "corrupted (8): <s>|The| Col|osse|um|s| is| in"
    assert lines[2].split() == ["^^^^", "^^^^", "^^", "^"]
    assert lines[2].index("^") == lines[0].index(" E")


def test_alignment_of_equal_tokens_has_no_marks():
    text = fl.align_tokenizations(["a", "\n", "b"], ["a", "\n", "b"], labels=("x", "y"))
    assert text == "x (3): a|\\n|b\ny (3): a|\\n|b"


def test_long_alignments_wrap():
    a = [f"token{i}" for i in range(40)]
    b = [*a[:20], " extra", *a[20:]]
    lines = fl.align_tokenizations(a, b, width=60).split("\n")
    assert all(len(line) <= 60 for line in lines) and len(lines) > 6
    shown = "".join(lines)
    assert all(shown.count(token) >= 2 for token in a)
    assert shown.count("^") == len(" extra")


@pytest.mark.slow
def test_smollm2_texts_get_its_bos():
    tokenizer = smollm2_tokenizer()
    with_bos = fl.get_tokenizer_with_bos(tokenizer)
    assert tokenizer.encode(" Paris") == with_bos.encode(" Paris")[1:]
    assert with_bos.encode("")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode("") == []
