"""Text to tokens: BOS and padding policy, masks, positions, next-token loss. No model here.

A tokenizer is any Hugging Face tokenizer; transformers itself is never imported.
"""

import copy
import difflib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.errors import ShapeError, TokenError

USE_DEFAULT_VALUE = None

_SIDES = ("left", "right")
# Rows of logits normalised at a time where no gradient is wanted: 16 MB at a vocabulary of 50,000.
_LOSS_ROWS_BYTES = 2**24


def override_or_use_default_value(default_flag: Any, override: Any = None) -> Any:
    """``override`` unless it is None (`USE_DEFAULT_VALUE`), else ``default_flag``."""
    return default_flag if override is None else override


class LocallyOverridenDefaults:
    """Within the ``with`` block, ``cfg.default_prepend_bos`` and ``tokenizer.padding_side`` are
    what the arguments say; afterwards, whatever happened, they are what they were.

    None (`USE_DEFAULT_VALUE`) leaves a default alone, and a model without tokenizer has no padding
    side to change. Nothing changes before every argument has been checked.
    """

    def __init__(self, model: Any, **overrides: Any):
        allowed = {"prepend_bos": (None, True, False), "padding_side": (None, *_SIDES)}
        for name, value in overrides.items():
            if name not in allowed:
                raise TokenError(f"{name!r} cannot be overridden here, only {list(allowed)} can.")
            if value not in allowed[name]:
                raise TokenError(f"{name}={value!r} must be one of {allowed[name]}.")
        self.model = model
        self.overrides = overrides
        self._restore: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "LocallyOverridenDefaults":
        places = {
            "prepend_bos": (self.model.cfg, "default_prepend_bos"),
            "padding_side": (self.model.tokenizer, "padding_side"),
        }
        for name, value in self.overrides.items():
            owner, attribute = places[name]
            if owner is not None and value is not None:
                self._restore.append((owner, attribute, getattr(owner, attribute)))
                setattr(owner, attribute, value)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._restore:
            setattr(*self._restore.pop())


# -- tokenizers ----------------------------------------------------------------------------------


def get_tokenizer_with_bos(tokenizer: Any) -> Any:
    """A tokenizer that puts its BOS in front of every text by itself, where it can.

    TransformerLens loads the tokenizer again with ``add_bos_token=True``; this sets the same flag
    on a copy, so tokens added since it was loaded stay and nothing is read or fetched. The caller's
    tokenizer is not changed. Where a tokenizer cannot (no BOS, a BOS its post-processor cannot
    spell, a Python tokenizer without the flag, one that cannot be copied), it comes back as it is,
    and BOS is prepended to the text instead.
    """
    if tokenizer.bos_token is None or getattr(tokenizer, "add_bos_token", None) in (None, True):
        return tokenizer
    try:
        with_bos = copy.deepcopy(tokenizer)
        with_bos.add_bos_token = True
    except Exception:
        # What tokenizers raises is a bare Exception: a part written in Python cannot be copied, a
        # post-processor template cannot hold a ':' (Seed-OSS), or the BOS has no id.
        return tokenizer
    return with_bos


