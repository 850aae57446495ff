"""The hub's files and its cache, against TransformerLens; nothing is fetched."""

import json
import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

from fastlens.compat.utilities import hf_utils as ours
from fastlens.errors import ModelNameError, SourceError

COMPARED = [
    "transformer_lens.utilities.hf_utils.CACHE_DIR",
    "transformer_lens.utilities.hf_utils.call_hf_with_retry",
    "transformer_lens.utilities.hf_utils.clear_huggingface_cache",
    "transformer_lens.utilities.hf_utils.download_file_from_hf",
    "transformer_lens.utilities.hf_utils.enable_hf_numeric_tower",
    "transformer_lens.utilities.hf_utils.enable_hf_retry",
    "transformer_lens.utilities.hf_utils.get_hf_token",
    "transformer_lens.utilities.hf_utils.get_rotary_pct_from_config",
    "transformer_lens.utilities.hf_utils.select_compatible_kwargs",
]


@pytest.fixture(scope="module")
def tl(theirs) -> Any:
    return theirs("hf_utils")


# -- small things --------------------------------------------------------------------------------


@pytest.mark.tl
def test_tokens(tl, monkeypatch):
    assert ours.CACHE_DIR == tl.CACHE_DIR
    for value in ("", "secret"):
        monkeypatch.setenv("HF_TOKEN", value)
        assert ours.get_hf_token() == tl.get_hf_token() == (value or None)
    monkeypatch.delenv("HF_TOKEN")
    assert ours.get_hf_token() is tl.get_hf_token() is None


@pytest.mark.tl
@pytest.mark.parametrize(
    ("config", "share"),
    [
        (None, 1.0),
        (SimpleNamespace(), 1.0),
        (SimpleNamespace(rotary_pct=0.25, rope_parameters={"partial_rotary_factor": 0.5}), 0.25),
        (SimpleNamespace(rope_parameters={"partial_rotary_factor": 0.5}), 0.5),
        (SimpleNamespace(rope_parameters={"rope_type": "default"}), 1.0),
        (SimpleNamespace(rope_parameters=None), 1.0),
    ],
)
def test_rotary_share(tl, config, share):
    assert ours.get_rotary_pct_from_config(config) == share
    assert tl.get_rotary_pct_from_config(config) == share


def takes(a: int, b: int = 2, **more: int) -> None: ...


@pytest.mark.tl
def test_compatible_arguments(tl):
    given = {"a": 1, "b": 2, "c": 3, "more": 4}
    assert ours.select_compatible_kwargs(given, takes) == {"a": 1, "b": 2}
    assert tl.select_compatible_kwargs(given, takes) == {"a": 1, "b": 2}


def test_arguments_that_transformer_lens_drops():
    """It does not see keyword-only parameters, nor those of a decorated function."""

    def by_name(*, revision: str) -> None: ...

    given = {"revision": "r", "other": 1}
    assert ours.select_compatible_kwargs(given, by_name) == {"revision": "r"}
    found = ours.select_compatible_kwargs(given, huggingface_hub.hf_hub_download)
    assert found == {"revision": "r"}
    assert ours.select_compatible_kwargs({"self": 1, "errors": 2}, Hub().__call__) == {}


# -- trying again --------------------------------------------------------------------------------


class Answer(Exception):
    def __init__(self, status: int, **headers: str):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.response = SimpleNamespace(status_code=status, headers=headers)


class Hub:
    """Answers with these errors, one a call, then with the arguments it was given."""

    def __init__(self, *errors: Exception):
        self.errors = list(errors)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        return args, kwargs


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.mark.tl
@pytest.mark.parametrize(
    ("errors", "options"),
    [
        ([], {}),
        ([Answer(429, Retry_After="7")], {}),
        ([Answer(429, Retry_After="soon"), Answer(429)], {}),
        ([Answer(429), Answer(429), Answer(429)], {}),
        ([Answer(429), Answer(429), Answer(429)], {"max_attempts": 5, "base_delay": 100.0}),
        ([Answer(500)], {}),
        ([OSError("gone")], {}),
    ],
)
def test_too_many_requests(tl, waits, errors, options, caplog):
    caplog.set_level(logging.CRITICAL)
    seen = []
    for library in (ours, tl):
        random.seed(0)
        waits.clear()
        try:
            result = library.call_hf_with_retry(Hub(*errors), 1, **options, a=2)
        except Exception as error:
            result = error
        seen.append((result, list(waits)))
    (found, found_waits), (wanted, wanted_waits) = seen
    assert found == wanted and found_waits == pytest.approx(wanted_waits)


@pytest.mark.tl
def test_transformers_tries_again(tl, waits, monkeypatch, caplog):
    import transformers

    caplog.set_level(logging.CRITICAL)
    for library in (ours, tl):
        with monkeypatch.context() as patch:
            hub = Hub(Answer(429))
            for name in "Config Model Tokenizer Processor FeatureExtractor".split():
                cls = getattr(transformers, f"Auto{name}")
                patch.setattr(cls, "from_pretrained", classmethod(hub))
            library.enable_hf_retry()
            once = transformers.AutoConfig.from_pretrained
            library.enable_hf_retry()
            assert transformers.AutoConfig.from_pretrained == once
            result = transformers.AutoConfig.from_pretrained("name", revision="r")
            assert result == ((transformers.AutoConfig, "name"), {"revision": "r"})
    assert len(waits) == 2


