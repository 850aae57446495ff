"""`fastlens heads` prints what `head_scores` finds."""

import inspect

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.analysis.head_scores import head_scores
from fastlens.cli import loading
from fastlens.cli.heads import KINDS
from fastlens.scores import Scores
from tests.close import assert_close_to


def test_kinds_are_those_of_head_scores():
    assert inspect.signature(head_scores).parameters["kinds"].default == KINDS


def test_tables_and_files(run, model_folder, tmp_path):
    code, out, err = run("heads", "--model", model_folder, "--out", tmp_path, "--top", 2)
    assert code == 0, err
    scores = Scores.load(tmp_path)
    for kind in KINDS:
        part = out.split(f"\n{kind}\n")[1].splitlines()
        cells = scores.select(kind=kind).top(2)
        assert part[:2] == [f"  {cell.name}  {cell.value:.3f}" for cell in cells]
    assert f"{scores.meta['loss_second_half']:.2f} in the repetition" in out
    assert (tmp_path / "heatmap.png").is_file()


def test_json_and_options(run_json, model_folder):
    document = run_json(
        *("heads", "--model", model_folder, "--kinds", "duplicate_token,induction"),
        *("--seq-len", 7, "--batch", 2, "--seed", 5, "--no-prepend-bos", "--top", 1),
    )
    model = HookedTransformer.from_pretrained(
        model_folder, default_prepend_bos=False, verbose=False
    )
    kinds = ["duplicate_token", "induction"]
    expected = head_scores(model, kinds=kinds, seq_len=7, batch=2, seed=5)
    assert_close_to(torch.tensor(document["values"]), expected.values)
    assert document["labels"]["kind"] == kinds == list(document["strongest"])
    best = expected.select(kind="induction").top(1)[0]
    assert document["strongest"]["induction"][0]["value"] == pytest.approx(best.value)


def test_mistakes_are_found_before_loading(run, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "load_model", None)
    code, _, err = run("heads", "--model", "m", "--kinds", "inductoin")
    assert code == 2 and "Nearest: 'induction'" in err
    (tmp_path / "file").write_text("")
    code, _, err = run("heads", "--model", "m", "--out", tmp_path / "file" / "x")
    assert code == 2 and "cannot write into the folder" in err


def test_a_length_that_does_not_fit(run, model_folder):
    code, _, err = run("heads", "--model", model_folder, "--seq-len", 1000)
    assert code == 2 and "do not fit the model's context of 64" in err
