"""What a sweep measures: small functions of the logits at one position of each example.

Each is a `Metric`: call it with logits ``[batch, pos, d_vocab]`` and it gives one number per
example. Answers are token ids or strings that are one token each; strings are looked up in the
model's tokenizer when a sweep starts (or by `Metric.bind`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fastlens.errors import MetricError, SweepError, TokenError
from fastlens.patching.model import PatchableModel

Position: TypeAlias = int | Sequence[int]
Answer: TypeAlias = int | str | Sequence[int] | Sequence[str] | Int[Tensor, "..."]
NORMALIZED_UNIT = "fraction of the clean-corrupted gap"


@dataclass(frozen=True, eq=False)
class Metric:
    """A number per example, read from the logits at one position.

    >>> metric = logit_diff(2, 0)
    >>> metric(torch.tensor([[[1.0, 2.0, 4.0]]]))
    tensor([3.])

    Attributes:
        name: Shown in titles.
        unit: Of what calling it returns.
        formula: ``formula(rows [batch, d_vocab], *tokens [batch]) -> [batch]``.
        answers: The tokens the formula gets: ids, or strings until `bind`. One for all examples, or
            one per example.
        position: Where the logits are read, one for all or one per example; negative counts from
            the end.
        normalize: In a sweep, report ``(value - corrupted) / (clean - corrupted)``: 0 is the
            corrupted run, 1 the clean one, whichever is patched into the other. The gap is that of
            the mean over examples. Calling the metric gives the plain value.
        is_of_answers: The formula looks at the answers' logits alone.
        clean_log_probs: The clean run's log-probabilities at the position, where the formula needs
            them (``needs_clean``); set by `with_clean`.
    """

    name: str
    unit: str
    formula: Callable[..., Tensor]
    answers: tuple[Answer, ...] = ()
    position: Position = -1
    normalize: bool = False
    needs_clean: bool = False
    is_of_answers: bool = False
    clean_log_probs: Float[Tensor, "batch d_vocab"] | None = None

    @property
    def label(self) -> str:
        """The name with the answers, if there is one for all examples."""
        if not self.answers or not all(isinstance(a, int | str) for a in self.answers):
            return self.name
        return f"{self.name} ({' vs '.join(map(repr, self.answers))})"

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        """The metric of each example, not normalised."""
        batch, n_pos = logits.shape[0], logits.shape[1]
        positions = self.positions(batch, n_pos)
        return self.of_rows(logits[torch.arange(batch, device=logits.device), positions])

    def positions(self, batch: int, n_pos: int) -> list[int]:
        """The position read of each example, counted from the start.

        Raises: MetricError if one is out of range, or there is not one for each.
        """
        listed = [self.position] if isinstance(self.position, int) else list(self.position)
        listed = listed * batch if len(listed) == 1 else listed
        if len(listed) != batch:
            raise MetricError(
                f"{self.name} has {len(listed)} positions for {batch} examples. "
                f"Give one for all, or one for each."
            )
        for position in listed:
            if not -n_pos <= position < n_pos:
                raise MetricError(
                    f"{self.name} reads position {position}, and the logits have {n_pos} positions."
                )
        return [position % n_pos for position in listed]

    def of_rows(self, rows: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """The metric from the logits at its position alone.

        Numerics: 16-bit logits are widened to float32 first.
        """
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()
        tokens = [self._ids(answer, rows) for answer in self.answers]
        if not self.needs_clean:
            return self.formula(rows, *tokens)
        if self.clean_log_probs is None:
            raise MetricError(
                f"{self.name} compares with the clean run, which it has not seen: use it in a "
                f"sweep, or call metric.with_clean(clean_logits) first."
            )
        return self.formula(rows, self.clean_log_probs.to(rows), *tokens)

    def _ids(self, answer: Answer, rows: Tensor) -> Tensor:
        if not isinstance(answer, Tensor):
            if isinstance(answer, str) or not all(isinstance(a, int) for a in _listed(answer)):
                raise MetricError(
                    f"{self.name} has the answer {answer!r} as text: use it in a sweep, call "
                    f"metric.bind(model) first, or give token ids."
                )
            answer = torch.tensor(_listed(answer))
        ids = answer.to(rows.device).reshape(-1)
        if ids.numel() not in (1, rows.shape[0]):
            raise MetricError(
                f"{self.name} has {ids.numel()} answers for {rows.shape[0]} examples. "
                f"Give one for all, or one for each."
            )
        return ids.expand(rows.shape[0])

    def bind(self, model: PatchableModel) -> "Metric":
        """The metric with its answers as token ids.

        Raises: TokenError for an answer that is several tokens, or an id outside the vocabulary.
        """
        return replace(self, answers=tuple(token_ids(model, answer) for answer in self.answers))

    def with_clean(self, clean_logits: Float[Tensor, "batch pos d_vocab"]) -> "Metric":
        """The metric with the clean run's distribution at its position to compare with."""
        batch, n_pos = clean_logits.shape[0], clean_logits.shape[1]
        examples = torch.arange(batch, device=clean_logits.device)
        return self.with_clean_rows(clean_logits[examples, self.positions(batch, n_pos)])

    def with_clean_rows(self, rows: Float[Tensor, "batch d_vocab"]) -> "Metric":
        """As `with_clean`, from the clean run's logits at the metric's position alone."""
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return replace(self, clean_log_probs=rows.to(wide).log_softmax(-1))

    def of_many(
        self,
        rows: Float[Tensor, "row column"],
        example: Int[Tensor, " row"],
        columns: Int[Tensor, " column"] | None = None,
    ) -> Float[Tensor, " row"]:
        """The metric of any number of rows at once, each of some example. The metric is bound.

        Args:
            columns: The token ids that ``rows`` hold, rising; None is the whole vocabulary.
        """
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()
        answers = []
        for answer in self.answers:
            assert isinstance(answer, Tensor)
            ids = answer.to(rows.device)
            ids = ids.expand(len(example)) if ids.numel() == 1 else ids[example]
            answers.append(
                ids if columns is None else torch.searchsorted(columns, ids.contiguous())
            )
        if self.clean_log_probs is not None:
            return self.formula(rows, self.clean_log_probs.to(rows)[example], *answers)
        return self.formula(rows, *answers)


