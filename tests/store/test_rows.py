"""Rows of tokens and batches of one length."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlens.errors import ShapeError, SourceError, TokenError
from fastlens.store.rows import batches, digest_of, documents, token_rows


class Letters:
    """One token a letter; 1 is BOS, 0 EOS."""

    bos_token_id, eos_token_id = 1, 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_documents_are_texts_and_lines(tmp_path: Path):
    (tmp_path / "a").write_bytes("eins\n\nzwei é\r\n  \n".encode())
    assert list(documents(["one\ntwo", tmp_path / "a"])) == ["one\ntwo", "eins", "zwei é"]
    assert list(documents("one")) == ["one"]
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(SourceError, match="cannot read"):
        list(documents(tmp_path / "none"))
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="not UTF-8"):
        list(documents(tmp_path / "a"))


def test_joined_by_eos_with_the_rest_as_a_shorter_row():
    rows = list(token_rows(["abc", "de"], Letters(), 4, bos=True))
    assert rows == [[1, 97, 98, 99], [1, 0, 100, 101]]
    rows = list(token_rows(["abc", "de"], Letters(), 4, bos=False))
    assert rows == [[97, 98, 99, 0], [100, 101]]


def test_each_document_by_itself():
    rows = list(token_rows(["abc", "de", ""], Letters(), 3, bos=True, join=False))
    assert rows == [[1, 97, 98], [1, 99], [1, 100, 101]]


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_limit_is_kept(limit: int):
    rows = list(token_rows(["abcdefgh"], Letters(), 4, bos=True, limit=limit))
    whole = list(token_rows(["abcdefgh"], Letters(), 4, bos=True))
    assert limit - 1 <= min(sum(map(len, rows)), 11) + (limit > 11) <= limit
    assert all(row == w[: len(row)] and len(row) > 1 for row, w in zip(rows, whole, strict=False))


def test_what_cannot_be():
    with pytest.raises(TokenError, match="EOS"):
        list(token_rows(["a"], SimpleNamespace(bos_token_id=1), 4, bos=True))
    with pytest.raises(ShapeError, match="no room"):
        list(token_rows(["a"], Letters(), 1, bos=True))


@given(st.lists(st.integers(1, 9), max_size=60), st.integers(1, 20))
def test_batches_hold_every_row_once_and_nothing_else(lengths: list[int], tokens: int):
    rows = [[i] * length for i, length in enumerate(lengths)]
    seen = {}
    for batch, numbers in batches(rows, tokens):
        assert batch.dtype == torch.int32
        assert len(batch) == 1 or batch.numel() <= tokens
        seen |= dict(zip(numbers.tolist(), batch.tolist(), strict=True))
    assert [seen[i] for i in range(len(rows))] == rows and len(seen) == len(rows)
