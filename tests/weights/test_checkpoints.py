"""Checkpoints of training runs: revisions of Pythia and Stanford's GPT-2, files of toy models."""

import logging
import warnings

import huggingface_hub
import pytest
import torch

from fastlens import HookedTransformer
from fastlens.errors import ConfigError, ModelNameError, SourceError
from fastlens.weights import hub
from fastlens.weights.checkpoints import Checkpoint, find_checkpoint, get_checkpoint_labels
from tests.weights.toys import RUN, SIZES, random_weights, save_toy

TOKENS = (22020096, 524288, 21999124480)
CONFIG = {**SIZES, **RUN, "attn_only": True}


@pytest.fixture
def toy(tmp_path):
    """A toy model and its checkpoints, each with weights of its own."""
    folder = save_toy(tmp_path / "Toy", CONFIG, random_weights(CONFIG))
    (folder / "checkpoints").mkdir()
    for seed, tokens in enumerate(TOKENS, start=1):
        file = folder / "checkpoints" / f"tokens_{tokens:0>12}.pth"
        torch.save(random_weights(CONFIG, seed), file)
    return folder


def test_revisions():
    found = find_checkpoint("pythia-160m-v0", -1, None)
    assert found == Checkpoint(
        "step143000",
        None,
        {
            "from_checkpoint": True,
            "checkpoint_index": 142,
            "checkpoint_value": 143000,
            "checkpoint_label_type": "step",
        },
    )
    # As in TransformerLens the index wins.
    assert find_checkpoint("pythia-160m", 0, 512).revision == "step0"
    found = find_checkpoint("alias-gpt2-small-x21", None, 400)
    assert found.revision == "checkpoint-400"
    with pytest.raises(ModelNameError, match="has 143 checkpoints"):
        find_checkpoint("pythia-160m-v0", 143, None)
    with pytest.raises(ModelNameError, match="Nearest: 1000, 2000, 3000"):
        find_checkpoint("pythia-160m-v0", None, 0)


@pytest.mark.parametrize("name", ["gpt2", "toy-induction", "someone/something"])
def test_models_without_known_checkpoints(name):
    with pytest.raises(ModelNameError, match="no list of its checkpoints is known.*revision="):
        get_checkpoint_labels(name)


@pytest.mark.tl
@pytest.mark.parametrize(
    "name", ["pythia-70m", "pythia-12b-v0", "pythia-160m-seed2", "stanford-gpt2-medium-c"]
)
def test_labels_are_transformer_lens(name):
    loading = pytest.importorskip("transformer_lens.loading_from_pretrained")
    logging.disable(logging.WARNING)
    try:
        assert get_checkpoint_labels(name) == loading.get_checkpoint_labels(name)
    finally:
        logging.disable(logging.NOTSET)


def test_files_of_a_folder(toy):
    assert get_checkpoint_labels(toy) == (sorted(TOKENS), "token")
    found = find_checkpoint(toy, 0, None)
    assert found.file == "checkpoints/tokens_000000524288.pth" and found.revision is None
    options = {"verbose": False}
    for index, tokens in enumerate(sorted(TOKENS)):
        want = random_weights(CONFIG, TOKENS.index(tokens) + 1)["blocks.1.attn.W_Q"]
        for asked in (
            {"checkpoint_index": index},
            {"checkpoint_value": tokens},
            {"checkpoint_label": tokens},
        ):
            model = HookedTransformer.from_pretrained_no_processing(toy, **asked, **options)
            assert torch.equal(model.W_Q[1], want)
            assert (model.cfg.checkpoint_value, model.cfg.checkpoint_index) == (tokens, index)
            assert model.cfg.checkpoint_label_type == "token" and model.cfg.from_checkpoint
    final = HookedTransformer.from_pretrained_no_processing(toy, **options)
    assert torch.equal(final.W_Q[1], random_weights(CONFIG)["blocks.1.attn.W_Q"])
    with pytest.raises(ModelNameError, match="has no checkpoint at that step"):
        HookedTransformer.from_pretrained(toy, checkpoint_value=3, **options)


@pytest.mark.tl
def test_files_of_a_repository(toy, monkeypatch):
    """A hub that is a folder: the labels are TransformerLens', and one file is fetched."""
    listed = sorted(path.relative_to(toy).as_posix() for path in toy.rglob("*") if path.is_file())
    asked = []

    def fetched(repository, *, allow_patterns, ignore_patterns, **_):
        asked.append((allow_patterns, ignore_patterns))
        return str(toy)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    loading = pytest.importorskip("transformer_lens.loading_from_pretrained")
    assert get_checkpoint_labels("solu-2l") == loading.get_checkpoint_labels("solu-2l")
    model = HookedTransformer.from_pretrained_no_processing(
        "attn-only-2l", checkpoint_index=1, verbose=False
    )
    want = random_weights(CONFIG, 1)["blocks.0.attn.W_V"]
    assert torch.equal(model.W_V[0], want)
    ((patterns, ignored),) = asked
    assert "checkpoints/tokens_000022020096.pth" in patterns and ignored is None
    # The final weights come without the checkpoints.
    asked.clear()
    HookedTransformer.from_pretrained("attn-only-2l", verbose=False)
    assert asked[-1] == ([*hub._TEXT, "*final.pth"], ["*/*"])
    with pytest.raises(ConfigError, match="together with a checkpoint"):
        HookedTransformer.from_pretrained("pythia-70m", checkpoint_index=0, revision="main")


def test_without_a_network():
    with pytest.raises(SourceError, match="the list of files of 'NeelNanda/.*hub could not"):
        get_checkpoint_labels("solu-1l")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SourceError, match="whose weights are on no hub.*hf_model="):
            hub.fetch("llama-7b-hf")