def logit_diff(
    answer: Answer, wrong: Answer, *, position: Position = -1, normalize: bool = False
) -> Metric:
    """``logit[answer] - logit[wrong]``, in logits (Wang et al. 2211.00593).

    Unlike a probability it does not saturate, and a shift of all logits leaves it alone.

    Args:
        answer, wrong: Token id or one-token string, or one per example.
        position, normalize: See `Metric`.
    """
    return Metric(
        *("logit difference", "logits", _difference, (answer, wrong), position, normalize),
        is_of_answers=True,
    )


def answer_logit(answer: Answer, *, position: Position = -1, normalize: bool = False) -> Metric:
    """``logit[answer]``, in logits. A change that lifts every logit alike counts here."""
    return Metric(
        "answer logit", "logits", _pick, (answer,), position, normalize, is_of_answers=True
    )


def answer_prob(answer: Answer, *, position: Position = -1, normalize: bool = False) -> Metric:
    """``softmax(logits)[answer]``, a probability (Meng et al. 2202.05262)."""
    return Metric("answer probability", "probability", _prob, (answer,), position, normalize)


def cross_entropy(answer: Answer, *, position: Position = -1, normalize: bool = False) -> Metric:
    """``-log softmax(logits)[answer]``, in nats: the loss on that next token."""
    return Metric("cross-entropy", "nats", _cross_entropy, (answer,), position, normalize)


def kl_divergence(*, position: Position = -1, normalize: bool = False) -> Metric:
    """``KL(clean || patched)`` of the next-token distributions, in nats (Conmy et al. 2304.14997).

    Zero where the patched run predicts what the clean run predicts. Needs no answer.
    """
    return Metric("KL from clean", "nats", _kl, (), position, normalize, needs_clean=True)


def token_ids(model: PatchableModel, answer: Answer) -> Int[Tensor, " answers"]:
    """Token ids of an answer: one id, or one per example.

    Raises: TokenError for a string of several tokens (they are shown), for an id outside the
        vocabulary, or for no answer at all.
    """
    listed = answer.reshape(-1).tolist() if isinstance(answer, Tensor) else _listed(answer)
    ids = [int(model.to_single_token(one)) if isinstance(one, str) else int(one) for one in listed]
    if not ids:
        raise TokenError("the answer is an empty list. Give a token.")
    for one in ids:
        if not 0 <= one < model.cfg.d_vocab_out:
            raise TokenError(
                f"the answer token {one} is not in the vocabulary of {model.cfg.d_vocab_out}."
            )
    return torch.tensor(ids)


def _listed(answer: Any) -> list[Any]:
    return [answer] if isinstance(answer, (int, str)) else list(answer)


def _pick(rows: Tensor, ids: Tensor) -> Tensor:
    return rows.gather(-1, ids[:, None])[:, 0]


def _difference(rows: Tensor, answer: Tensor, wrong: Tensor) -> Tensor:
    return _pick(rows, answer) - _pick(rows, wrong)


def _prob(rows: Tensor, answer: Tensor) -> Tensor:
    return _pick(rows.softmax(-1), answer)


def _cross_entropy(rows: Tensor, answer: Tensor) -> Tensor:
    return -_pick(rows.log_softmax(-1), answer)


def _kl(rows: Tensor, clean_log_probs: Tensor) -> Tensor:
    log_ratio = clean_log_probs - rows.log_softmax(-1)
    # A token that the clean run rules out adds nothing, even where the ratio is infinite.
    terms = clean_log_probs.exp() * log_ratio
    return terms.masked_fill(clean_log_probs == -torch.inf, 0.0).sum(-1)


