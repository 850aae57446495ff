"""Draw the next token from logits: temperature, top-k, top-p and penalties, as TransformerLens."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.errors import FastlensError


class SamplingError(FastlensError, AssertionError, ValueError):
    """A sampling parameter is out of range or lacks what it needs."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; see `sample_logits` for each field.

    ``do_sample=False`` takes the largest logit and looks at nothing else.
    """

    do_sample: bool = True
    top_k: int | None = None
    top_p: float | None = None
    temperature: float = 1.0
    freq_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k <= 0:
            raise SamplingError(f"top_k={self.top_k} must be at least 1, or None for no limit.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise SamplingError(f"top_p={self.top_p} must be in (0, 1], or None for no limit.")
        # Negated, so that NaN is refused too.
        if not self.temperature >= 0.0:
            raise SamplingError(
                f"temperature={self.temperature} must be 0 (take the largest logit) or more."
            )
        if not self.freq_penalty >= 0.0:
            raise SamplingError(f"freq_penalty={self.freq_penalty} must be 0 or more.")
        if not self.repetition_penalty > 0.0:
            raise SamplingError(
                f"repetition_penalty={self.repetition_penalty} must be positive; 1 changes nothing."
            )

    @property
    def needs_counts(self) -> bool:
        """Whether `choose` reads how often each token has occurred."""
        return self.do_sample and (self.freq_penalty > 0 or self.repetition_penalty != 1.0)

    def choose(
        self,
        logits: Float[Tensor, "batch d_vocab"],
        counts: Int[Tensor, "batch d_vocab"] | None = None,
    ) -> Int[Tensor, " batch"]:
        """One token a row.

        Args:
            counts: How often each token has occurred; needed where `needs_counts`.
        """
        if not self.do_sample:
            return logits.argmax(-1)
        if counts is not None and self.repetition_penalty != 1.0:
            penalty = self.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(counts > 0, penalised, logits)
        if self.temperature == 0.0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.freq_penalty > 0:
            if counts is None:
                raise SamplingError(
                    f"freq_penalty={self.freq_penalty} needs the tokens so far. Pass tokens=, or "
                    f"leave freq_penalty at 0."
                )
            logits = (logits - self.freq_penalty * counts).to(logits.dtype)
        logits = self._keep_likely(logits).to(torch.float32)
        # As torch.distributions.Categorical draws, without its checks that wait for the device.
        probs = (logits - logits.logsumexp(-1, keepdim=True)).softmax(-1)
        return torch.multinomial(probs, 1, replacement=True)[:, 0]

    def _keep_likely(self, logits: Float[Tensor, "batch d_vocab"]) -> Tensor:
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.shape[-1]), -1).values[:, -1:]
            return logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(descending=True)
            reached = ordered.softmax(-1).cumsum(-1) > self.top_p
            # A token goes only if those before it already reach top_p: the mass is rounded up.
            dropped = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], -1)
            return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
        return logits


def token_counts(
    tokens: Int[Tensor, "batch pos"], d_vocab: int, mask: Int[Tensor, "batch pos"] | None = None
) -> Int[Tensor, "batch d_vocab"]:
    """How often each token of the vocabulary occurs in each row; masked places do not count."""
    ones = torch.ones_like(tokens, dtype=torch.long) if mask is None else mask.long()
    counts = torch.zeros(tokens.shape[0], d_vocab, dtype=torch.long, device=tokens.device)
    return counts.scatter_add_(1, tokens.long(), ones)


def sample_logits(
    final_logits: Float[Tensor, "batch d_vocab"],
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    tokens: Int[Tensor, "batch pos"] | None = None,
) -> Int[Tensor, " batch"]:
    """One token a row, drawn from the softmax of the logits.

    In this order: the repetition penalty, the temperature, the frequency penalty, then top-k or
    top-p. The same torch seed draws what TransformerLens 3 draws.

    Args:
        top_k: Draw from the ``top_k`` largest logits; more than there are means all.
        top_p: Draw from the fewest tokens whose probability reaches ``top_p`` (Holtzman et al.
            1904.09751). Not looked at if ``top_k`` is given.
        temperature: Divides the logits; 0 takes the largest.
        freq_penalty: Subtracted from a logit for each time its token occurs in ``tokens``. Not
            looked at if the temperature is 0.
        repetition_penalty: Of the logits of tokens that occur in ``tokens``, positive ones are
            divided by it, negative ones multiplied (Keskar et al. 1909.05858); 1 changes nothing.
        tokens: What has been said so far. Needed by the frequency penalty.

    Raises: SamplingError (an AssertionError and a ValueError) for values out of range.
    """
    sampling = Sampling(
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        freq_penalty=freq_penalty,
        repetition_penalty=repetition_penalty,
    )
    counts = None
    if tokens is not None and sampling.needs_counts:
        counts = token_counts(tokens, final_logits.shape[-1])
    return sampling.choose(final_logits, counts)
