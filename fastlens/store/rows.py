"""From texts to rows of tokens, and to batches of rows of one length: nothing is ever padded."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastlens.errors import ShapeError, SourceError, TokenError

Texts: TypeAlias = str | Path | Sequence[str | Path]
# Texts given to the tokenizer at a time, and batches sorted by length at a time.
TEXTS_AT_A_TIME = 1000
BATCHES_AT_A_TIME = 64


def documents(texts: Texts) -> Iterator[str]:
    """The texts; of a file (a `Path`), its lines that are not blank.

    Raises: SourceError for a file that cannot be read or is not UTF-8.
    """
    for text in [texts] if isinstance(texts, str | Path) else texts:
        if isinstance(text, str):
            yield text
            continue
        try:
            with text.open(encoding="utf-8", newline="\n") as lines:
                yield from (line.rstrip("\r\n") for line in lines if line.strip())
        except OSError as error:
            raise SourceError(f"cannot read {text}: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise SourceError(f"{text} is not UTF-8: {error.reason}. Convert it.") from error


def digest_of(texts: Texts) -> str:
    """Of all documents. Reads them once."""
    whole = hashlib.blake2b(digest_size=16)
    for text in documents(texts):
        data = text.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


def token_rows(
    texts: Texts,
    tokenizer: Any,
    context: int,
    bos: bool,
    join: bool = True,
    limit: int | None = None,
) -> Iterator[list[int]]:
    """Rows of at most ``context`` tokens.

    Args:
        bos: Every row starts with BOS, which counts.
        join: Documents are joined by EOS and cut, as `tokenize_and_concatenate` does, but in one
            stream and with the rest as a last, shorter row. False cuts every document by itself.
        limit: Tokens in all; the last row is cut.

    Raises: TokenError if the tokenizer lacks EOS or BOS; ShapeError for too short a context.
    """
    ends: dict[str, Any] = {
        name: getattr(tokenizer, f"{name}_token_id", None)
        for name, needed in (("eos", join), ("bos", bos))
        if needed
    }
    for name, token in ends.items():
        if token is None:
            raise TokenError(
                f"rows need {name.upper()}, which the tokenizer lacks: set it, or do without."
            )
    top: list[int] = [ends["bos"]] if bos else []
    length = context - len(top)
    if length < 1:
        raise ShapeError(f"context={context} leaves no room for a token of text.")
    left = limit
    for body in _pieces(_tokenized(texts, tokenizer), length, ends.get("eos")):
        row = top + body
        if left is not None:
            row = row[:left]
            if len(row) <= len(top):
                return
            left -= len(row)
        yield row


def batches(rows: Iterable[Sequence[int]], tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of one length together: ``[row, pos]`` tokens (int32) and the rows' numbers.

    Args:
        tokens: At most so many in a batch, but at least one row. Rows are sorted by length within
            64 batches' worth, so what is held stays small.
    """
    held: list[tuple[int, Sequence[int]]] = []
    n_held = 0
    for number, row in enumerate(rows):
        held.append((number, row))
        n_held += len(row)
        if n_held >= BATCHES_AT_A_TIME * tokens:
            yield from _of_one_length(held, tokens)
            held, n_held = [], 0
    yield from _of_one_length(held, tokens)


def _of_one_length(
    held: list[tuple[int, Sequence[int]]], tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    lengths: dict[int, list[tuple[int, Sequence[int]]]] = {}
    for number, row in held:
        lengths.setdefault(len(row), []).append((number, row))
    for length in sorted(lengths, reverse=True):
        rest = iter(lengths[length])
        while some := list(islice(rest, max(1, tokens // length))):
            numbers, rows = zip(*some, strict=True)
            yield torch.tensor(rows, dtype=torch.int32), torch.tensor(numbers)


def _tokenized(texts: Texts, tokenizer: Any) -> Iterator[list[int]]:
    rest = documents(texts)
    while some := list(islice(rest, TEXTS_AT_A_TIME)):
        # verbose=False: that a text is longer than the model's context is no news here.
        yield from tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]


def _pieces(found: Iterator[list[int]], length: int, eos: int | None) -> Iterator[list[int]]:
    if eos is None:
        for document in found:
            yield from (document[i : i + length] for i in range(0, len(document), length))
        return
    rest: list[int] = []
    for i, document in enumerate(found):
        rest += [eos, *document] if i else document
        whole = len(rest) // length * length
        yield from (rest[at : at + length] for at in range(0, whole, length))
        rest = rest[whole:]
    if rest:
        yield rest
