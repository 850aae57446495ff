"""From a dataset of texts to rows of tokens of one length, and fetching small datasets by name.

A dataset is Hugging Face's `datasets.Dataset` or `IterableDataset`, or anything with their methods;
the package is loaded only to fetch one.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastlens.errors import (
    FastlensError,
    MissingDependencyError,
    SourceError,
    TokenError,
    did_you_mean,
)

_SMALL_DATASETS = {
    "openwebtext": "stas/openwebtext-10k",
    "owt": "stas/openwebtext-10k",
    "pile": "NeelNanda/pile-10k",
    "c4": "NeelNanda/c4-10k",
    "code": "NeelNanda/code-10k",
    "python": "NeelNanda/code-10k",
    "c4_code": "NeelNanda/c4-code-20k",
    "c4-code": "NeelNanda/c4-code-20k",
    "wiki": "NeelNanda/wiki-10k",
}


class DatasetError(FastlensError, ValueError, KeyError):
    """A dataset or column of that name does not exist, or cannot be cut into rows as asked."""


def load_hub_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, from the hub or its cache.

    Raises: MissingDependencyError without the package; SourceError when the hub cannot be reached
        and the cache has no copy.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingDependencyError(
            f"the dataset {path!r} is read with the package datasets, which is not installed: pip "
            f"install datasets."
        ) from error
    try:
        return load_dataset(path, *args, **kwargs)
    except OSError as error:
        raise SourceError(
            f"the dataset {path!r} was asked of the hub, which could not be reached, does not have "
            f"it, or is switched off (HF_HUB_OFFLINE), and the cache has no copy "
            f"({type(error).__name__}). Check the network and the name, or load a dataset from "
            f"disk: datasets.load_from_disk(folder)."
        ) from error


def get_dataset(dataset_name: str, **kwargs: Any) -> Any:
    """One of TransformerLens' small datasets, 10,000 texts in a column ``"text"``, from the hub.

    ``"openwebtext"`` or ``"owt"``, ``"pile"``, ``"c4"``, ``"code"`` or ``"python"``, ``"c4_code"``
    (both, 20,000), ``"wiki"``. ``kwargs`` go to `datasets.load_dataset`.

    Raises: DatasetError (near names) for another name; otherwise as `load_hub_dataset`.
    """
    if dataset_name not in _SMALL_DATASETS:
        near = did_you_mean(dataset_name, _SMALL_DATASETS)
        raise DatasetError(
            f"no small dataset {dataset_name!r}: there are {', '.join(_SMALL_DATASETS)}.{near} "
            f"Any other is loaded with datasets.load_dataset."
        )
    return load_hub_dataset(_SMALL_DATASETS[dataset_name], **{"split": "train", **kwargs})


def keep_single_column(dataset: Any, col_name: str) -> Any:
    """The dataset with this column alone; the one given is not changed.

    Raises: DatasetError if it has no such column.
    """
    # A stream may not know its columns before it is read.
    columns = getattr(dataset, "column_names", None) or list(dataset.features or ())
    if not columns:
        return dataset.select_columns([col_name])
    if col_name not in columns:
        near = did_you_mean(col_name, columns)
        raise DatasetError(f"no column {col_name!r} in the dataset, only {list(columns)}.{near}")
    others = [name for name in columns if name != col_name]
    return dataset.remove_columns(others) if others else dataset


def tokenize_and_concatenate(
    dataset: Any,
    tokenizer: Any,
    streaming: bool = False,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int | None = 10,
    set_format: bool = True,
) -> Any:
    """Texts joined by EOS and cut into rows of ``max_length`` tokens, in a column ``"tokens"``.

    The texts of each batch of 1,000 are tokenized without special tokens, joined with EOS between
    them, and cut; what does not fill a last row is dropped, unless nothing else is there: then the
    row is padded (with EOS, if the tokenizer has no pad token).

    Args:
        dataset: A `Dataset` or an `IterableDataset`, which comes back as such.
        tokenizer: Not changed. Needs EOS, and BOS for ``add_bos_token``.
        streaming: Work in this process.
        column_name: The texts; other columns are dropped.
        add_bos_token: Every row starts with BOS, which is one of its ``max_length`` tokens.
        num_proc: Processes for a `Dataset`; None works in this one. Batches are cut from each
            process' share, so the rows depend on it.
        set_format: Entries are torch tensors, not lists.

    Raises: DatasetError for a column that is not there or too short a ``max_length``; TokenError
        if the tokenizer lacks EOS or BOS.
    """
    dataset = keep_single_column(dataset, column_name)
    rows_of = functools.partial(
        _rows_of,
        column_name=column_name,
        tokenizer=tokenizer,
        length=_text_length(max_length, add_bos_token),
        **_special_tokens(tokenizer, add_bos_token),
    )
    is_lazy = not hasattr(dataset, "set_format")
    workers = {} if streaming or is_lazy else {"num_proc": num_proc}
    rows = dataset.map(rows_of, batched=True, remove_columns=[column_name], **workers)
    if set_format and is_lazy:
        return rows.with_format("torch")
    if set_format:
        rows.set_format(type="torch", columns=["tokens"])
    return rows


def _text_length(max_length: int, add_bos_token: bool) -> int:
    length = max_length - add_bos_token
    if length < 1:
        raise DatasetError(f"max_length={max_length} leaves no room for a token of text.")
    return length


def _special_tokens(tokenizer: Any, add_bos_token: bool) -> dict[str, int | None]:
    eos, bos, pad = (getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "pad"))
    if eos is None:
        raise TokenError("texts are joined by EOS, which the tokenizer lacks. Set its eos_token.")
    if add_bos_token and bos is None:
        raise TokenError(
            "add_bos_token=True, but the tokenizer has no BOS. Use add_bos_token=False, or set "
            "its bos_token."
        )
    return {"eos": eos, "bos": bos if add_bos_token else None, "pad": eos if pad is None else pad}


def _rows_of(
    examples: Mapping[str, Sequence[str]],
    column_name: str,
    tokenizer: Any,
    length: int,
    eos: int,
    bos: int | None,
    pad: int,
) -> dict[str, np.ndarray]:
    texts = examples[column_name]
    # verbose=False: that a text is longer than the model's context is no news here.
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    pieces = [np.asarray([*row, eos], dtype=np.int64) for row in rows]
    tokens = np.concatenate(pieces)[:-1] if pieces else np.empty(0, np.int64)
    if pieces and len(tokens) < length:
        tokens = np.pad(tokens, (0, length - len(tokens)), constant_values=pad)
    n_rows = len(tokens) // length
    tokens = tokens[: n_rows * length].reshape(n_rows, length)
    if bos is not None:
        tokens = np.pad(tokens, ((0, 0), (1, 0)), constant_values=bos)
    return {"tokens": tokens}
