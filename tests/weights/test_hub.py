"""Fetching: what is asked of the hub, and a sentence for every way it fails. No network."""

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from fastlens.errors import ModelNameError, SourceError
from fastlens.weights import hub


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://example.org"))


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """A hub whose repository holds these files; each download is recorded."""
    calls: list[dict] = []

    def make(*files: str):
        def snapshot_download(repository, **options):
            calls.append({"repository": repository, **options})
            for name in files:
                stem = {"m": "model*.safetensors", "p": "pytorch_model*.bin"}.get(name[0])
                if stem is None or stem in options["allow_patterns"]:
                    (tmp_path / name).write_bytes(b"")
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return make


def test_safetensors_are_enough(downloads, tmp_path):
    calls = downloads("config.json", "model.safetensors", "pytorch_model.bin")
    assert hub.fetch("a/b", revision="r", cache_dir="c", token="t") == tmp_path
    assert len(calls) == 1 and not (tmp_path / "pytorch_model.bin").exists()
    asked = {key: calls[0][key] for key in ("repository", "revision", "cache_dir", "token")}
    assert asked == {"repository": "a/b", "revision": "r", "cache_dir": "c", "token": "t"}


def test_pickles_only_where_there_is_nothing_else(downloads, tmp_path):
    calls = downloads("config.json", "pytorch_model.bin")
    hub.fetch("a/b")
    assert len(calls) == 2 and (tmp_path / "pytorch_model.bin").exists()


def test_the_token_comes_from_the_environment(downloads, monkeypatch):
    calls = downloads("model.safetensors")
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.fetch("a/b")
    assert calls[-1]["token"] == "secret"
    monkeypatch.delenv("HF_TOKEN")
    hub.fetch("a/b")
    assert calls[-1]["token"] is None


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (errors.GatedRepoError("x", response=answer(403)), SourceError, "gated. Accept its terms"),
        (errors.RepositoryNotFoundError("x", response=answer(404)), ModelNameError,
         "no such repository, or it is private"),
        (errors.RevisionNotFoundError("x", response=answer(404)), SourceError,
         "at revision 'r' was asked, but there is no such revision"),
        (errors.RemoteEntryNotFoundError("x", response=answer(404)), SourceError,
         "has no such file"),
        (errors.LocalEntryNotFoundError("x"), SourceError, "could not be reached"),
        (errors.OfflineModeIsEnabled("x"), SourceError, "cache has no copy"),
        (errors.HfHubHTTPError("x", response=answer(500)), SourceError, "Check the network"),
        (ConnectionError("x"), SourceError, "ConnectionError"),
    ],
)  # fmt: skip
def test_failures_are_one_sentence(monkeypatch, raised, error, message):
    def fail(*args, **options):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(error, match=message):
        hub.fetch("gpt2-smol/gpt2-small", revision="r")


def test_offline_and_nothing_cached(tmp_path):
    """The real hub library, switched off."""
    with pytest.raises(SourceError, match="'gpt2' was asked, but the model hub could not be"):
        hub.fetch("gpt2", cache_dir=tmp_path)


def test_tokenizer_files(tmp_path):
    assert not hub.has_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    assert hub.has_tokenizer(tmp_path)


def test_a_cached_tokenizer_is_found_without_asking(tmp_path):
    assert hub.cached_tokenizer_folder("gpt2", tmp_path) is None
    assert hub.cached_tokenizer_folder("not a repository!!", tmp_path) is None
    folder = tmp_path / "models--gpt2"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "tokenizer.json").write_text("{}")
    assert hub.cached_tokenizer_folder("gpt2", tmp_path) == folder / "snapshots" / "abc"
