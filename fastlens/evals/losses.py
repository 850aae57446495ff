"""Next-token losses: of one sentence, of a dataset, and of random tokens that repeat."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.errors import FastlensError, TokenError
from fastlens.evals.loaders import DATASET_LOADERS, DATASET_NAMES
from fastlens.model.batch_loss import batch_loss
from fastlens.tokens import lm_cross_entropy_loss, override_or_use_default_value

# Olah et al., "Zoom In: An Introduction to Circuits" (2020), the first sentences.
_ZOOM_IN = (
    "Many important transition points in the history of science have been moments when science "
    "'zoomed in.' At these points, we develop a visualization or tool that allows us to see the "
    "world in a new level of detail, and a new field of science develops to study the world "
    "through this lens."
)
_RANDOM_TOKENS = (100, 20_000)


class EvalError(FastlensError, ValueError):
    """There is nothing to evaluate, or it does not fit the model."""


def sanity_check(model: Any) -> Float[Tensor, ""]:
    """Loss of a few English sentences, in nats per token.

    A language model that works has less than 5, one that is broken more than 7.
    """
    return model(_ZOOM_IN, return_type="loss")


@torch.no_grad()
def evaluate_on_dataset(
    model: Any,
    data_loader: Iterable[Mapping[str, Any]],
    truncate: int = 100,
    device: torch.device | str = "cuda",
) -> float:
    """Mean over batches of the mean loss of each, in nats per token.

    Args:
        data_loader: Batches with ``"tokens"``; see `fastlens.model.batch_loss` for padding.
        truncate: Stop after ``truncate + 1`` batches.
        device: TransformerLens' argument, not looked at: tokens go where the model is.

    Raises: EvalError if there is no batch.
    """
    from tqdm import tqdm

    losses: list[float] = []
    for batch in tqdm(data_loader):
        losses.append(batch_loss(model, batch).item())
        if len(losses) > truncate:
            break
    if not losses:
        raise EvalError(
            "the data loader gave no batch. With drop_last=True it needs at least batch_size rows."
        )
    return sum(losses) / len(losses)


@torch.no_grad()
def induction_loss(
    model: Any,
    tokenizer: Any = None,
    batch_size: int = 4,
    subseq_len: int = 384,
    prepend_bos: bool | None = None,
    device: torch.device | str = "cuda",
) -> Float[Tensor, ""]:
    """Loss on random tokens the second time they are read, in nats per token.

    Near the logarithm of the vocabulary for a model without induction heads, far below it for one
    with them. `fastlens.analysis.head_scores` finds the heads.

    Args:
        tokenizer: Whose BOS is used; by default the model's.
        batch_size, subseq_len: So many rows of ``subseq_len`` random tokens, each twice. Tokens 100
            to 19,999 are drawn, or what of them the vocabulary has.
        prepend_bos: Put BOS in the place of the first token; by default
            ``cfg.default_prepend_bos``.
        device: TransformerLens' argument, not looked at: tokens go where the model is.

    A torch seed draws TransformerLens' tokens, where the vocabulary has them all.

    Raises: EvalError if that does not fit the context, TokenError if there is no BOS.
    """
    cfg = model.cfg
    if 2 * subseq_len > cfg.n_ctx:
        raise EvalError(
            f"two times {subseq_len} tokens do not fit the model's context of {cfg.n_ctx}. Use "
            f"subseq_len={cfg.n_ctx // 2}."
        )
    high = min(_RANDOM_TOKENS[1], cfg.d_vocab)
    low = min(_RANDOM_TOKENS[0], high // 2)
    tokens = torch.randint(low, high, (batch_size, subseq_len)).repeat(1, 2)
    if override_or_use_default_value(cfg.default_prepend_bos, prepend_bos):
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        bos = getattr(tokenizer, "bos_token_id", None)
        if bos is None:
            raise TokenError(
                "a BOS is wanted in front, and there is no tokenizer that has one. Pass "
                "tokenizer=, or prepend_bos=False."
            )
        tokens[:, 0] = bos
    tokens = tokens.to(cfg.device)
    # Nothing here is padding, though some tokenizers' pad token may be drawn or be the BOS.
    logits = model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))
    losses = lm_cross_entropy_loss(logits, tokens, per_token=True)
    return losses[:, subseq_len + 1 :].mean()


def evaluate(
    model: Any, truncate: int = 100, batch_size: int = 8, tokenizer: Any = None
) -> dict[str, float]:
    """`evaluate_on_dataset` on the four corpora of `DATASET_LOADERS`, fetched from the hub.

    Returns: ``{"wiki_loss": ..., "owt_loss": ..., "pile_loss": ..., "code_loss": ...}``. Each is
        printed as well, as soon as it is known.

    Raises: SourceError if the hub cannot be reached and its cache has no copy.
    """
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    losses = {}
    for name, make_loader in zip(DATASET_NAMES, DATASET_LOADERS, strict=True):
        loader = make_loader(tokenizer=tokenizer, batch_size=batch_size)
        losses[f"{name}_loss"] = evaluate_on_dataset(model, loader, truncate=truncate)
        print(f"{name}: {losses[f'{name}_loss']}")  # noqa: T201 - TransformerLens prints here
    return losses
