"""`logit_lens`: what the model would answer if it stopped after each layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.rows import logits_of, normalized
from fastlens.errors import FastlensError, TokenError, did_you_mean
from fastlens.patching.metrics import Answer, token_ids
from fastlens.patching.model import PatchableModel, check_patchable
from fastlens.patching.prompts import Prompt, Prompts, position_labels, prompt_record, prompts_of
from fastlens.patching.runs import Selection, chosen
from fastlens.patching.strategy import strategy_of
from fastlens.scores import Scores

# What is measured -> its unit.
MEASURES = {
    "logit": "logits",
    "logit_diff": "logits",
    "probability": "probability",
    "rank": "rank",
}
OF_ANSWERS = ("logit", "logit_diff")
# Logits that are held at once, bytes.
LOGIT_BYTES = 64 * 2**20


def logit_lens(
    model: PatchableModel,
    prompts: Prompt,
    answer: Answer | None = None,
    wrong: Answer | None = None,
    *,
    measure: str | Sequence[str] | None = None,
    positions: Selection = None,
    attention_mask: Any = None,
) -> Scores:
    """An answer read off the residual stream after every layer (nostalgebraist 2020).

    The stream goes through the final norm, with statistics of its own, and the unembedding, bias
    and soft-cap included: after the last layer these are the model's own logits.

    >>> logit_lens(model, "The Eiffel Tower is in the city of", " Paris").plot("lens.png")
    >>> logit_lens(model, texts, names, others, positions=-1)   # logit difference by layer

    Args:
        prompts: Text, a list of texts, or tokens ``[batch, pos]``; texts of different lengths are
            padded on the left.
        answer: A token id or a string of one token, or one for each prompt. By default, at every
            position, the token that the whole model puts first there: when does it know?
        wrong: What the answer's logit is compared with, for ``"logit_diff"``.
        measure: ``"probability"``; ``"logit"``; ``"logit_diff"``: ``logit[answer] -
            logit[wrong]``; ``"rank"``: how many tokens are before the answer, 0 where it is the
            first choice. A list gives a first axis ``metric``. By default ``"logit_diff"`` where
            ``wrong`` is given, else ``"probability"``.
        positions: An index, several, or a slice; negative ones count from the end.
        attention_mask: 0 for padding, for tokens given as ``[batch, pos]``.

    Returns: `Scores` with axes ``("layer", "pos")``; the first row, ``embed``, is what enters the
    first layer. Where the whole vocabulary was looked at, ``meta["top_tokens"]`` has the first
    choice by layer and position, of the first prompt. Padding is NaN in ``per_example`` and left
    out of ``values``.

    Cost: one forward, and one unembedding a layer at the positions that are read: of the answers'
    columns alone for ``"logit"`` and ``"logit_diff"``.

    Raises: TokenError for answers of several tokens, FastlensError for measures that do not go with
        them; SweepError for prompts or positions that do not fit.
    """
    check_patchable(model)
    measures = _measures(measure, wrong)
    given = prompts_of(model, prompts, prompts, attention_mask)
    at = chosen(positions, given.n_pos, "positions")
    ids = [token_ids(model, one) for one in (answer, wrong) if one is not None]
    for one in ids:
        if one.numel() not in (1, given.batch):
            raise TokenError(
                f"{one.numel()} answers for {given.batch} prompts. Give one for all, or one for "
                f"each."
            )
    if wrong is not None and answer is None:
        raise FastlensError("wrong= is what an answer is compared with: give answer= too.")
    with torch.no_grad():
        lens = _Lens(model, given, at)
        shape = (given.batch, len(at))
        if answer is None:
            ids = [torch.cat([part.argmax(-1) for part in lens.logits(-1)]).view(shape)]
        ids = [one.to(given.clean.device).view(-1, len(at) if answer is None else 1) for one in ids]
        ids = [one.expand(shape).reshape(-1) for one in ids]
        found, top = lens.read(measures, ids)
    found = found.view(len(measures), len(lens.streams), *shape)
    if given.mask is not None:
        found = found.masked_fill(given.mask[:, at].cpu() == 0, torch.nan)
    per_example = found.movedim(2, 0)  # [batch, measure, layer, pos]
    meta = {
        "model": model.cfg.model_name,
        "prompts": prompt_record(prompts),
        "answers": [one.view(shape).tolist() for one in ids],
    }
    if top is not None:
        meta["top_tokens"] = _named(model, top.view(len(lens.streams), *shape)[:, 0])
    labels = {
        "layer": ["embed", *(f"L{layer}" for layer in range(model.cfg.n_layers))],
        "pos": [position_labels(model, given)[position] for position in at],
    }
    axes = ("layer", "pos")
    several = not (measure is None or isinstance(measure, str))
    if several:
        axes, labels = ("metric", *axes), {"metric": list(measures), **labels}
    else:
        per_example = per_example[:, 0]
    name = "" if model.cfg.model_name == "custom" else f"{model.cfg.model_name}: "
    said = _said(answer, wrong)
    return Scores(
        values=per_example.nanmean(0),
        axes=axes,
        labels=labels,
        unit="" if several else MEASURES[measures[0]],
        title=f"{name}logit lens, {', '.join(measures).replace('_', ' ')}{said}",
        per_example=per_example,
        meta=meta,
        by_metric={
            one: {
                "unit": MEASURES[one],
                "title": f"{name}logit lens, {one.replace('_', ' ')}{said}",
            }
            for one in (measures if several else ())
        },
    )


def _measures(measure: str | Sequence[str] | None, wrong: Any) -> tuple[str, ...]:
    if measure is None:
        measure = "probability" if wrong is None else "logit_diff"
    listed = (measure,) if isinstance(measure, str) else tuple(measure)
    for one in listed:
        if one not in MEASURES:
            raise FastlensError(
                f"no measure {one!r}; there are {', '.join(MEASURES)}.{did_you_mean(one, MEASURES)}"
            )
        if (one == "logit_diff") and wrong is None:
            raise FastlensError("logit_diff compares with another answer: give wrong= too.")
    if not listed or len(set(listed)) < len(listed):
        raise FastlensError(f"measure={measure!r} is empty or names one twice.")
    return listed


def _said(answer: Any, wrong: Any) -> str:
    if answer is None:
        return " of the model's own first choice"
    if not all(isinstance(one, int | str) for one in (answer, wrong) if one is not None):
        return ""
    return f" of {answer!r}" if wrong is None else f" of {answer!r} vs {wrong!r}"


def _named(model: Any, top: Int[Tensor, "layer pos"]) -> list[list[Any]]:
    """Tokens as text, or as ids where there is no tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        return top.tolist()
    return [[str(token) for token in model.to_str_tokens(row)] for row in top]


