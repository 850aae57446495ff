"""`detect_head` against TransformerLens', patterns by hand, and that nothing else is touched."""

import re
import typing

import pytest
import torch

from fastlens.analysis import head_detector
from fastlens.analysis.head_detector import (
    HEAD_NAMES,
    HeadDetectorError,
    compute_head_attention_similarity_score,
    detect_head,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
    get_supported_heads,
)
from fastlens.errors import LayerError, ShapeError
from tests.close import assert_close_to
from tests.models import ours
from tests.toy import ours_toy, toy_pair

COMPARED = [
    f"transformer_lens.head_detector.{name}"
    for name in (
        "CACHE_WITH_SEQ_LIST_ERR",
        "DET_PAT_NOT_SQUARE_ERR",
        "ErrorMeasure",
        "HEAD_NAMES",
        "HeadName",
        "INVALID_HEAD_NAME_ERR",
        "LayerHeadTuple",
        "LayerToHead",
        "SEQ_LEN_ERR",
        "compute_head_attention_similarity_score",
        "detect_head",
        "get_duplicate_token_head_detection_pattern",
        "get_induction_head_detection_pattern",
        "get_previous_token_head_detection_pattern",
        "get_supported_heads",
    )
]
TEXT = "the cat and the cat and the dog"
MEASURES = ["mul", "abs"]


@pytest.fixture(scope="module")
def toy():
    return ours_toy()


@pytest.fixture(scope="module")
def tl_pair():
    pytest.importorskip("transformer_lens")
    return toy_pair()


# -- against TransformerLens ---------------------------------------------------------------------


@pytest.mark.tl
@pytest.mark.parametrize("exclude_current_token", [False, True])
@pytest.mark.parametrize("exclude_bos", [False, True])
@pytest.mark.parametrize("error_measure", MEASURES)
@pytest.mark.parametrize("name", HEAD_NAMES)
def test_scores_as_transformer_lens(
    tl_pair, name, error_measure, exclude_bos, exclude_current_token
):
    from transformer_lens.head_detector import detect_head as theirs

    a, b = tl_pair
    options = {
        "exclude_bos": exclude_bos,
        "exclude_current_token": exclude_current_token,
        "error_measure": error_measure,
    }
    # TransformerLens forgets no option for a list since 3.9.
    for seq in (TEXT, [TEXT, "Hello"]):
        for heads in (None, [(1, 2), (0, 3), (1, 0)], {1: [3]}):
            got = detect_head(a, seq, name, heads, **options)
            want = theirs(b, seq, name, heads, **options)
            assert got.dtype == want.dtype and got.device == want.device
            assert_close_to(got, want, atol=1e-6)
    own = torch.rand(len(TEXT) + 1, len(TEXT) + 1).tril()
    if error_measure == "abs":
        assert_close_to(
            detect_head(a, TEXT, own, **options), theirs(b, TEXT, own, **options), atol=1e-6
        )


@pytest.mark.tl
def test_a_given_cache_is_used_as_by_transformer_lens_and_left_alone(tl_pair):
    from transformer_lens.head_detector import detect_head as theirs

    a, b = tl_pair
    caches = [m.run_with_cache(m.to_tokens(TEXT), remove_batch_dim=True)[1] for m in (a, b)]
    before = {key: value.clone() for key, value in caches[0].items()}
    for measure in MEASURES:
        options = {
            "exclude_bos": True, "exclude_current_token": True, "error_measure": measure,
        }  # fmt: skip
        got = detect_head(a, TEXT, "induction_head", cache=caches[0], **options)
        want = theirs(b, TEXT, "induction_head", cache=caches[1], **options)
        assert_close_to(got, want, atol=1e-6)
        assert_close_to(got, detect_head(a, TEXT, "induction_head", **options), atol=1e-6)
    assert all(torch.equal(caches[0][key], value) for key, value in before.items())
    with_batch = a.run_with_cache(TEXT)[1]
    got = detect_head(a, TEXT, "induction_head", cache=with_batch)
    assert_close_to(got, detect_head(a, TEXT, "induction_head"), atol=1e-6)


