"""Generate tokens with any step function: the loop, sampling and stopping. No model here."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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


@torch.no_grad()
def generate_tokens(
    step: Step,
    batch_size: int,
    max_new_tokens: int,
    *,
    device: torch.device | str,
    sampling: Sampling | None = None,
    stop: Stop | None = None,
    prompt: Int[Tensor, "batch pos"] | None = None,
    prompt_mask: Int[Tensor, "batch pos"] | None = None,
    keep_logits: bool = False,
    verbose: bool = False,
) -> Generated:
    """Call ``step`` and choose a token, until every row has stopped or ``max_new_tokens`` are made.

    Args:
        step: ``step(None)`` gives the logits after the prompt, ``step(tokens)`` those after these
            further tokens; it keeps whatever state that takes. The last tokens are never run.
        stop: None goes on to the end and never waits for the device; otherwise each step asks it
            once whether all rows have stopped.
        prompt, prompt_mask: What the penalties of ``sampling`` count, padding left out. Without a
            prompt they count the new tokens only.
        keep_logits: Keep ``[batch, d_vocab]`` logits of every step.
        verbose: Show a progress bar.
    """
    sampling = sampling or Sampling()
    made = torch.empty(batch_size, max_new_tokens, dtype=torch.long, device=device)
    finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
    ends = None if stop is None else torch.tensor(list(stop.tokens), device=device)
    kept: list[Tensor] = []
    counts, tokens, n_made, stopped = None, None, 0, False
    for index in _counter(max_new_tokens, verbose):
        logits = step(tokens)
        if keep_logits:
            kept.append(logits.clone())
        if sampling.needs_counts:
            counts = _count(counts, tokens, logits, prompt, prompt_mask)
        tokens = sampling.choose(logits, counts).to(device)
        if ends is not None and stop is not None:
            tokens = tokens.masked_fill(finished, stop.filler)
            finished |= torch.isin(tokens, ends)
        made[:, index] = tokens
        n_made = index + 1
        stopped = ends is not None and bool(finished.all())
        if stopped:
            break
    return Generated(made[:, :n_made], stopped, tuple(kept) if keep_logits else None)


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
