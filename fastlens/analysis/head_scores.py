"""`head_scores`: which heads look at the previous token, at a duplicate, or do induction."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.errors import FastlensError, ShapeError, did_you_mean
from fastlens.patching.model import PatchableModel
from fastlens.scores import Scores

DEFAULT_SEQ_LEN = 50


class _Repeated(NamedTuple):
    """``[BOS] R R``: tokens, whether BOS is in front, and the length of R."""

    tokens: Tensor
    n_bos: int
    length: int


def head_scores(
    model: PatchableModel,
    *,
    seq_len: int | None = None,
    batch: int = 4,
    seed: int = 0,
    kinds: Sequence[str] = ("induction", "previous_token", "duplicate_token"),
    tokens: Int[Tensor, "batch pos"] | None = None,
) -> Scores:
    """How much of each head's attention goes where a known kind of head looks.

    The model reads random tokens R twice, ``[BOS] R R``, with ``n = seq_len`` tokens in R, so that
    nothing but repetition can be used. A is the attention pattern; each score is a mean over the
    rows named here and over the batch, between 0 and 1 (Olsson et al. 2209.11895):

    * ``previous_token``: ``A[i, i-1]``, all rows whose previous token is in R or its copy.
    * ``duplicate_token``: ``A[i, i-n]``, the n rows of the copy: the same token before.
    * ``induction``: ``A[i, i-(n-1)]``, the n rows of the copy: what followed the same token.

    Args:
        seq_len: Tokens in R; by default 50, or fewer if the model's context holds fewer.
        batch: Sequences.
        seed: Of the random tokens, drawn without repetition in a sequence (where the vocabulary
            allows) and without the tokenizer's special tokens.
        kinds: Which scores.
        tokens: Your own sequences instead: ``R R``, or with one token in front if their number is
            odd.

    BOS is put in front if ``cfg.default_prepend_bos`` and the tokenizer has one: many heads rest on
    the first token, which must not be taken for one of R.

    Returns: `Scores` with axes ``("kind", "layer", "head")``. ``meta`` holds the next-token loss on
    both halves, in nats per token, over tokens 2 to n of each: a model with induction heads has the
    second far below the first.

    Cost: one forward. One layer's pattern is in memory at a time.

    Raises: ShapeError for tokens that are not a sequence twice, or do not fit the context.
    """
    kinds = _checked(kinds)
    repeated = _given(tokens) if tokens is not None else _random(model, seq_len, batch, seed)
    if repeated.tokens.shape[1] > model.cfg.n_ctx:
        raise ShapeError(
            f"two times {repeated.length} tokens do not fit the model's context of "
            f"{model.cfg.n_ctx}. Use a smaller seq_len."
        )
    n_layers = model.cfg.n_layers
    means: dict[int, Tensor] = {}

    def reader(layer: int) -> Callable[[Tensor, Any], None]:
        def read(pattern: Tensor, hook: Any) -> None:
            means[layer] = torch.stack([_mean_at(pattern, repeated, kind) for kind in kinds], dim=1)

        return read

    hooks = [(f"blocks.{layer}.attn.hook_pattern", reader(layer)) for layer in range(n_layers)]
    with torch.no_grad():
        losses = model.run_with_hooks(
            repeated.tokens, return_type="loss", loss_per_token=True, fwd_hooks=hooks
        )
    per_example = torch.stack([means[layer] for layer in range(n_layers)], dim=2).float().cpu()
    # Column t of the losses is that of token t + 1.
    start = repeated.n_bos
    first = losses[:, start : start + repeated.length - 1]
    second = losses[:, start + repeated.length :]
    return Scores(
        values=per_example.mean(0),
        axes=("kind", "layer", "head"),
        labels={
            "kind": kinds,
            "layer": [f"L{layer}" for layer in range(n_layers)],
            "head": [f"H{head}" for head in range(per_example.shape[-1])],
        },
        unit="mean attention",
        title="attention on repeated random tokens",
        per_example=per_example,
        meta={
            "model": model.cfg.model_name,
            "seq_len": repeated.length,
            "batch": repeated.tokens.shape[0],
            "seed": None if tokens is not None else seed,
            "prepend_bos": bool(repeated.n_bos),
            "loss_first_half": float(first.double().mean()),
            "loss_second_half": float(second.double().mean()),
        },
    )


# How far back a head of each kind looks, given the length of R.
_KINDS: dict[str, Callable[[int], int]] = {
    "induction": lambda n: n - 1,
    "previous_token": lambda n: 1,
    "duplicate_token": lambda n: n,
}


def _checked(kinds: Sequence[str]) -> list[str]:
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in kinds:
        if kind not in _KINDS:
            raise FastlensError(
                f"no kind of head named {kind!r}; there are {', '.join(_KINDS)}."
                f"{did_you_mean(kind, _KINDS)}"
            )
    if not kinds:
        raise FastlensError(f"kinds is empty. Give some of {', '.join(_KINDS)}.")
    return kinds


def _mean_at(
    pattern: Float[Tensor, "batch head query_pos key_pos"], repeated: _Repeated, kind: str
) -> Float[Tensor, "batch head"]:
    """Mean attention to the key that is a fixed distance back."""
    back = _KINDS[kind](repeated.length)
    first = repeated.n_bos + (1 if kind == "previous_token" else repeated.length)
    diagonal = pattern.diagonal(-back, dim1=-2, dim2=-1)  # [batch, head, row - back]
    return diagonal[..., first - back :].float().mean(-1)


def _given(tokens: Tensor) -> _Repeated:
    n_bos = tokens.shape[1] % 2
    length = tokens.shape[1] // 2
    halves = tokens[:, n_bos : n_bos + length], tokens[:, n_bos + length :]
    if length < 2 or not torch.equal(*halves):
        raise ShapeError(
            f"tokens of shape {list(tokens.shape)} are not a sequence of at least two tokens twice "
            f"(with one token in front if their number is odd). Leave tokens out for random ones."
        )
    return _Repeated(tokens, n_bos, length)


def _random(model: PatchableModel, seq_len: int | None, batch: int, seed: int) -> _Repeated:
    cfg = model.cfg
    tokenizer = getattr(model, "tokenizer", None)
    bos = getattr(tokenizer, "bos_token_id", None) if cfg.default_prepend_bos else None
    n_bos = int(bos is not None)
    if seq_len is None:
        seq_len = min(DEFAULT_SEQ_LEN, (cfg.n_ctx - n_bos) // 2)
    if seq_len < 2 or batch < 1:
        raise ShapeError(f"seq_len={seq_len} must be at least 2 and batch={batch} at least 1.")
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    # Embeddings are often padded beyond the tokens there are.
    n_tokens = cfg.d_vocab if tokenizer is None else min(cfg.d_vocab, len(tokenizer))
    ordinary = torch.tensor([i for i in range(n_tokens) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    if len(ordinary) >= seq_len:
        picks = [torch.randperm(len(ordinary), generator=generator)[:seq_len] for _ in range(batch)]
        rows = ordinary[torch.stack(picks)]
    else:
        rows = ordinary[torch.randint(len(ordinary), (batch, seq_len), generator=generator)]
    front = torch.full((batch, n_bos), bos or 0)
    return _Repeated(torch.cat([front, rows, rows], 1).to(cfg.device), n_bos, seq_len)