@pytest.mark.tl
def test_parts_as_transformer_lens(tl_pair, capsys):
    from transformer_lens import head_detector as theirs

    for name in ("HEAD_NAMES", "HeadName", "ErrorMeasure"):
        assert getattr(theirs, name) == getattr(head_detector, name)
    for name in ("LayerHeadTuple", "LayerToHead"):
        got, want = getattr(head_detector, name), getattr(theirs, name)
        assert typing.get_origin(got) is typing.get_origin(want)
    # The sentences are ours; they are filled in alike.
    for name in (name for name in vars(theirs) if name.endswith("_ERR")):
        got, want = getattr(head_detector, name), getattr(theirs, name)
        assert re.findall("%[sd]", got) == re.findall("%[sd]", want)
    tokens = torch.tensor([[5, 5, 7, 5, 9, 7, 5, 5]])
    attention = torch.rand(8, 8).tril().softmax(-1).tril()
    for name in HEAD_NAMES:
        make = f"get_{name}_detection_pattern"
        got, want = (getattr(module, make)(tokens) for module in (head_detector, theirs))
        assert got.dtype == want.dtype and torch.equal(got, want)
        for measure in MEASURES:
            for bos in (False, True):
                options = {
                    "exclude_bos": bos, "exclude_current_token": not bos, "error_measure": measure,
                }  # fmt: skip
                kept = attention.clone()
                score = compute_head_attention_similarity_score(attention, got, **options)
                assert torch.equal(attention, kept) and isinstance(score, float)
                expected = theirs.compute_head_attention_similarity_score(kept, got, **options)
                assert score == pytest.approx(expected, abs=1e-6)
    get_supported_heads()
    theirs.get_supported_heads()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1]


# -- by hand -------------------------------------------------------------------------------------


def test_patterns_by_hand():
    tokens = torch.tensor([4, 4, 6, 4])
    previous = get_previous_token_head_detection_pattern(tokens)
    assert previous.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    duplicate = get_duplicate_token_head_detection_pattern(tokens[None])
    assert duplicate.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    induction = get_induction_head_detection_pattern(tokens)
    assert induction.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]]
    assert get_previous_token_head_detection_pattern(tokens[:1]).tolist() == [[0]]
    with pytest.raises(ShapeError, match=r"\[pos\] or \[1, pos\], found \[2, 4\]"):
        get_duplicate_token_head_detection_pattern(tokens.repeat(2, 1))


def test_scores_by_hand():
    attention = torch.tensor([[1.0, 0, 0], [0.75, 0.25, 0], [0.5, 0.2, 0.3]])
    wanted = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])

    def score(measure, bos=False, current=False):
        return compute_head_attention_similarity_score(
            attention,
            wanted,
            exclude_bos=bos,
            exclude_current_token=current,
            error_measure=measure,
        )

    assert score("mul") == pytest.approx(0.95 / 3)
    assert score("mul", bos=True) == pytest.approx(0.2 / 0.75)
    assert score("mul", current=True) == pytest.approx(0.95 / 1.45)
    assert score("abs") == 1 - 1.033
    assert score("abs", bos=True, current=True) == 1 - 0.267
    with pytest.raises(HeadDetectorError, match="error_measure='absolute' must be"):
        score("absolute")
    wanted = wanted[:1]
    with pytest.raises(HeadDetectorError, match=r"shape \(3, 3\); its shape is \(1, 3\)"):
        score("mul")


@pytest.mark.parametrize("name", ["gpt2", "llama", "attn_only", "local"])
def test_any_family_and_tokens_instead_of_text(name):
    model = ours(name)
    tokens = torch.tensor([[3, 5, 3, 5, 8]])
    cache = model.run_with_cache(tokens)[1]
    pattern = get_duplicate_token_head_detection_pattern(tokens)
    scores = detect_head(model, tokens, "duplicate_token_head")
    assert torch.equal(scores, detect_head(model, tokens[0], pattern))
    for layer in range(model.cfg.n_layers):
        fraction = (cache["pattern", layer][0] * pattern).sum((-2, -1)) / 5
        assert_close_to(scores[layer], fraction, atol=1e-6)


def test_a_mean_over_texts_with_a_pattern_of_ones_own(toy):
    own = get_previous_token_head_detection_pattern(torch.arange(4))
    texts = ["cat", "dog"]
    want = torch.stack([detect_head(toy, text, own) for text in texts]).mean(0)
    assert torch.equal(detect_head(toy, texts, own), want)
    with pytest.raises(AssertionError, match=r"6 tokens, and its shape is torch.Size\(\[4, 4\]\)"):
        detect_head(toy, ["cat", "horse"], own)


# -- what is computed ----------------------------------------------------------------------------


