import pytest
import torch

from fastlens.generate import Stop, generate_tokens
from fastlens.sampling import Sampling

GREEDY = Sampling(do_sample=False)
D_VOCAB = 10


class Counting:
    """A step whose next token is the last plus one; the first is ``starts`` of each row."""

    def __init__(self, starts):
        self.last = torch.tensor(starts) - 1
        self.calls = []

    def __call__(self, new):
        self.calls.append(None if new is None else new.tolist())
        self.last = self.last + 1 if new is None else new + 1
        return torch.nn.functional.one_hot(self.last % D_VOCAB, D_VOCAB).float()


def test_greedy_follows_the_largest_logit_and_never_runs_the_last_token():
    step = Counting([1, 5])
    made = generate_tokens(step, 2, 3, device="cpu", sampling=GREEDY)
    assert made.tokens.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert step.calls == [None, [1, 5], [2, 6]]
    assert not made.stopped and made.logits is None


def test_rows_that_stopped_are_filled_until_all_have():
    step = Counting([1, 4, 3])
    stop = Stop([5, 6], filler=9)
    made = generate_tokens(step, 3, 8, device="cpu", sampling=GREEDY, stop=stop)
    assert made.tokens.tolist() == [[1, 2, 3, 4, 5], [4, 5, 9, 9, 9], [3, 4, 5, 9, 9]]
    assert made.stopped and len(step.calls) == 5


def test_stopping_at_the_last_step_counts_as_stopped():
    made = generate_tokens(
        Counting([1]), 1, 2, device="cpu", sampling=GREEDY, stop=Stop([2], filler=2)
    )
    assert made.stopped and made.tokens.tolist() == [[1, 2]]


def test_no_steps_make_no_tokens():
    step = Counting([1])
    made = generate_tokens(step, 1, 0, device="cpu")
    assert made.tokens.shape == (1, 0) and step.calls == []


def test_logits_are_kept_as_they_were():
    buffer = torch.zeros(1, D_VOCAB)

    def step(new):
        buffer.zero_()[0, 3 if new is None else 4] = 1
        return buffer

    made = generate_tokens(step, 1, 2, device="cpu", sampling=GREEDY, keep_logits=True)
    assert len(made.logits) == 2
    assert made.logits[0].argmax() == 3 and made.logits[1].argmax() == 4


def test_penalties_count_prompt_and_new_tokens_but_not_padding():
    seen = []

    class Spy(Sampling):
        def choose(self, logits, counts=None):
            seen.append(counts.tolist())
            return logits.argmax(-1)

    generate_tokens(
        Counting([1, 1]),
        2,
        2,
        device="cpu",
        sampling=Spy(freq_penalty=1.0),
        prompt=torch.tensor([[0, 0, 2], [0, 3, 3]]),
        prompt_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
    )
    first, second = ([row[:4] for row in counts] for counts in seen)
    assert first == [[1, 0, 1, 0], [1, 0, 0, 2]]
    assert second == [[1, 1, 1, 0], [1, 1, 0, 2]]


def test_penalties_without_a_prompt_count_new_tokens():
    made = generate_tokens(
        lambda new: torch.zeros(1, 3),
        1,
        3,
        device="cpu",
        sampling=Sampling(freq_penalty=1e4),
    )
    assert sorted(made.tokens[0].tolist()) == [0, 1, 2]


def test_a_progress_bar_is_shown_when_asked_for(capsys):
    generate_tokens(Counting([1]), 1, 2, device="cpu", sampling=GREEDY)
    assert capsys.readouterr().err == ""
    generate_tokens(Counting([1]), 1, 2, device="cpu", sampling=GREEDY, verbose=True)
    assert "/2" in capsys.readouterr().err


def test_memory_that_was_never_written_is_not_returned(poison_empty):
    stop = Stop([3], filler=3)
    made = generate_tokens(Counting([1]), 1, 50, device="cpu", sampling=GREEDY, stop=stop)
    assert made.tokens.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("stops", [True, False])
def test_the_device_is_asked_only_where_stopping_needs_it(monkeypatch, stops):
    asked = 0
    real = torch.Tensor.__bool__

    def counted(tensor):
        nonlocal asked
        asked += 1
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "__bool__", counted)
    monkeypatch.setattr(torch.Tensor, "item", None)
    stop = Stop([D_VOCAB - 1], filler=0) if stops else None
    generate_tokens(
        lambda new: torch.zeros(2, D_VOCAB).index_fill(1, torch.tensor([1]), 5.0),
        2,
        4,
        device="cpu",
        sampling=Sampling(freq_penalty=0.1, top_k=1),
        stop=stop,
    )
    assert asked == (4 if stops else 0)
