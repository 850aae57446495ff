"""The loss of a batch from a dataset of tokens, without its padding."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.errors import FastlensError
from fastlens.tokens import get_prompt_mask


class BatchError(FastlensError, KeyError, ValueError):
    """A batch that is not what a dataset of tokens gives."""


def batch_loss(model: Any, batch: Mapping[str, Any]) -> Float[Tensor, ""]:
    """Next-token cross-entropy of ``batch["tokens"]``, in nats, a mean over pairs of tokens.

    Padding counts for nothing: places where ``batch["attention_mask"]`` is 0, or without one the
    pad tokens at either end of a row if padding is all that they can be. Where the pad token is
    also BOS or EOS (GPT-2), such a run may be text, as empty documents are, and counts: give a
    mask. Differentiable.

    Raises: BatchError (a KeyError) without tokens.
    """
    if "tokens" not in batch:
        raise BatchError(
            f"a batch needs 'tokens' [batch, pos]; it has {sorted(map(str, batch))}. "
            f"utils.tokenize_and_concatenate makes such a dataset of texts."
        )
    tokens = batch["tokens"]
    mask, tokenizer = batch.get("attention_mask"), getattr(model, "tokenizer", None)
    mask = _sure_padding(tokenizer, tokens) if mask is None else mask
    if mask is None and getattr(tokenizer, "padding_side", None) == "left":
        # Else the model takes a leading run of pad tokens for padding, whatever else they are.
        mask = torch.ones_like(tokens)
    if mask is not None:
        mask = mask.to(model.cfg.device)
    tokens = tokens.to(model.cfg.device)
    return model(tokens, return_type="loss", attention_mask=mask)


def _sure_padding(
    tokenizer: Any, tokens: Int[Tensor, "batch pos"]
) -> Int[Tensor, "batch pos"] | None:
    """Its mask, or None where there is none to be sure of."""
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or pad in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return None
    # Asked where the tokens are now: a loader leaves them on the CPU, where nothing waits.
    mask = get_prompt_mask(tokenizer, tokens, prepend_bos=False, padding_side="right")
    return None if bool(mask.all()) else mask