def test_only_what_is_needed_is_computed(toy):
    seen = []
    with toy.hooks(
        [(lambda name: name.endswith(("attn_out", "logits", "resid_post")), seen_in(seen))]
    ):
        detect_head(toy, TEXT, "induction_head", [(0, 1)])
    assert seen == ["blocks.0.hook_attn_out", "blocks.0.hook_resid_post"]
    assert all(not point.fwd_hooks for point in toy.hook_dict.values())
    called = []
    detect_head_of = toy.run_with_hooks
    toy.run_with_hooks = lambda *a, **k: called.append(k) or detect_head_of(*a, **k)
    detect_head(toy, TEXT, "induction_head", {})
    assert called == []
    detect_head(toy, TEXT, "induction_head", [(1, 0), (1, 2)])
    assert [name for name, _ in called[0]["fwd_hooks"]] == ["blocks.1.attn.hook_pattern"]
    del toy.run_with_hooks


def seen_in(names):
    return lambda x, hook: names.append(hook.name)


def test_heads_counted_from_the_end(toy):
    assert torch.equal(
        detect_head(toy, TEXT, "induction_head", [(-1, -1)]),
        detect_head(toy, TEXT, "induction_head", {1: [3]}),
    )


def test_a_text_as_long_as_the_context(toy):
    """TransformerLens refuses it, and a longer one is cut by its tokenizer first."""
    room = toy.cfg.n_ctx
    assert detect_head(toy, "a" * (room - 1), "previous_token_head").shape == (2, 4)
    with pytest.raises(AssertionError, match="no more than the model's context"):
        detect_head(toy, "a" * room, "previous_token_head")


def test_tokens_in_front_are_no_padding():
    """A tokenizer that pads left made the model mask what the text begins with."""
    toy = ours_toy()
    tokens = toy.to_tokens(TEXT)
    tokens[:, :3] = toy.tokenizer.pad_token_id
    right = detect_head(toy, tokens, "previous_token_head")
    toy.tokenizer.padding_side = "left"
    assert_close_to(detect_head(toy, tokens, "previous_token_head"), right)


# -- what is refused -----------------------------------------------------------------------------


def test_what_is_refused(toy):
    square = torch.eye(len(TEXT) + 1)
    with pytest.raises(AssertionError) as caught:
        detect_head(toy, TEXT, "inductive_head")
    assert str(caught.value) == head_detector.INVALID_HEAD_NAME_ERR % "inductive_head"
    with pytest.raises(AssertionError, match="must be square and lower triangular"):
        detect_head(toy, TEXT, torch.ones_like(square))
    with pytest.raises(AssertionError, match="error_measure='sum'"):
        detect_head(toy, TEXT, square, error_measure="sum")
    with pytest.raises(AssertionError) as caught:
        detect_head(toy, "", "induction_head")
    assert str(caught.value) == head_detector.SEQ_LEN_ERR
    with pytest.raises(LayerError, match="layer 2, head 0; the model has 2 layers of 4"):
        detect_head(toy, TEXT, square, [(2, 0)])
    with pytest.raises(HeadDetectorError, match="empty list"):
        detect_head(toy, [], square)
    cache = toy.run_with_cache("another")[1]
    with pytest.raises(ValueError, match="a cache holds one prompt"):
        detect_head(toy, [TEXT], "induction_head", cache=cache)
    with pytest.raises(HeadDetectorError, match=r"shape \(4, 8, 8\); \[head, 32, 32\] is needed"):
        detect_head(toy, TEXT, square, cache=cache)
    two = toy.run_with_cache([TEXT, TEXT])[1]
    with pytest.raises(HeadDetectorError, match=r"shape \(2, 4, 32, 32\)"):
        detect_head(toy, TEXT, square, cache=two)
    options = {"exclude_bos": False, "exclude_current_token": False, "error_measure": "abs"}
    with pytest.raises(AssertionError, match=r"square; its shape is \(2, 3\)"):
        compute_head_attention_similarity_score(torch.ones(2, 3), square, **options)
    with pytest.raises(AssertionError, match="lower triangular"):
        compute_head_attention_similarity_score(torch.ones(2, 2), torch.eye(2), **options)


def test_weights_other_than_0_and_1_are_warned_of(toy):
    half = torch.eye(len(TEXT) + 1) / 2
    with pytest.warns(UserWarning, match="values other than 0 and 1"):
        scores = detect_head(toy, TEXT, half)
    assert_close_to(scores * 2, detect_head(toy, TEXT, half * 2), atol=1e-6)
    detect_head(toy, TEXT, half, error_measure="abs")