@dataclass
class _Lens:
    """The residual stream of one run before the first layer and after each, and how to read it.

    Attributes:
        streams: One ``[batch, pos, d_model]`` for each: at the chosen positions, or at all where
            hooks or modules of a user's read them.
    """

    model: Any
    prompts: Prompts
    at: Sequence[int]

    def __post_init__(self) -> None:
        model = self.model
        n_layers = model.cfg.n_layers
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
        names.append(f"blocks.{n_layers - 1}.hook_resid_post")
        kept: dict[str, Tensor] = {}
        # Hooks and modules of a user's go on seeing whole activations.
        self.is_plain = strategy_of(model).is_wave

        def keep(activation: Tensor, hook: Any) -> None:
            activation = activation.detach()
            kept[hook.name] = self._chosen(activation) if self.is_plain else activation.clone()

        masked = {} if self.prompts.mask is None else {"attention_mask": self.prompts.mask}
        model.run_with_hooks(
            self.prompts.clean,
            return_type=None,
            stop_at_layer=n_layers,
            fwd_hooks=[(name, keep) for name in names],
            **masked,
        )
        self.streams = [kept[name] for name in names]

    def logits(
        self, number: int, columns: Int[Tensor, " column"] | None = None
    ) -> "list[Float[Tensor, 'row column']]":
        """Logits of one stream's rows, some rows at a time."""
        stream = self.streams[number]
        cfg = self.model.cfg
        if not self.is_plain:
            whole = self.model(stream, start_at_layer=cfg.n_layers)
            logits = self._chosen(whole).flatten(0, 1)
            return [_wide(logits if columns is None else logits[:, columns])]
        rows, final = stream.flatten(0, 1), getattr(self.model, "ln_final", None)
        width = cfg.d_vocab_out if columns is None else len(columns)
        parts = []
        for part in rows.split(max(1, LOGIT_BYTES // (4 * width))):
            part = part if final is None else normalized(final, part)
            parts.append(_wide(logits_of(self.model.unembed, part, columns)))
        return parts

    def _chosen(self, activation: Tensor) -> Tensor:
        return activation[:, torch.tensor(list(self.at), device=activation.device)]

    def read(
        self, measures: Sequence[str], ids: Sequence[Int[Tensor, " row"]]
    ) -> tuple[Float[Tensor, "measure layer row"], Int[Tensor, "layer row"] | None]:
        """The measures of every stream's rows, and the first choices if all logits were made."""
        columns = None
        if all(one in OF_ANSWERS for one in measures):
            columns, where = torch.cat(list(ids)).unique(return_inverse=True)
            ids = where.view(len(ids), -1).unbind()
        found, top = [], []
        for number in range(len(self.streams)):
            start, parts = 0, []
            for logits in self.logits(number, columns):
                rows = slice(start, start := start + len(logits))
                parts.append(_measured(measures, logits, [one[rows] for one in ids]))
                if columns is None:
                    top.append(logits.argmax(-1).cpu())
            found.append(torch.cat(parts, 1))
        tops = torch.cat(top).view(len(self.streams), -1) if columns is None else None
        return torch.stack(found, 1), tops


def _measured(
    measures: Sequence[str], logits: Float[Tensor, "row column"], ids: Sequence[Tensor]
) -> Float[Tensor, "measure row"]:
    mine = [logits.gather(-1, one[:, None])[:, 0] for one in ids]
    values = {
        "logit": lambda: mine[0],
        "logit_diff": lambda: mine[0] - mine[1],
        "probability": lambda: (mine[0] - logits.logsumexp(-1)).exp(),
        "rank": lambda: (logits > mine[0][:, None]).sum(-1).to(logits),
    }
    return torch.stack([values[one]() for one in measures]).cpu()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
