"""The four text corpora that models are evaluated on, from the hub, as batches of tokens."""

from typing import Any

from torch.utils.data import DataLoader

from fastlens.text_datasets import load_hub_dataset, tokenize_and_concatenate


def make_wiki_data_loader(tokenizer: Any, batch_size: int = 8) -> DataLoader:
    """Wikipedia articles (WikiText-2's training texts)."""
    return _loader(tokenizer, batch_size, "wikitext", "wikitext-2-v1")


def make_owt_data_loader(tokenizer: Any, batch_size: int = 8) -> DataLoader:
    """10,000 pages of OpenWebText, which is modelled on GPT-2's training texts."""
    return _loader(tokenizer, batch_size, "stas/openwebtext-10k")


def make_pile_data_loader(tokenizer: Any, batch_size: int = 8) -> DataLoader:
    """The first 10,000 texts of the Pile (Gao et al. 2101.00027)."""
    return _loader(tokenizer, batch_size, "NeelNanda/pile-10k")


def make_code_data_loader(tokenizer: Any, batch_size: int = 8) -> DataLoader:
    """Python files (CodeParrot's validation set)."""
    name = "codeparrot/codeparrot-valid-v2-near-dedup"
    return _loader(tokenizer, batch_size, name, column_name="content")


DATASET_NAMES = ["wiki", "owt", "pile", "code"]
DATASET_LOADERS = [
    make_wiki_data_loader,
    make_owt_data_loader,
    make_pile_data_loader,
    make_code_data_loader,
]


def _loader(tokenizer: Any, batch_size: int, *dataset: str, column_name: str = "text") -> Any:
    """Shuffled batches ``{"tokens": [batch, 1024]}``, BOS in front of every row.

    Raises: SourceError if the hub cannot be reached and its cache has no copy.
    """
    texts = load_hub_dataset(*dataset, split="train")
    print(len(texts))  # noqa: T201 - TransformerLens prints here
    rows = tokenize_and_concatenate(texts, tokenizer, column_name=column_name)
    return DataLoader(rows, batch_size=batch_size, shuffle=True, drop_last=True)
