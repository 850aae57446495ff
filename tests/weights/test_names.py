"""Names: aliases, packaged models, near names. TransformerLens': test_names_of_transformer_lens."""

import pytest

from fastlens.errors import ModelNameError
from fastlens.weights.names import (
    AUDIO,
    known_names,
    packaged_model,
    repository_of,
)


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gpt2-small", "gpt2"),
        ("GPT2-Small", "gpt2"),
        ("gpt2", "gpt2"),
        ("pythia-70m", "EleutherAI/pythia-70m"),
        ("EleutherAI/pythia-19m", "EleutherAI/pythia-70m"),
        ("meta-llama/llama-3.2-1b", "meta-llama/Llama-3.2-1B"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("someone/something", "someone/something"),
    ],
)
def test_repositories(name, repository):
    assert repository_of(name) == repository


@pytest.mark.parametrize("name", ["pythia-70", "no", "a/b/c", "/x", "x/", ""])
def test_unknown_names(name):
    with pytest.raises(ModelNameError, match="no known name or alias"):
        repository_of(name)


def test_near_names_come_from_all_families():
    with pytest.raises(ModelNameError, match="'smollm2-135m'"):
        repository_of("smollm-135m")
    with pytest.raises(ModelNameError, match="Nearest: .*'pythia-70m'"):
        repository_of("pythia70m")


def test_packaged_models():
    assert packaged_model("Toy-Induction") == "toy-induction"
    for alias in ("smollm2-135m", "SmolLM2", "smollm2-135m-instruct"):
        assert packaged_model(alias) == "smollm2-135m"
    assert packaged_model("gpt2") is None
    names = known_names()
    assert names["toy-induction"] == "toy-induction" and names["smollm2"] == "smollm2-135m"
    assert len(names) > 200


@pytest.mark.parametrize("name", AUDIO)
def test_speech_models_are_refused(name):
    with pytest.raises(ModelNameError, match=r"encodes speech.*HookedModule\.from_pretrained"):
        repository_of(name)
    assert name not in known_names()
