"""Batches of the four corpora are TransformerLens'; offline, the dataset is named."""

import warnings

import pytest
import torch

from fastlens.errors import SourceError
from fastlens.evals import DATASET_LOADERS, DATASET_NAMES
from tests.fixtures_tokens import gpt2_like, llama_like

COMPARED = [
    "transformer_lens.evals.DATASET_LOADERS",
    "transformer_lens.evals.DATASET_NAMES",
    "transformer_lens.evals.make_code_data_loader",
    "transformer_lens.evals.make_owt_data_loader",
    "transformer_lens.evals.make_pile_data_loader",
    "transformer_lens.evals.make_wiki_data_loader",
]
TEXT = "the cat in the can and the dog in the car "


def fake_load_dataset(asked):
    """Instead of the hub: texts in every column that is asked for."""

    def load_dataset(*names, **options):
        from datasets import Dataset

        asked.append((names, options))
        # Few rows, so that batches of them are tokenized in this process.
        texts = [TEXT * (20 + i) for i in range(8)]
        return Dataset.from_dict({"text": texts, "content": texts[::-1]})

    return load_dataset


@pytest.fixture
def one_process(monkeypatch):
    """Both libraries ask for ten processes, for eight texts."""
    datasets = pytest.importorskip("datasets")
    real = datasets.Dataset.map

    def here(self, *args, num_proc=None, **kwargs):
        return real(self, *args, **kwargs)

    monkeypatch.setattr(datasets.Dataset, "map", here)
    return datasets


@pytest.mark.tl
@pytest.mark.parametrize("index", range(4), ids=DATASET_NAMES)
def test_batches_as_transformer_lens(index, one_process, monkeypatch, capsys):
    pytest.importorskip("transformer_lens")
    from transformer_lens import evals as theirs

    assert theirs.DATASET_NAMES == DATASET_NAMES
    assert [f.__name__ for f in theirs.DATASET_LOADERS] == [f.__name__ for f in DATASET_LOADERS]
    asked = []
    monkeypatch.setattr(theirs, "load_dataset", fake_load_dataset(asked))
    monkeypatch.setattr(one_process, "load_dataset", fake_load_dataset(asked))
    for make in (gpt2_like, llama_like):
        batches = []
        for loaders in (theirs.DATASET_LOADERS, DATASET_LOADERS):
            torch.manual_seed(2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                batches.append(list(loaders[index](make(), batch_size=2)))
        assert len(batches[0]) == len(batches[1]) > 0
        for want, got in zip(*batches, strict=True):
            assert torch.equal(want["tokens"], got["tokens"])
        assert asked[-1] == asked[-2]
    assert capsys.readouterr().out.splitlines() == ["8"] * 4


@pytest.mark.parametrize("index", range(4), ids=DATASET_NAMES)
def test_offline_the_dataset_is_named(index):
    pytest.importorskip("datasets")
    names = ["wikitext", "stas/openwebtext-10k", "NeelNanda/pile-10k", "codeparrot-valid-v2"]
    with pytest.raises(SourceError, match=names[index]):
        DATASET_LOADERS[index](gpt2_like())
