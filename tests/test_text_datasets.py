"""From a dataset of texts to rows of tokens, against TransformerLens'."""

import sys
import warnings
from typing import Any

import pytest
import torch

from fastlens import text_datasets
from fastlens.errors import MissingDependencyError, SourceError, TokenError
from fastlens.text_datasets import DatasetError, keep_single_column, tokenize_and_concatenate
from tests.fixtures_tokens import bpe_tokenizer, gpt2_like, llama_like, t5_like

COMPARED = [
    "transformer_lens.utilities.hf_utils.get_dataset",
    "transformer_lens.utilities.hf_utils.keep_single_column",
    "transformer_lens.utilities.tokenize_utils.tokenize_and_concatenate",
]

TEXTS = ["the cat in the hat", "", "Hi", "a cat\n\non an inn é", "the " * 40]


@pytest.fixture(scope="module")
def tl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformer_lens")
        import transformer_lens.utilities as utilities
    return utilities


def dataset(texts: list[str], lazy: bool = False) -> Any:
    datasets = pytest.importorskip("datasets")
    rows = {"text": texts, "url": ["x"] * len(texts), "n": list(range(len(texts)))}
    found = datasets.Dataset.from_dict(rows)
    return found.to_iterable_dataset() if lazy else found


# -- columns -------------------------------------------------------------------------------------


@pytest.mark.tl
@pytest.mark.parametrize("lazy", [False, True])
def test_one_column(tl, lazy):
    given = dataset(TEXTS, lazy)
    found, wanted = keep_single_column(given, "text"), tl.keep_single_column(given, "text")
    assert list(found) == list(wanted) == [{"text": text} for text in TEXTS]
    assert set(given.column_names) == {"text", "url", "n"}
    assert list(keep_single_column(found, "text")) == list(wanted)


def test_a_stream_that_does_not_know_its_columns():
    """TransformerLens reads `features`, which is None there, and fails."""
    datasets = pytest.importorskip("datasets")
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a", "n": 1}]))
    assert stream.features is None
    assert list(keep_single_column(stream, "text")) == [{"text": "a"}]


def test_a_column_that_is_not_there():
    """TransformerLens returns a dataset without columns."""
    with pytest.raises(DatasetError, match="no column 'txet'.*Nearest: 'text'"):
        keep_single_column(dataset(TEXTS), "txet")


# -- rows of tokens ------------------------------------------------------------------------------


def with_pad() -> Any:
    tokenizer = gpt2_like()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


@pytest.mark.tl
@pytest.mark.parametrize("make", [gpt2_like, llama_like, with_pad])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (TEXTS, {"max_length": 8}),
        (TEXTS, {"max_length": 7, "add_bos_token": False}),
        (TEXTS, {"max_length": 5, "set_format": False}),
        (TEXTS, {"max_length": 2}),
        (TEXTS * 300, {"max_length": 64}),
        (TEXTS, {}),
        (["Hi"], {"max_length": 16}),
        ([""], {"max_length": 4}),
        (["", ""], {"max_length": 4, "add_bos_token": False}),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else f"{len(value)} texts",
)
def test_the_rows_of_transformer_lens(tl, make, lazy, texts, options):
    if lazy:
        options = {**options, "streaming": True, "set_format": False}
    found = tokenize_and_concatenate(dataset(texts, lazy), make(), num_proc=None, **options)
    wanted = tl.tokenize_and_concatenate(dataset(texts, lazy), make(), num_proc=None, **options)
    assert type(found) is type(wanted)
    found_rows = [row["tokens"] for row in found]
    wanted_rows = [row["tokens"] for row in wanted]
    assert len(found_rows) == len(wanted_rows) > 0
    for ours, theirs in zip(found_rows, wanted_rows, strict=True):
        assert type(ours) is type(theirs)
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
        assert torch.as_tensor(ours).dtype == torch.long
        assert len(ours) == options.get("max_length", 1024)


@pytest.mark.tl
def test_another_column(tl):
    given = dataset(TEXTS).rename_column("text", "story")
    options = {"column_name": "story", "num_proc": None, "max_length": 8}
    found = tokenize_and_concatenate(given, gpt2_like(), **options)
    wanted = tl.tokenize_and_concatenate(given, gpt2_like(), **options)
    assert torch.equal(found[:]["tokens"], wanted[:]["tokens"])
    assert given.column_names == ["story", "url", "n"]


def test_rows_are_the_texts_joined():
    tokenizer = gpt2_like()
    rows = tokenize_and_concatenate(dataset(TEXTS), tokenizer, max_length=6, num_proc=None)
    assert all(row[0] == tokenizer.bos_token_id for row in rows[:]["tokens"])
    text = tokenizer.decode(rows[:]["tokens"][:, 1:].flatten())
    assert tokenizer.eos_token.join(TEXTS).startswith(text)


