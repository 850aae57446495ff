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
    """Clean and corrupted tokens, position by position comparable.

    Attributes:
        mask: 0 for padding, the same for both; None lets the model see to it.
        is_padded: Whether pairs of different lengths were padded here, on the left.
    """

    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"] | None = None
    is_padded: bool = False

    @property
    def batch(self) -> int:
        """Pairs of prompts."""
        return self.clean.shape[0]

    @property
    def n_pos(self) -> int:
        """Tokens per prompt."""
        return self.clean.shape[1]

    def check_not_padding(self, positions: Sequence[int]) -> None:
        """Raises: SweepError for a prompt whose position, one each, is padding."""
        if self.mask is None:
            return
        for number, (row, position) in enumerate(zip(self.mask, positions, strict=True)):
            if row[position] == 0:
                raise SweepError(
                    f"position {position} of prompt {number} is padding, where there is no answer "
                    f"to read. Give position= one for each prompt, or pad on the left."
                )

    def base_and_source(self, direction: str) -> tuple[Tensor, Tensor]:
        """The tokens that are run, and those whose activations are put in."""
        if direction == "denoising":
            return self.corrupted, self.clean
        return self.clean, self.corrupted


def prompts_of(
    model: PatchableModel, clean: Any, corrupted: Any, attention_mask: Any = None
) -> Prompts:
    """Both prompts (see `Prompt`) as tokens.

    Pairs of different lengths are padded on the left, so that the last position is each prompt's
    last token.

    Args:
        attention_mask: 0 for padding in tokens given as ``[batch, pos]``.

    Raises: SweepError if a pair's token counts differ (both tokenizations are shown), or the number
        of prompts, or if the mask does not fit; TokenError for ids outside the vocabulary.
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
    if not lengths[0] > 0 or lengths[-1] > model.cfg.n_ctx:
        raise SweepError(
            f"the prompts have {', '.join(map(str, lengths))} tokens; the model takes 1 to "
            f"{model.cfg.n_ctx}."
        )
    if len(lengths) == 1:
        mask = _checked_mask(attention_mask, torch.stack(clean_rows))
        return Prompts(torch.stack(clean_rows), torch.stack(corrupted_rows), mask)
    if attention_mask is not None:
        raise SweepError("attention_mask goes with tokens [batch, pos], not with ragged prompts.")
    pad = _pad_token(model)
    masks = [torch.ones_like(row) for row in clean_rows]
    return Prompts(
        _padded(clean_rows, pad), _padded(corrupted_rows, pad), _padded(masks, 0), is_padded=True
    )


def _padded(rows: list[Tensor], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.stack(
        [torch.cat([row.new_full((longest - len(row),), value), row]) for row in rows]
    )


def _pad_token(model: PatchableModel) -> int:
    """A token to fill with; it is masked, so any will do."""
    token = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    return 0 if token is None or not 0 <= token < model.cfg.d_vocab else int(token)


def _checked_mask(mask: Any, tokens: Tensor) -> Tensor | None:
    if mask is None:
        return None
    mask = torch.as_tensor(mask, device=tokens.device)
    if mask.shape != tokens.shape:
        raise SweepError(
            f"attention_mask has shape {list(mask.shape)}, the prompts {list(tokens.shape)}: they "
            f"must be the same."
        )
    if bool(((mask != 0) & (mask != 1)).any()):
        raise SweepError(
            "attention_mask holds other values than 0 (padding) and 1. A mask that is added to "
            "scores (0 for tokens, a large negative number for padding) is not one."
        )
    return mask.long()


def position_labels(model: PatchableModel, prompts: Prompts) -> list[str]:
    """``"The:0"``: the token and its position; ``"Eiffel/Colosseum:1"`` (clean/corrupted) where
    the prompts differ, the bare position where pairs differ among themselves or there is no
    tokenizer, counted from the end where pairs have different lengths."""
    numbers = [str(position) for position in range(prompts.n_pos)]
    if prompts.is_padded:
        return [str(position - prompts.n_pos) for position in range(prompts.n_pos)]
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