def prepends_something(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a token (normally BOS) in front of a text.

    A tokenizer that only appends one, as T5's does, does not count.
    """
    added = tokenizer.encode("")
    if not added:
        return False
    plain = tokenizer.encode("a", add_special_tokens=False)
    if not plain:
        # The vocabulary has no such letter, so which side it was added on cannot be seen.
        return added[0] == tokenizer.bos_token_id
    return tokenizer.encode("a")[: len(plain)] != plain


def token_is_known(tokenizer: Any, token: str | None) -> bool:
    """Whether ``token`` is one entry of the vocabulary (an id that stands for UNK is not)."""
    if token is None:
        return False
    token_id = tokenizer.convert_tokens_to_ids(token)
    unknown = getattr(tokenizer, "unk_token_id", None)
    return token_id is not None and (token_id != unknown or token == tokenizer.unk_token)


def get_input_with_manually_prepended_bos(
    bos_token: str | None, input: str | Sequence[str]
) -> str | list[str]:
    """``bos_token`` in front of each text; the texts as they are if it is None."""
    if bos_token is None:
        return input if isinstance(input, str) else list(input)
    return bos_token + input if isinstance(input, str) else [bos_token + text for text in input]


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    prepend_bos: bool,
    tokenizer_prepends_bos: bool,
    padding_side: str = "right",
    max_length: int | None = None,
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Tokens of each text and their mask (0 for padding), padded to the longest text.

    Args:
        prepend_bos: Whether BOS is wanted in front.
        tokenizer_prepends_bos: Whether the tokenizer puts it there itself; then it is cut off where
            it is not wanted, else it is added to the text where it is wanted and exists.
        padding_side: "left" or "right".
        max_length: Cut longer texts to this many tokens, the wanted BOS included.

    Raises: TokenError if lengths differ and the tokenizer has no pad token.
    """
    texts = list(texts)
    if not texts:
        raise TokenError("an empty list of texts was given. Give at least one text.")
    if prepend_bos and not tokenizer_prepends_bos:
        bos = tokenizer.bos_token if token_is_known(tokenizer, tokenizer.bos_token) else None
        texts = get_input_with_manually_prepended_bos(bos, texts)
    cut_bos = tokenizer_prepends_bos and not prepend_bos
    # The BOS that is cut off afterwards must not cost a token of text.
    limit = None if max_length is None else max_length + cut_bos
    rows = tokenizer(texts, truncation=limit is not None, max_length=limit)["input_ids"]
    rows = [row[1:] for row in rows] if cut_bos else rows
    return pad_rows(rows, tokenizer.pad_token_id, padding_side)


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int | None, padding_side: str = "right"
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Rows of token ids as one tensor, and its mask: 1 for a token, 0 for padding."""
    length = max(len(row) for row in rows)
    if pad_token_id is None and any(len(row) < length for row in rows):
        raise TokenError(
            f"texts of {sorted({len(row) for row in rows})} tokens cannot share a batch: the "
            f"tokenizer has no pad token. Give it one, for example "
            f"tokenizer.add_special_tokens({{'pad_token': '<pad>'}})."
        )
    tokens, mask = [], []
    for row in rows:
        pads = length - len(row)
        before, after = (pads, 0) if padding_side == "left" else (0, pads)
        tokens.append([pad_token_id] * before + list(row) + [pad_token_id] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
    return torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


# -- masks and positions -------------------------------------------------------------------------


def get_cumsum_along_dim(
    tensor: Int[Tensor, "..."] | Bool[Tensor, "..."] | Float[Tensor, "..."],
    dim: int,
    reverse: bool = False,
) -> Int[Tensor, "..."] | Float[Tensor, "..."]:
    """Cumulative sum along ``dim``, from its end if ``reverse``."""
    return tensor.flip(dim).cumsum(dim).flip(dim) if reverse else tensor.cumsum(dim)


def get_attention_mask(
    tokenizer: Any,
    tokens: Int[Tensor, "*batch pos"],
    prepend_bos: bool,
    padding_side: str | None = None,
) -> Int[Tensor, "*batch pos"]:
    """1 for a token, 0 for padding, guessed from the tokens as TransformerLens does.

    Padding is the run of pad tokens at the start (``padding_side="left"``) or end of a row; pads
    elsewhere are text. If BOS and pad are one token, the last pad of a leading run is BOS where
    ``prepend_bos``.

    Args:
        tokenizer: None, or one without pad token, gives all ones.
        padding_side: None means the tokenizer's.
    """
    mask = torch.ones_like(tokens)
    if tokenizer is None or tokenizer.pad_token_id is None:
        return mask
    left = (padding_side or tokenizer.padding_side) == "left"
    is_text = tokens != tokenizer.pad_token_id
    mask[get_cumsum_along_dim(is_text, -1, reverse=not left) == 0] = 0
    if left and prepend_bos and tokenizer.bos_token_id == tokenizer.pad_token_id:
        last_pad = (mask == 0).sum(-1, keepdim=True) - 1
        # A row without leading pads has a one at its start already.
        mask.scatter_(-1, last_pad.clamp(min=0), 1)
    return mask


def get_prompt_mask(
    tokenizer: Any,
    tokens: Int[Tensor, "batch pos"],
    prepend_bos: bool,
    padding_side: str | None = None,
) -> Int[Tensor, "batch pos"]:
    """The mask to continue prompts with: `get_attention_mask` where that is sure, else safer.

    Where the pad token is also BOS or EOS, a run of it that every row shares is text, not padding
    (a lone BOS would else be masked away), and leading runs of unequal length are padding on
    whichever side the tokenizer pads. Every row keeps at least one token.
    """
    if tokenizer is None or tokenizer.pad_token_id is None:
        return torch.ones_like(tokens)
    pad = tokenizer.pad_token_id
    left = (padding_side or tokenizer.padding_side) == "left"
    doubles = pad in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if left and prepend_bos and pad == tokenizer.bos_token_id:
        return get_attention_mask(tokenizer, tokens, prepend_bos, "left")
    is_pad = (tokens == pad).long()
    leading = is_pad.cumprod(-1).sum(-1)
    trailing = torch.zeros_like(leading) if left else is_pad.flip(-1).cumprod(-1).sum(-1)
    if doubles:
        leading, trailing = leading - leading.min(), trailing - trailing.min()
    length = tokens.shape[-1]
    # A row of nothing but pads: they count once, on the declared side.
    leading = leading.clamp(max=length - 1) if left else leading.where(leading < length, 0)
    trailing = trailing.minimum(length - 1 - leading)
    places = torch.arange(length, device=tokens.device)
    kept = (places >= leading[:, None]) & (places < length - trailing[:, None])
    return kept.to(tokens.dtype)


def get_tokens_with_bos_removed(
    tokenizer: Any, tokens: Int[Tensor, "*batch pos"], padding_side: str | None = None
) -> Int[Tensor, "*batch shorter"]:
    """Tokens without the BOS of each row, behind its left padding if there is any.

    A tokenizer without BOS has none to remove: the tokens come back as they are.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return tokens
    if (padding_side or tokenizer.padding_side) == "right":
        return tokens[..., 1:]
    if bos == tokenizer.pad_token_id:
        leading_pads = get_cumsum_along_dim(tokens != bos, -1) == 0
        position = leading_pads.sum(-1, keepdim=True) - 1
    else:
        position = (tokens == bos).int().argmax(-1, keepdim=True)
    places = torch.arange(tokens.shape[-1], device=tokens.device)
    kept = (places != position.clamp(min=0)).expand(tokens.shape)
    return tokens[kept].view(*tokens.shape[:-1], -1)


def get_offset_position_ids(
    past_kv_pos_offset: int,
    attention_mask: Int[Tensor, "batch offset_pos"] | Bool[Tensor, "batch offset_pos"],
) -> Int[Tensor, "batch pos"]:
    """Position of each new token, counting only tokens that are not padding.

    Args:
        past_kv_pos_offset: Columns of the mask that are already in the KV cache.
        attention_mask: 0 for padding, over cached and new tokens.

    Padding in front of the first token gets position 0, which nothing may look at.
    """
    return (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past_kv_pos_offset:]


# -- loss ----------------------------------------------------------------------------------------


def lm_cross_entropy_loss(
    logits: Float[Tensor, "*batch pos d_vocab"],
    tokens: Int[Tensor, "*batch pos"],
    attention_mask: Int[Tensor, "*batch pos"] | Bool[Tensor, "*batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, ""] | Float[Tensor, "*batch pos_less_one"]:
    """Cross-entropy, in nats, of each next token.

    Args:
        attention_mask: 0 for padding. A pair counts only if both its tokens do.
        per_token: Return one value a predicted token (0 where masked) instead of the mean over
            all counted pairs.

    Numerics: log-softmax in the dtype of the logits (sums in float32 inside, as PyTorch's).
    Differentiable. Cost: a second tensor of the size of the logits if a gradient is wanted, a few
    rows otherwise.
    """
    if tokens.shape != logits.shape[:-1]:
        raise ShapeError(
            f"logits {tuple(logits.shape)} need tokens {tuple(logits.shape[:-1])}, "
            f"found {tuple(tokens.shape)}."
        )
    # Every row is scored, the last of each text against a dummy: slicing the logits copies them.
    targets = torch.cat([tokens[..., 1:], torch.zeros_like(tokens[..., :1])], -1).long()
    losses = _row_losses(logits.flatten(0, -2), targets.flatten())
    losses = losses.view(tokens.shape)[..., :-1]
    if attention_mask is None:
        return losses if per_token else losses.mean()
    if attention_mask.shape != tokens.shape:
        raise TokenError(
            f"attention_mask {tuple(attention_mask.shape)} must have the shape of the tokens, "
            f"{tuple(tokens.shape)}."
        )
    counted = attention_mask[..., :-1].bool() & attention_mask[..., 1:].bool()
    losses = losses.masked_fill(~counted, 0.0)
    if per_token:
        return losses
    # A sum over many tokens does not fit float16.
    wide = torch.float32 if losses.dtype in (torch.float16, torch.bfloat16) else losses.dtype
    return (losses.sum(dtype=wide) / counted.sum()).to(losses.dtype)


def lm_accuracy(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    per_token: bool = False,
) -> Float[Tensor, ""] | Bool[Tensor, "batch pos_less_one"]:
    """The fraction of next tokens that have the largest logit, or whether each one has."""
    hits = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    return hits if per_token else hits.sum() / hits.numel()


def _row_losses(
    logits: Float[Tensor, "row d_vocab"], targets: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    # No real token id is this, so nothing is ever ignored.
    no_id = torch.iinfo(torch.int64).min
    if torch.is_grad_enabled() and logits.requires_grad:
        return F.cross_entropy(logits, targets, reduction="none", ignore_index=no_id)
    size = max(1, _LOSS_ROWS_BYTES // max(1, logits.shape[-1] * logits.element_size()))
    losses = torch.empty(len(targets), dtype=logits.dtype, device=logits.device)
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        losses[rows] = F.cross_entropy(
            logits[rows], targets[rows], reduction="none", ignore_index=no_id
        )
    return losses


# -- showing -------------------------------------------------------------------------------------


def align_tokenizations(
    a: Sequence[str],
    b: Sequence[str],
    labels: tuple[str, str] = ("clean", "corrupted"),
    width: int = 96,
) -> str:
    """Two tokenizations one above the other, equal tokens in one column, differences marked ``^``.

    >>> print(align_tokenizations(["The", " dog", " ran"], ["The", " c", "at", " ran"]))
        clean (3): The| dog|  | ran
    corrupted (4): The| c  |at| ran
                       ^^^^ ^^

    Line breaks and tabs inside tokens are shown escaped. Long prompts wrap at ``width`` columns.
    """
    counts = [f"({len(a)})", f"({len(b)})"]
    heads = [f"{label} {count}" for label, count in zip(labels, counts, strict=True)]
    indent = max(len(head) for head in heads) + 2
    start = [f"{head}: ".rjust(indent) for head in heads] + [" " * indent]
    lines, rows, fresh = [], start, True
    for above, below in _columns([_shown(token) for token in a], [_shown(token) for token in b]):
        cell = max(len(above), len(below))
        if not fresh and len(rows[0]) + 1 + cell > width:
            lines += rows
            rows, fresh = [" " * indent] * 3, True
        marks = " " * cell if above == below else "^" * cell
        bars = ("", "", "") if fresh else ("|", "|", " ")
        cells = (above.ljust(cell), below.ljust(cell), marks)
        rows = [row + bar + text for row, bar, text in zip(rows, bars, cells, strict=True)]
        fresh = False
    return "\n".join(line.rstrip() for line in [*lines, *rows] if line.strip())


def _shown(token: str) -> str:
    return token.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")


def _columns(a: list[str], b: list[str]) -> list[tuple[str, str]]:
    columns: list[tuple[str, str]] = []
    for _, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for index in range(max(a1 - a0, b1 - b0)):
            left = a[a0 + index] if a0 + index < a1 else ""
            right = b[b0 + index] if b0 + index < b1 else ""
            columns.append((left, right))
    return columns