def test_the_tokenizer_is_not_changed():
    """TransformerLens adds a pad token, whose id the model lacks, and pads with it next time."""
    tokenizer = gpt2_like()
    size, warned = len(tokenizer), dict(tokenizer.deprecation_warnings)
    rows = [
        tokenize_and_concatenate(dataset(["Hi"]), tokenizer, max_length=8, num_proc=None)
        for _ in range(2)
    ]
    assert tokenizer.pad_token is None and len(tokenizer) == size
    assert tokenizer.deprecation_warnings == warned
    assert torch.equal(rows[0][:]["tokens"], rows[1][:]["tokens"])
    assert rows[1][:]["tokens"].max() < size


def test_long_texts_are_no_news():
    """A tokenizer warns, once, of a text longer than the model's context, and notes that it did."""
    tokenizer = bpe_tokenizer(bos_token="<s>", eos_token="</s>", model_max_length=4)
    tokenize_and_concatenate(dataset(TEXTS), tokenizer, max_length=8, num_proc=None)
    assert not tokenizer.deprecation_warnings
    tokenizer(TEXTS[-1])
    assert tokenizer.deprecation_warnings


def test_a_stream_gives_tensors_too():
    """TransformerLens fails: a stream has no `set_format`, nor processes."""
    rows = tokenize_and_concatenate(dataset(TEXTS, lazy=True), gpt2_like(), max_length=8)
    first = next(iter(rows))["tokens"]
    assert isinstance(first, torch.Tensor) and first.shape == (8,)


class Table:
    """As much of a dataset as is needed; `datasets` is not."""

    def __init__(self, **columns: Any):
        self.columns, self.asked = columns, {}

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def remove_columns(self, names: list[str]) -> "Table":
        return Table(**{n: column for n, column in self.columns.items() if n not in names})

    def map(self, function: Any, **options: Any) -> "Table":
        table = Table(**function(self.columns))
        table.asked = options
        return table

    def set_format(self, **options: Any) -> None:
        self.asked |= options


def test_anything_like_a_dataset(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for options, workers in (({}, 10), ({"num_proc": 3}, 3), ({"num_proc": None}, None)):
        rows = tokenize_and_concatenate(
            Table(text=TEXTS, n=[0] * 5), gpt2_like(), max_length=8, **options
        )
        assert rows.columns["tokens"].shape[1] == 8
        assert rows.asked["num_proc"] == workers and rows.asked["batched"]
        assert (rows.asked["type"], rows.asked["columns"]) == ("torch", ["tokens"])
    rows = tokenize_and_concatenate(Table(text=TEXTS), gpt2_like(), streaming=True, max_length=8)
    assert "num_proc" not in rows.asked
    rows = tokenize_and_concatenate(Table(text=[]), gpt2_like(), max_length=8)
    assert rows.columns["tokens"].shape == (0, 8)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (gpt2_like, {"max_length": 1}, DatasetError, "max_length=1 leaves no room"),
        (gpt2_like, {"max_length": 0, "add_bos_token": False}, DatasetError, "leaves no room"),
        (t5_like, {}, TokenError, "tokenizer has no BOS. Use add_bos_token=False"),
        (lambda: bpe_tokenizer(bos_token="<s>"), {}, TokenError, "EOS, which the tokenizer lacks"),
    ],
)
def test_what_is_refused_before_anything_is_read(make, options, error, message):
    with pytest.raises(error, match=message):
        tokenize_and_concatenate(Table(text=TEXTS), make(), **options)


# -- small datasets of the hub -------------------------------------------------------------------


@pytest.mark.tl
@pytest.mark.parametrize(
    "name", ["openwebtext", "owt", "pile", "c4", "code", "python", "c4_code", "c4-code", "wiki"]
)
def test_the_names_of_transformer_lens(tl, monkeypatch, name):
    import datasets
    from transformer_lens.utilities import hf_utils

    def load_dataset(path: str, **options: Any) -> Any:
        return path, options

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hf_utils, "load_dataset", load_dataset)
    found = text_datasets.get_dataset(name, data_dir="d")
    assert found == tl.get_dataset(name, data_dir="d")
    assert found[1] == {"split": "train", "data_dir": "d"}


def test_another_name():
    with pytest.raises(ValueError, match="'openwebtxt': there are.*Nearest: 'openwebtext'"):
        text_datasets.get_dataset("openwebtxt")


def test_no_network_and_no_package(monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(SourceError, match="'NeelNanda/pile-10k' was asked.*HF_HUB_OFFLINE"):
        text_datasets.get_dataset("pile")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install datasets"):
        text_datasets.get_dataset("pile")
