"""`fastlens doctor` tells what is here, and no secrets."""

import importlib.metadata
import importlib.util
import re

import pytest
import torch

from fastlens.cli import doctor
from fastlens.kernels import compiled
from fastlens.ops import dispatch
from tests.gpu.pretend_cuda import pretend_cuda


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


def test_every_op_has_a_meaning():
    assert set(doctor.MEANINGS) == set(dispatch.kernels())
    assert all(0 < len(meaning) < 100 for meaning in doctor.MEANINGS.values())


def rows_of(document):
    return {(row["op"], row["dtype"]): row for row in document["kernels"]}


def triton_is(monkeypatch, found):
    def find_spec(name, package=None, real=importlib.util.find_spec):
        return found if name == "triton" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_a_gpu_that_is_not_here(run, run_json, monkeypatch):
    """What a CUDA device would get, and what it would get with triton and the CUDA module."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    triton_is(monkeypatch, None)
    monkeypatch.setattr(compiled, "module", lambda: None)
    monkeypatch.setenv("FASTLENS_TRITON", "1")
    rows = rows_of(run_json("doctor", "--device", "cuda"))
    assert {op for op, _ in rows} == set(dispatch.kernels())
    row = rows["attention", "float32"]
    assert row["device"] == "cuda (compute 9.0, supposed)"
    assert row["kernel"] == dispatch.explain("attention", "cuda").kernel
    assert row["refused"] == {"triton attention": "triton is not installed"}
    assert row["not_run_on_a_gpu"] == ["triton attention"]
    assert "was not built" in rows["capture", "bfloat16"]["refused"]["CUDA C++ capture"]

    triton_is(monkeypatch, object())
    monkeypatch.setattr(compiled, "module", lambda: object())
    rows = rows_of(run_json("doctor", "--device", "cuda"))
    assert rows["attention", "float32"]["kernel"] == "triton attention"
    assert rows["capture", "bfloat16"]["kernel"] == "CUDA C++ capture"
    for row in rows.values():
        gpu = any(k.name == row["kernel"] and k.is_for_gpus for k in dispatch.kernels()[row["op"]])
        assert gpu == (row["kernel"] in row["not_run_on_a_gpu"])

    code, out, err = run("doctor", "--device", "cuda", "--capability", "7.5")
    assert code == 0, err
    said = "not triton attention (not run on a GPU): the GPU's compute capability is 7.5, below 8.0"
    assert said in out and "cuda (compute 7.5, supposed)" in out
    assert "CUDA C++ capture (not run on a GPU)" in out


def test_a_device_that_is_here_is_taken_as_it_is(run_json, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    triton_is(monkeypatch, object())
    rows = doctor.kernels("cuda")
    assert {row["device"] for row in rows} == {"cuda"}
    (row,) = (row for row in rows if (row["op"], row["dtype"]) == ("attention", "float32"))
    assert "capability is 7.0" in row["refused"]["triton attention"]
    assert {row["device"] for row in doctor.kernels("cpu")} == {"cpu"}
    assert {row["device"] for row in doctor.kernels("cuda", "9.0")} == {
        "cuda (compute 9.0, supposed)"
    }


def test_under_a_pretended_gpu(run_json):
    """As on a machine that has one, with triton, the CUDA module and FASTLENS_TRITON=1."""
    with pretend_cuda(csrc=True, capability=(8, 0)):
        document = run_json("doctor")
    assert {"name": "cuda:0", "about": "pretended GPU, compute 8.0, 80.0 GiB"} in document[
        "devices"
    ]
    rows = {(row["op"], row["device"]): row for row in document["kernels"]}
    assert {device for _, device in rows} == {"cpu", "cuda"}
    assert rows["attention", "cuda"]["kernel"] == "triton attention"
    assert rows["capture", "cuda"]["kernel"] == "CUDA C++ capture"
    assert rows["capture", "cuda"]["not_run_on_a_gpu"] == ["CUDA C++ capture"]
    assert "triton attention" in rows["attention", "cpu"]["refused"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "mps"], "kernels are for cpu or cuda"),
        (["--capability", "9.0"], "add --device cuda"),
        (["--device", "cuda", "--capability", "sm_90"], "write it as 8.0 or 9.0"),
    ],
)
def test_options_that_make_no_sense(run, options, said):
    code, _, err = run("doctor", *options)
    assert code != 0 and said in err
