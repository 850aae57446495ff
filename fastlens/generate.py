"""Generate tokens with any step function: the loop, sampling and stopping. No model here."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.sampling import Sampling, token_counts

# None asks for the logits that follow the prompt; tokens [batch] for those that follow them.
Step = Callable[[Tensor | None], Tensor]


@dataclass(frozen=True)
class Stop:
    """Tokens that end a text, and the one that fills a finished row while others go on."""

    tokens: Sequence[int]
    filler: int


@dataclass
class Generated:
    """New tokens, whether every row stopped, and the logits if they were asked for."""

    tokens: Int[Tensor, "batch new_pos"]
    stopped: bool = False
    logits: tuple[Tensor, ...] | None = None


@dataclass
class Made:
    """What one step made: a token of every row, and whether every row has stopped by now."""

    tokens: Int[Tensor, " batch"]
    stopped: bool
    logits: Float[Tensor, "batch d_vocab"]


# As a decorator, no_grad is off while the generator waits: the caller's own mode holds there.
@torch.no_grad()
def stream_tokens(
    step: Step,
    batch_size: int,
    max_new_tokens: int,
    *,
    device: torch.device | str,
    sampling: Sampling | None = None,
    stop: Stop | None = None,
    prompt: Int[Tensor, "batch pos"] | None = None,
    prompt_mask: Int[Tensor, "batch pos"] | None = None,
    verbose: bool = False,
) -> Generator[Made, None, None]:
    """Call ``step`` and choose a token, until every row has stopped or ``max_new_tokens`` are made.

    Args:
        step: ``step(None)`` gives the logits after the prompt, ``step(tokens)`` those after these
            further tokens; it keeps whatever state that takes. The last tokens are never run.
        stop: None goes on to the end and never waits for the device; otherwise each step asks it
            once whether all rows have stopped.
        prompt, prompt_mask: What the penalties of ``sampling`` count, padding left out. Without a
            prompt they count the new tokens only.
        verbose: Show a progress bar.
    """
    sampling = sampling or Sampling()
    finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
    ends = None if stop is None else torch.tensor(list(stop.tokens), device=device)
    counts, tokens, stopped = None, None, False
    for _ in _counter(max_new_tokens, verbose):
        logits = step(tokens)
        if sampling.needs_counts:
            counts = _count(counts, tokens, logits, prompt, prompt_mask)
        tokens = sampling.choose(logits, counts).to(device)
        if ends is not None and stop is not None:
            tokens = tokens.masked_fill(finished, stop.filler)
            finished |= torch.isin(tokens, ends)
            stopped = bool(finished.all())
        yield Made(tokens, stopped, logits)
        if stopped:
            return


def generate_tokens(
    step: Step,
    batch_size: int,
    max_new_tokens: int,
    *,
    device: torch.device | str,
    keep_logits: bool = False,
    **options: Any,
) -> Generated:
    """All tokens that `stream_tokens` makes, which also says what ``options`` there are.

    Args:
        keep_logits: Keep ``[batch, d_vocab]`` logits of every step.
    """
    new = torch.empty(batch_size, max_new_tokens, dtype=torch.long, device=device)
    kept: list[Tensor] = []
    n_made, stopped = 0, False
    for made in stream_tokens(step, batch_size, max_new_tokens, device=device, **options):
        new[:, n_made] = made.tokens
        n_made, stopped = n_made + 1, made.stopped
        if keep_logits:
            # A step may use its memory again.
            kept.append(made.logits.clone())
    return Generated(new[:, :n_made], stopped, tuple(kept) if keep_logits else None)


def _count(
    counts: Tensor | None,
    tokens: Tensor | None,
    logits: Float[Tensor, "batch d_vocab"],
    prompt: Tensor | None,
    prompt_mask: Tensor | None,
) -> Int[Tensor, "batch d_vocab"]:
    if counts is not None and tokens is not None:
        ones = torch.ones_like(tokens)[:, None]
        return counts.scatter_add_(1, tokens[:, None].to(counts.device), ones.to(counts.device))
    if prompt is None:
        return torch.zeros_like(logits, dtype=torch.long)
    mask = None if prompt_mask is None else prompt_mask.to(logits.device)
    return token_counts(prompt.to(logits.device), logits.shape[-1], mask)


def _counter(n: int, verbose: bool) -> Iterable[int]:
    if not verbose:
        return range(n)
    from tqdm import tqdm

    return tqdm(range(n))
