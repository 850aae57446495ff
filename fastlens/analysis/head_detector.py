"""`detect_head`: how well each head's attention fits a pattern, as TransformerLens measures it.

`fastlens.analysis.head_scores` measures the same kinds of heads on random repeated tokens.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fastlens.cache import ActivationCache
from fastlens.errors import FastlensError, LayerError, ShapeError
from fastlens.patching.model import PatchableModel

HeadName = Literal["previous_token_head", "duplicate_token_head", "induction_head"]
HEAD_NAMES: tuple[HeadName, ...] = get_args(HeadName)
ErrorMeasure = Literal["abs", "mul"]
LayerHeadTuple = tuple[int, int]
LayerToHead = dict[int, list[int]]

INVALID_HEAD_NAME_ERR = (
    f"detection_pattern must be a matrix, or the name of a kind of head, one of {HEAD_NAMES}; "
    "found %s"
)
SEQ_LEN_ERR = (
    "the sequence must have at least two tokens, and no more than the model's context holds"
)
DET_PAT_NOT_SQUARE_ERR = (
    "the detection pattern must be square and lower triangular, with one row a token: there are "
    "%d tokens, and its shape is %s"
)
CACHE_WITH_SEQ_LIST_ERR = (
    "a cache holds one prompt, and seq is a list of several: pass one prompt at a time, or leave "
    "the cache out"
)


class HeadDetectorError(FastlensError, AssertionError, ValueError):
    """`detect_head` cannot do what was asked."""


def detect_head(
    model: PatchableModel,
    seq: str | list[str] | Int[Tensor, "..."],
    detection_pattern: Float[Tensor, "..."] | Int[Tensor, "..."] | str,
    heads: Sequence[tuple[int, int]] | Mapping[int, Sequence[int]] | None = None,
    cache: ActivationCache | Any = None,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: str = "mul",
) -> Float[Tensor, "layer head"]:
    """Score heads by how much their attention looks like ``detection_pattern``.

    Args:
        seq: One text, or several: each is run alone, and the mean of their scores is returned. Or
            the tokens of one text.
        detection_pattern: What attention of such a head looks like, ``[query_pos, key_pos]``, or a
            name of `HEAD_NAMES`, which stands for 0s and 1s made from the tokens.
        heads: Which heads: ``[(layer, head), ...]`` or ``{layer: [head, ...]}``; by default all.
            Only their layers' attention is computed, and nothing above them.
        cache: Activations of ``seq`` if you have them, in which nothing is changed.
        exclude_bos: Leave the first column of the attention out.
        exclude_current_token: Leave the diagonal out.
        error_measure: ``"mul"``: the fraction of the head's attention that falls where the pattern
            is 1 (meant for 0s and 1s; other values give a warning). ``"abs"``: 1 minus the sum of
            ``|attention - pattern|`` over keys, averaged over queries and rounded to three digits:
            from -1 to 1 if rows of the pattern sum to at most 1.

    Returns: a score for each head in ``cfg.dtype``, on the CPU; -1 for heads not asked for.

    Raises: HeadDetectorError (an AssertionError and a ValueError), LayerError for a layer that
        there is not.
    """
    _check_measure(error_measure)
    if isinstance(detection_pattern, str) and detection_pattern not in HEAD_NAMES:
        raise HeadDetectorError(INVALID_HEAD_NAME_ERR % detection_pattern)
    options = {
        "exclude_bos": exclude_bos,
        "exclude_current_token": exclude_current_token,
        "error_measure": error_measure,
    }
    if isinstance(seq, list):
        if cache is not None:
            raise HeadDetectorError(CACHE_WITH_SEQ_LIST_ERR)
        if not seq:
            raise HeadDetectorError("seq is an empty list. Give at least one text.")
        scores = [detect_head(model, text, detection_pattern, heads, **options) for text in seq]
        return torch.stack(scores).mean(0)
    tokens = _tokens(model, seq)
    wanted = _pattern(detection_pattern, tokens)
    if error_measure == "mul" and not bool(((wanted == 0) | (wanted == 1)).all()):
        warnings.warn(
            "the detection pattern has values other than 0 and 1, which error_measure='mul' takes "
            "as weights; 'abs' compares values.",
            stacklevel=2,
        )
    layers = _heads_by_layer(model, heads)
    scores = -torch.ones(model.cfg.n_layers, model.cfg.n_heads, dtype=model.cfg.dtype)

    def score(layer: int, pattern: Tensor) -> None:
        chosen = layers[layer]
        scores[layer, chosen] = _similarity(pattern[chosen], wanted, **options).to(scores.dtype)

    for layer, pattern in _given_patterns(cache, layers, len(wanted)):
        score(layer, pattern)
    if cache is None and layers:
        _run(model, tokens, layers, score)
    return scores


def get_previous_token_head_detection_pattern(
    tokens: Int[Tensor, "..."],
) -> Float[Tensor, "query_pos key_pos"]:
    """1 where the key is the token before the query.

    Args:
        tokens: ``[1, pos]`` or ``[pos]``.
    """
    row = _row(tokens)
    return torch.ones(len(row) - 1, device=row.device).diag(-1)


def get_duplicate_token_head_detection_pattern(
    tokens: Int[Tensor, "..."],
) -> Float[Tensor, "query_pos key_pos"]:
    """1 where the key is an earlier token equal to the query.

    Args:
        tokens: ``[1, pos]`` or ``[pos]``.
    """
    row = _row(tokens)
    return (row[:, None] == row).float().tril(-1)


def get_induction_head_detection_pattern(
    tokens: Int[Tensor, "..."],
) -> Float[Tensor, "query_pos key_pos"]:
    """1 where the key comes right after an earlier token equal to the query.

    The query itself counts where the token before it is the same.

    Args:
        tokens: ``[1, pos]`` or ``[pos]``.
    """
    duplicate = get_duplicate_token_head_detection_pattern(tokens)
    return torch.cat([torch.zeros_like(duplicate[:, :1]), duplicate[:, :-1]], 1)


def get_supported_heads() -> None:
    """Print the kinds of heads that have a name."""
    print(f"Supported heads: {HEAD_NAMES}")  # noqa: T201 - TransformerLens prints here


def compute_head_attention_similarity_score(
    attention_pattern: Float[Tensor, "..."],
    detection_pattern: Shaped[Tensor, "..."],
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    error_measure: str,
) -> float:
    """The score of one head's attention ``[query_pos, key_pos]``; see `detect_head`.

    Neither matrix is changed.
    """
    _check_measure(error_measure)
    if attention_pattern.ndim != 2 or attention_pattern.shape[0] != attention_pattern.shape[1]:
        raise HeadDetectorError(
            f"the attention pattern must be square; its shape is {tuple(attention_pattern.shape)}."
        )
    if detection_pattern.shape != attention_pattern.shape:
        raise HeadDetectorError(
            f"the detection pattern must have the attention pattern's shape "
            f"{tuple(attention_pattern.shape)}; its shape is {tuple(detection_pattern.shape)}."
        )
    options = {
        "exclude_bos": exclude_bos,
        "exclude_current_token": exclude_current_token,
        "error_measure": error_measure,
    }
    return _similarity(attention_pattern[None], detection_pattern, **options).item()


def _check_measure(error_measure: str) -> None:
    if error_measure not in get_args(ErrorMeasure):
        raise HeadDetectorError(
            f"error_measure={error_measure!r} must be one of {get_args(ErrorMeasure)}."
        )


_PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "previous_token_head": get_previous_token_head_detection_pattern,
    "duplicate_token_head": get_duplicate_token_head_detection_pattern,
    "induction_head": get_induction_head_detection_pattern,
}


def _similarity(
    attention: Float[Tensor, "head query_pos key_pos"],
    wanted: Shaped[Tensor, "query_pos key_pos"],
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    error_measure: str,
) -> Float[Tensor, " head"]:
    """Scores of several heads; those of "abs" in float64, to keep three digits apart."""
    excluded = torch.zeros_like(wanted, dtype=torch.bool)
    if exclude_bos:
        excluded[:, 0] = True
    if exclude_current_token:
        excluded.fill_diagonal_(True)
    wanted = wanted.to(attention.device)
    excluded = excluded.to(attention.device)
    if error_measure == "mul":
        attention = attention.masked_fill(excluded, 0.0)
        return (attention * wanted).sum((-2, -1)) / attention.sum((-2, -1))
    difference = (attention - wanted).abs()
    if bool(difference.triu(1).any()):
        raise HeadDetectorError("'abs' compares lower triangular matrices; these are not.")
    mean = difference.masked_fill(excluded, 0.0).mean((-2, -1)) * wanted.shape[-1]
    return 1 - mean.double().round(decimals=3)


def _row(tokens: Tensor) -> Int[Tensor, " pos"]:
    if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and len(tokens) != 1):
        raise ShapeError(
            f"a detection pattern is that of one text: tokens must be [pos] or [1, pos], found "
            f"{list(tokens.shape)}."
        )
    return tokens.flatten()


def _tokens(model: PatchableModel, seq: str | Tensor) -> Int[Tensor, "1 pos"]:
    """Never cut: the pattern of a longer text is not that of its beginning."""
    if isinstance(seq, Tensor):
        tokens = _row(seq)[None].to(model.cfg.device)
    else:
        tokens = model.to_tokens(seq, truncate=False).to(model.cfg.device)
    if not 1 < tokens.shape[1] <= model.cfg.n_ctx:
        raise HeadDetectorError(SEQ_LEN_ERR)
    return tokens


def _pattern(asked: Tensor | str, tokens: Tensor) -> Shaped[Tensor, "query_pos key_pos"]:
    pattern = _PATTERNS[asked](tokens) if isinstance(asked, str) else asked
    n = tokens.shape[1]
    if pattern.shape != (n, n) or bool(pattern.triu(1).any()):
        raise HeadDetectorError(DET_PAT_NOT_SQUARE_ERR % (n, pattern.shape))
    return pattern.to(tokens.device)


def _heads_by_layer(
    model: PatchableModel,
    heads: Sequence[tuple[int, int]] | Mapping[int, Sequence[int]] | None,
) -> dict[int, list[int]]:
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    if heads is None:
        return {layer: list(range(n_heads)) for layer in range(n_layers)}
    if isinstance(heads, Mapping):
        pairs = [(layer, head) for layer, chosen in heads.items() for head in chosen]
    else:
        pairs = [(layer, head) for layer, head in heads]
    found: dict[int, list[int]] = {}
    for layer, head in pairs:
        if not -n_layers <= layer < n_layers or not -n_heads <= head < n_heads:
            raise LayerError(
                f"heads names layer {layer}, head {head}; the model has {n_layers} layers of "
                f"{n_heads} heads."
            )
        found.setdefault(layer % n_layers, []).append(head % n_heads)
    return found


def _given_patterns(
    cache: Any, layers: Mapping[int, Sequence[int]], n: int
) -> list[tuple[int, Float[Tensor, "head query_pos key_pos"]]]:
    if cache is None:
        return []
    found = []
    for layer in layers:
        pattern = cache["pattern", layer, "attn"]
        pattern = pattern[0] if pattern.ndim == 4 and len(pattern) == 1 else pattern
        if pattern.ndim != 3 or pattern.shape[-2:] != (n, n):
            raise HeadDetectorError(
                f"the cache's attention in layer {layer} has shape {tuple(pattern.shape)}; "
                f"[head, {n}, {n}] is needed, of the one text that seq is."
            )
        found.append((layer, pattern))
    return found


def _run(
    model: PatchableModel,
    tokens: Tensor,
    layers: Mapping[int, Sequence[int]],
    score: Callable[[int, Tensor], None],
) -> None:
    """One forward as far as the last layer needed; a pattern is gone once it has its scores."""

    def reader(layer: int) -> Callable[[Tensor, Any], None]:
        return lambda pattern, hook: score(layer, pattern[0])

    hooks = [(f"blocks.{layer}.attn.hook_pattern", reader(layer)) for layer in layers]
    # One text has no padding: where a tokenizer pads left, tokens in front could be taken for it.
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        model.run_with_hooks(
            tokens, fwd_hooks=hooks, stop_at_layer=max(layers) + 1, attention_mask=mask
        )
