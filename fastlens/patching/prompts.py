"""The two prompts of a sweep as tokens of one shape, and what to call their positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from fastlens.errors import SweepError, TokenError
from fastlens.patching.model import PatchableModel
from fastlens.tokens import align_tokenizations

Prompt: TypeAlias = str | Sequence[str] | Int[Tensor, "..."]
Direction: TypeAlias = Literal["denoising", "noising"]


@dataclass(frozen=True, eq=False)
class Prompts:
    """Clean and corrupted tokens, position by position comparable."""

    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]

    @property
    def batch(self) -> int:
        """Pairs of prompts."""
        return self.clean.shape[0]

    @property
    def n_pos(self) -> int:
        """Tokens per prompt."""
        return self.clean.shape[1]

    def base_and_source(self, direction: str) -> tuple[Tensor, Tensor]:
        """The tokens that are run, and those whose activations are put in."""
        if direction == "denoising":
            return self.corrupted, self.clean
        return self.clean, self.corrupted


def prompts_of(model: PatchableModel, clean: Any, corrupted: Any) -> Prompts:
    """Both prompts (see `Prompt`) as tokens.

    Raises: SweepError if their token counts differ (both tokenizations are shown), or the number
        of prompts; TokenError for ids outside the vocabulary.
    """
    clean_rows = _rows(model, clean, "clean")
    corrupted_rows = _rows(model, corrupted, "corrupted")
    if len(clean_rows) != len(corrupted_rows):
        raise SweepError(
            f"{len(clean_rows)} clean prompts and {len(corrupted_rows)} corrupted ones. Give pairs."
        )
    for i, (a, b) in enumerate(zip(clean_rows, corrupted_rows, strict=True)):
        if len(a) != len(b):
            which = "" if len(clean_rows) == 1 else f"pair {i}: "
            shown = align_tokenizations(_strings(model, a), _strings(model, b))
            raise SweepError(
                f"{which}the clean prompt has {len(a)} tokens and the corrupted one {len(b)}; "
                f"patching goes position by position. Reword one until they line up.\n{shown}"
            )
    lengths = sorted({len(row) for row in clean_rows})
    if len(lengths) > 1:
        raise SweepError(
            f"the pairs have {', '.join(map(str, lengths))} tokens. One sweep needs pairs of one "
            f"length: sweep each length by itself."
        )
    if not 0 < lengths[0] <= model.cfg.n_ctx:
        raise SweepError(
            f"the prompts have {lengths[0]} tokens; the model takes 1 to {model.cfg.n_ctx}."
        )
    return Prompts(torch.stack(clean_rows), torch.stack(corrupted_rows))


def position_labels(model: PatchableModel, prompts: Prompts) -> list[str]:
    """``"The:0"``: the token and its position; ``"Eiffel/Colosseum:1"`` (clean/corrupted) where
    the prompts differ, the bare position where pairs differ among themselves or there is no
    tokenizer."""
    numbers = [str(position) for position in range(prompts.n_pos)]
    if getattr(model, "tokenizer", None) is None:
        return numbers
    labels = []
    for position, number in enumerate(numbers):
        pairs = {
            (int(a), int(b))
            for a, b in zip(prompts.clean[:, position], prompts.corrupted[:, position], strict=True)
        }
        if len(pairs) > 1:
            labels.append(number)
            continue
        names = _strings(model, torch.tensor(pairs.pop()))
        labels.append(f"{'/'.join(dict.fromkeys(names))}:{number}")
    return labels


def prompt_record(prompt: Prompt) -> Any:
    """A prompt as it is kept beside the scores: its text, or its tokens."""
    if isinstance(prompt, Tensor):
        return prompt.tolist()
    return prompt if isinstance(prompt, str) else list(prompt)


def _rows(model: PatchableModel, prompt: Any, which: str) -> list[Tensor]:
    if isinstance(prompt, Tensor):
        if prompt.is_floating_point() or prompt.dtype == torch.bool or prompt.ndim not in (1, 2):
            raise SweepError(
                f"{which} must be text, a list of texts or integer tokens [batch, pos]; got a "
                f"{prompt.dtype} tensor of shape {list(prompt.shape)}."
            )
        rows = list(prompt if prompt.ndim == 2 else prompt[None])
        for row in rows:
            bad = row[(row < 0) | (row >= model.cfg.d_vocab)]
            if len(bad):
                raise TokenError(
                    f"{which} holds token {int(bad[0])}; the vocabulary has {model.cfg.d_vocab}."
                )
    else:
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise SweepError(
                f"{which} must be text, a list of texts or integer tokens [batch, pos]; got "
                f"{type(prompt).__name__}."
            )
        rows = [model.to_tokens(text, truncate=False)[0] for text in texts]
    if not rows:
        raise SweepError(f"{which} is empty. Give at least one prompt.")
    return [row.to(device=model.cfg.device, dtype=torch.long) for row in rows]


def _strings(model: PatchableModel, row: Tensor) -> list[str]:
    if getattr(model, "tokenizer", None) is None:
        return [str(int(token)) for token in row]
    return [str(token) for token in model.to_str_tokens(row)]
