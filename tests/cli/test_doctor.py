"""`fastlens doctor` tells what is here, and no secrets."""

import importlib.metadata
import re

import torch

from fastlens.cli import doctor
from fastlens.ops import dispatch


def test_it_says_everything(run):
    code, out, err = run("doctor")
    assert code == 0, err
    for title in ("versions", "devices", "memory", "kernels", "models", "settings"):
        assert f"{title}\n" in out
    for text in (torch.__version__, *dispatch.kernels(), "toy-induction", "HF_HUB_OFFLINE"):
        assert text in out
    assert max(map(len, out.splitlines())) < 200


def test_tokens_are_not_shown(run, run_json, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    _, out, _ = run("doctor")
    assert "hf_secret" not in out and re.search(r"HF_TOKEN +set ", out)
    settings = {row["name"]: row["value"] for row in run_json("doctor")["settings"]}
    assert settings["HF_TOKEN"] == "set"
    monkeypatch.delenv("HF_TOKEN")
    assert {row["name"]: row["value"] for row in doctor.settings()}["HF_TOKEN"] == "not set"


def test_missing_packages_say_what_they_are_for(monkeypatch):
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("plotly", "einops"):
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = doctor.versions()
    assert found["plotly"] == "not installed (for interactive plots)"
    assert found["einops"] == "MISSING"


def test_refusals_are_explained(run, monkeypatch):
    choice = dispatch.Choice("norm", "plain", {"triton norm": "it needs a GPU"})
    monkeypatch.setattr(dispatch, "explain", lambda *args: choice)
    _, out, _ = run("doctor")
    assert "not triton norm: it needs a GPU" in out


def test_gpus(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "Big GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**30, 80 * 2**30))
    assert {"name": "cuda:0", "about": "Big GPU, compute 9.0, 80.0 GiB"} in doctor.devices()
    assert doctor.memory()["cuda:0"] == "1.0 GiB unused of 80.0 GiB"


def test_json_holds_the_same(run_json):
    document = run_json("doctor")
    ops = {row["op"] for row in document["kernels"]}
    assert ops == set(dispatch.kernels())
    assert all(row["kernel"] for row in document["kernels"])
    assert document["versions"]["torch"] == torch.__version__