@pytest.mark.tl
def test_numbers_of_configs(tl, monkeypatch):
    from huggingface_hub import dataclasses

    def check(name, value, expected_type):
        if not isinstance(value, expected_type):
            raise TypeError(name)

    for library in (ours, tl):
        with monkeypatch.context() as patch:
            patch.setattr(dataclasses, "_validate_simple_type", check)
            library.enable_hf_numeric_tower()
            tolerant = dataclasses._validate_simple_type
            library.enable_hf_numeric_tower()
            assert dataclasses._validate_simple_type is tolerant is not check
            for value, kind in ((10, float), (1.5, float), (True, int)):
                tolerant("rope_theta", value, kind)
            for value, kind in ((True, float), ("10", float), (1.5, int)):
                with pytest.raises(TypeError):
                    tolerant("rope_theta", value, kind)


# -- files ---------------------------------------------------------------------------------------


@pytest.fixture
def files(monkeypatch, tmp_path) -> dict[str, Any]:
    """A repository that has these files; ``asked`` holds the last download's arguments."""
    repository: dict[str, Any] = {"asked": {}}
    (tmp_path / "config.json").write_text(json.dumps({"a": [1, "é"]}), encoding="utf-8")
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    torch.save({"W": torch.eye(2)}, tmp_path / "model.pth")
    torch.save({"W": torch.eye(2)}, tmp_path / "model_final")
    torch.save({"config": SimpleNamespace(a=1)}, tmp_path / "objects.pth")

    def hf_hub_download(repo_id: str, filename: str, **options: Any) -> str:
        repository["asked"] = {"repo_id": repo_id, "filename": filename, **options}
        return str(tmp_path / filename)

    repository["download"] = hf_hub_download
    return repository


def patched(monkeypatch, library: Any, files: dict[str, Any]) -> Any:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", files["download"])
    if hasattr(library, "hf_hub_download"):
        monkeypatch.setattr(library, "hf_hub_download", files["download"])
    return library


@pytest.mark.tl
# TransformerLens leaves the file open.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("config.json", {}),
        ("notes.txt", {"subfolder": "docs"}),
        ("model.pth", {"cache_dir": "elsewhere"}),
        ("model_final", {"force_is_torch": True}),
    ],
)
def test_files(tl, monkeypatch, files, capsys, name, options):
    seen = []
    for library in (ours, tl):
        found = patched(monkeypatch, library, files).download_file_from_hf("a/b", name, **options)
        found = found["W"].tolist() if "W" in found else found
        asked = files["asked"]
        # TransformerLens asks for the folder "." of a repository, which is the repository.
        asked["subfolder"] = asked["subfolder"] or "."
        seen.append((found, asked, capsys.readouterr().out))
    assert seen[0] == seen[1]


def test_options_of_the_download_arrive(monkeypatch):
    """TransformerLens drops them all: a file of another revision is read."""
    asked: dict[str, Any] = {}

    def download(
        repo_id: str,
        filename: str,
        *,
        subfolder: str | None,
        cache_dir: str,
        revision: str = "main",
        force_download: bool = False,
    ) -> str:
        asked.update(revision=revision, force_download=force_download)
        return "notes.txt"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    ours.download_file_from_hf("a/b", "notes.txt", revision="r", force_download=True, other=1)
    assert asked == {"revision": "r", "force_download": True}


def test_pickled_objects_run_only_if_told_to(monkeypatch, files):
    patched(monkeypatch, ours, files)
    with pytest.raises(SourceError, match="'objects.pth' of 'a/b' holds more.*weights_only=False"):
        ours.download_file_from_hf("a/b", "objects.pth")
    found = ours.download_file_from_hf("a/b", "objects.pth", weights_only=False)
    assert found["config"].a == 1


def test_no_network(tmp_path):
    with pytest.raises(SourceError, match="'x.json' of 'a/b' was asked.*HF_HUB_OFFLINE"):
        ours.download_file_from_hf("a/b", "x.json", cache_dir=tmp_path)
    with pytest.raises(ModelNameError):
        ours.download_file_from_hf("not / a name", "x.json", cache_dir=tmp_path)


# -- the cache -----------------------------------------------------------------------------------


@pytest.mark.tl
def test_clearing_the_cache(tl, monkeypatch, tmp_path, capsys):
    printed = []
    for library in (ours, tl):
        cache = tmp_path / library.__name__
        (cache / "models--a--b" / "blobs").mkdir(parents=True)
        (cache / "models--a--b" / "blobs" / "x").write_bytes(b"x")
        monkeypatch.setattr(library, "CACHE_DIR", str(cache))
        for _ in range(2):
            library.clear_huggingface_cache()
            assert not cache.exists() and tmp_path.exists()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_a_cache_that_another_process_deletes(monkeypatch, tmp_path):
    def gone(error: Exception) -> None:
        ours._on_delete_error(Path.unlink, str(tmp_path / "x"), (type(error), error, None))
        ours._on_delete_error(Path.unlink, str(tmp_path / "x"), error)

    gone(FileNotFoundError(2, "gone"))
    gone(OSError(39, "not empty"))
    with pytest.raises(OSError, match="broken"):
        ours._on_delete_error(Path.unlink, str(tmp_path), OSError(5, "broken"))


def test_a_cache_that_cannot_be_deleted(monkeypatch, tmp_path):
    def rmtree(path: str, **options: Any) -> None:
        raise OSError(5, "broken")

    monkeypatch.setattr(ours, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("shutil.rmtree", rmtree)
    with pytest.raises(SourceError, match="could be deleted.*broken"):
        ours.clear_huggingface_cache()