# -- how a sweep reads any metric ----------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A metric as a sweep calls it: a `Metric` or a user's function, its result checked.

    Attributes:
        metric: Bound `Metric`, or any pure ``f(logits [batch, pos, d_vocab])`` that returns a
            scalar or ``[batch]``.
        batch: Examples per run.
        positions: For a `Metric`, the position it reads of each example; None for a function.
        name: What to call the metric in titles and messages.
        normalize: Report fractions of the gap between clean and corrupted run.
    """

    metric: Callable[[Any], Any]
    batch: int
    positions: tuple[int, ...] | None
    name: str
    normalize: bool = False

    @property
    def unit(self) -> str:
        """Of the plain value; a user's function has none."""
        return self.metric.unit if isinstance(self.metric, Metric) else ""

    @property
    def needs_clean(self) -> bool:
        """Whether the metric compares with the clean run's distribution."""
        return isinstance(self.metric, Metric) and self.metric.needs_clean

    def with_clean(self, clean_logits: Float[Tensor, "batch pos d_vocab"]) -> "Reading":
        """The reading with the clean run's distribution, where the metric compares with it."""
        if not isinstance(self.metric, Metric) or not self.needs_clean:
            return self
        return replace(self, metric=self.metric.with_clean(clean_logits))

    def of_logits(self, logits: Float[Tensor, "batch pos d_vocab"], run: str) -> Tensor:
        """The value for one run: 0-d or ``[batch]``.

        Args:
            run: Which run it is, for the message.

        Raises: MetricError for another shape, a type that is no number, or NaN.
        """
        return self.checked(self.metric(logits), run)

    def checked(self, value: Any, run: str) -> Shaped[Tensor, "..."]:
        """What the metric returned, on the CPU in at least 32 bits.

        Raises: MetricError as `of_logits`.
        """
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value), dtype=torch.float64)
        self.check_shape(value, run)
        value = (value if value.requires_grad else value.detach()).cpu()
        value = value if value.is_floating_point() else value.float()
        if bool(value.isnan().any()):
            raise MetricError(f"the metric {self.name!r} returned NaN for {run}.")
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value

    def check_shape(self, value: Any, run: str) -> None:
        """Raises: MetricError unless the value is a real scalar or ``[batch]``."""
        if isinstance(value, int | float):
            return
        if not isinstance(value, Tensor) or value.is_complex():
            raise MetricError(
                f"the metric {self.name!r} returned {type(value).__name__} for {run}; it must "
                f"return a real tensor: a scalar, or [batch] = [{self.batch}]."
            )
        if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != self.batch):
            raise MetricError(
                f"the metric {self.name!r} returned shape {list(value.shape)} for {run}; it must "
                f"return a scalar or [batch] = [{self.batch}]. Reduce the other axes in it."
            )

    def stacked(self, values: Sequence[Tensor]) -> Shaped[Tensor, "run ..."]:
        """Values of several runs as one tensor.

        Raises: MetricError if some are scalars and others ``[batch]``.
        """
        if any(value.shape != values[0].shape for value in values):
            raise MetricError(
                f"the metric {self.name!r} returned a scalar for some runs and [batch] for others. "
                f"It must return one of them."
            )
        return torch.stack(list(values))

    def refuse_nan(self, values: Float[Tensor, "run batch"], runs: Sequence[str]) -> None:
        """Raises: MetricError naming the first run whose value is NaN."""
        wrong = values.isnan().any(1).nonzero()
        if len(wrong):
            raise MetricError(f"the metric {self.name!r} returned NaN for {runs[int(wrong[0])]}.")


def reading_of(metric: Any, model: PatchableModel, n_pos: int, batch: int) -> Reading:
    """The metric ready to be called, its strings looked up; `Reading.with_clean` completes it.

    Raises: SweepError for something that is no metric; TokenError, MetricError for answers or
        positions that do not fit.
    """
    if not callable(metric):
        raise SweepError(
            f"metric={metric!r} is no metric. Give one of fastlens.patching's "
            f"(logit_diff(' Paris', ' Rome')) or a function of the logits."
        )
    if not isinstance(metric, Metric):
        named = getattr(metric, "name", None) or getattr(metric, "__name__", "<lambda>")
        return Reading(metric, batch, None, "metric" if named == "<lambda>" else str(named))
    positions = tuple(metric.positions(batch, n_pos))
    bound = metric.bind(model)
    for answer in bound.answers:
        assert isinstance(answer, Tensor)
        if answer.numel() not in (1, batch):
            raise MetricError(
                f"{metric.name} has {answer.numel()} answers for {batch} examples. "
                f"Give one for all, or one for each."
            )
    return Reading(bound, batch, positions, metric.label, metric.normalize)
