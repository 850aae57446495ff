import warnings

import pytest
import torch

from fastlens.sampling import Sampling, SamplingError, sample_logits, token_counts

COMPARED = [
    "transformer_lens.utilities.logits_utils.sample_logits",
    "transformer_lens.utilities.sample_logits",
    "transformer_lens.utils.sample_logits",
]
LOGITS = 3 * torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tl_sample_logits():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformer_lens")
        from transformer_lens.utilities import sample_logits
    return sample_logits


@pytest.mark.tl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_k": 1000},
        {"top_p": 0.5},
        {"top_p": 1.0},
        {"top_k": 5, "top_p": 0.1},
        {"freq_penalty": 1.5},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 1.7, "temperature": 0.0},
        {"freq_penalty": 2.0, "repetition_penalty": 0.5, "top_p": 0.8, "temperature": 2.0},
    ],
)
def test_a_seed_draws_what_transformer_lens_draws(tl_sample_logits, options, dtype):
    logits = LOGITS.to(dtype)
    for seed in range(20):
        torch.manual_seed(seed)
        theirs = tl_sample_logits(logits.clone(), tokens=TOKENS, **options)
        torch.manual_seed(seed)
        assert torch.equal(sample_logits(logits, tokens=TOKENS, **options), theirs)


def test_logits_are_not_changed():
    before = LOGITS.clone()
    sample_logits(LOGITS, freq_penalty=1.0, repetition_penalty=2.0, top_k=3, tokens=TOKENS)
    assert torch.equal(LOGITS, before)


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    share = sample_logits(logits).bincount(minlength=3) / len(logits)
    assert (share - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.02
    share = sample_logits(logits, temperature=0.5).bincount(minlength=3) / len(logits)
    assert (share - torch.tensor([0.25, 0.09, 0.04]) / 0.38).abs().max() < 0.02


def test_top_k_and_top_p_keep_the_likely_ones():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(5000, 4)
    assert set(sample_logits(logits, top_k=2).tolist()) == {0, 1}
    # The mass is rounded up: 0.5 alone does not reach 0.6, the first two do.
    assert set(sample_logits(logits, top_p=0.6).tolist()) == {0, 1}
    assert set(sample_logits(logits, top_p=0.01).tolist()) == {0}


def test_penalties_push_said_tokens_away():
    logits = torch.zeros(1000, 3)
    tokens = torch.tensor([[0, 0, 1]]).expand(1000, 3)
    assert set(sample_logits(logits, freq_penalty=50.0, tokens=tokens).tolist()) == {2}
    logits = torch.tensor([[5.0, 4.0, -0.1]]).expand(1000, 3)
    drawn = sample_logits(logits, repetition_penalty=1e4, temperature=0.0, tokens=tokens)
    assert set(drawn.tolist()) == {0}
    drawn = sample_logits(-logits, repetition_penalty=10.0, temperature=0.0, tokens=tokens)
    assert set(drawn.tolist()) == {2}


def test_greedy_looks_at_nothing_but_the_logits():
    greedy = Sampling(do_sample=False, top_k=1, freq_penalty=9.0)
    assert not greedy.needs_counts
    assert torch.equal(greedy.choose(LOGITS), LOGITS.argmax(-1))


def test_counts_leave_out_what_is_masked():
    tokens = torch.tensor([[0, 0, 2], [1, 1, 1]])
    assert token_counts(tokens, 3).tolist() == [[2, 0, 1], [0, 3, 0]]
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    assert token_counts(tokens, 3, mask).tolist() == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"freq_penalty": 1.0}, "needs the tokens so far"),
        # These turned the distribution over, or were dropped without a word.
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"freq_penalty": -1.0}, "freq_penalty=-1.0 must be 0 or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive"),
        ({"repetition_penalty": -2.0}, "repetition_penalty=-2.0 must be positive"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(SamplingError, match=message) as caught:
        sample_logits(LOGITS, **options)
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value, ValueError)
