"""`fastlens sweep` does what `fastlens.patching.sweep` does, and says early what is wrong."""

import json

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.cli import loading
from fastlens.patching import answer_prob, kl_divergence, logit_diff, sweep
from fastlens.scores import Scores
from tests.cli.conftest import CLEAN, CORRUPTED
from tests.close import assert_close_to


@pytest.fixture(scope="module")
def model(model_folder) -> HookedTransformer:
    return HookedTransformer.from_pretrained(model_folder, verbose=False)


@pytest.fixture
def no_loading(monkeypatch) -> None:
    """What can be known to be wrong must be said before a model is loaded."""

    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_model", fail)


def test_table_and_files(run, sweep_line, model, tmp_path):
    out = tmp_path / "new" / "folder"
    code, text, err = run(*sweep_line, "--out", out, "--top", 3)
    assert code == 0, err
    expected = sweep(model, CLEAN, CORRUPTED, metric=logit_diff(" the", " a"))
    saved = Scores.load(out)
    assert_close_to(saved.values, expected.values)
    assert saved.labels == expected.labels and saved.labels["pos"][0].startswith("<|endoftext|>")
    assert expected.table(3) in text
    for name in ("scores.json", "scores.safetensors", "heatmap.png"):
        assert str(out / name) in text and (out / name).stat().st_size > 100


def test_without_out_nothing_is_written(run, sweep_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text, _ = run(*sweep_line)
    assert code == 0 and "logit difference" in text
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_document(run, sweep_line, tmp_path):
    code, text, _ = run(*sweep_line, "--json", "--out", tmp_path, "--top", 2)
    assert code == 0
    document = json.loads(text)
    saved = Scores.load(tmp_path)
    assert document["command"] == "sweep"
    assert torch.tensor(document["values"]).shape == saved.values.shape
    assert_close_to(torch.tensor(document["values"]), saved.values)
    assert len(document["strongest"]) == 2
    assert document["strongest"][0]["value"] == pytest.approx(saved.top(1)[0].value)
    assert document["files"]["heatmap"] == str(tmp_path / "heatmap.png")
    assert document["baselines"].keys() == {"clean", "corrupted"}


def test_every_option_reaches_the_sweep(run_json, sweep_line, model):
    document = run_json(
        *sweep_line,
        *("--sites", "z", "--by", "layer,pos,head", "--layers", "1", "--positions=-2:"),
        *("--heads", "0,-1", "--direction", "noising", "--normalize", "--verify", "all"),
        *("--memory", "150MB", "--window", "2", "--source", "0.5", "--mode", "scale"),
    )
    expected = sweep(
        model,
        CLEAN,
        CORRUPTED,
        sites="z",
        by=("layer", "pos", "head"),
        metric=logit_diff(" the", " a", normalize=True),
        layers=1,
        positions=slice(-2, None),
        heads=[0, -1],
        direction="noising",
        verify="all",
        window=2,
        source=0.5,
        mode="scale",
    )
    assert document["axes"] == ["layer", "pos", "head"]
    assert document["labels"] == expected.labels
    assert_close_to(torch.tensor(document["values"]), expected.values)
    assert document["certificate"]["runs"] == expected.values.numel()


def test_options_of_single_sites(run_json, sweep_line, model):
    metric = logit_diff(" the", " a")
    of_pattern = run_json(*sweep_line, "--sites", "pattern", "--key-positions", "1,2")
    expected = sweep(model, CLEAN, CORRUPTED, sites="pattern", key_positions=[1, 2], metric=metric)
    assert_close_to(torch.tensor(of_pattern["values"]), expected.values)
    options = ("--sites", "mlp_post", "--by", "layer,neuron", "--neurons", "3,5")
    of_neurons = run_json(*sweep_line, *options, "--source", "zero")
    assert of_neurons["labels"]["neuron"] == ["N3", "N5"]


def test_verify_is_the_librarys_unless_said(run_json, sweep_line):
    assert run_json(*sweep_line)["certificate"]["runs"] == 1
    assert run_json(*sweep_line, "--verify", "0")["certificate"]["runs"] == 0


@pytest.mark.parametrize(
    ("options", "metric"),
    [
        (["--metric", "answer_prob", "--answer", " the"], answer_prob(" the")),
        (["--metric", "kl"], kl_divergence()),
    ],
)
def test_metrics(run_json, model, model_folder, options, metric):
    line = ["sweep", "--model", model_folder, "--clean", CLEAN, "--corrupted", CORRUPTED]
    document = run_json(*line, *options)
    expected = sweep(model, CLEAN, CORRUPTED, metric=metric)
    assert_close_to(torch.tensor(document["values"]), expected.values)
    assert document["unit"] == metric.unit


def test_bos_and_processing(run_json, sweep_line, model_folder):
    document = run_json(*sweep_line, "--no-prepend-bos", "--no-processing", "--dtype", "float64")
    plain = HookedTransformer.from_pretrained_no_processing(
        model_folder, default_prepend_bos=False, dtype="float64", verbose=False
    )
    expected = sweep(plain, CLEAN, CORRUPTED, metric=logit_diff(" the", " a"))
    assert document["labels"]["pos"] == expected.labels["pos"]
    assert not document["labels"]["pos"][0].startswith("<|endoftext|>")
    assert_close_to(torch.tensor(document["values"], dtype=torch.float64), expected.values)


def test_several_sites(run_json, sweep_line):
    document = run_json(*sweep_line, "--sites", "resid_pre,mlp_out")
    assert document["axes"] == ["site", "layer", "pos"]
    assert document["labels"]["site"] == ["resid_pre", "mlp_out"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sites", "resid_per"], "no site 'resid_per'. Nearest: 'resid_pre'"),
        (["--layers", "1-3"], "--layers '1-3' is not a selection"),
        (["--verify", "some"], "--verify 'some' must be a number or all"),
        (["--metric", "logit_dif"], "no metric 'logit_dif'. Nearest: 'logit_diff'"),
        (["--metric", "kl,kl"], "names a metric twice"),
        (["--metric", ","], "is empty"),
        (["--sites", ","], "--sites is empty"),
        (["--by", "layer,head"], "resid_pre cannot be swept by 'head'"),
        (["--mode", "swap"], "Invalid value for '--mode'"),
        (["--source", "zeros"], "--source 'zeros' is none of other, zero, mean, resample"),
        (["--memory", "much"], "memory 'much' is no amount"),
        (["--window", "0"], "Invalid value for '--window'"),
        (["--key-positions", "x"], "--key-positions 'x' is not a selection"),
        (["--clean", "another"], "2 x --clean and 1 x --corrupted do not pair up"),
        (["--answer", "x", "--answer", "y"], "3 x --answer for 1 pairs"),
        (["--pairs", "FILE"], "leave out --clean and --corrupted"),
        (["--direction", "up"], "Invalid value for '--direction'"),
        (["--out", "FILE/inside"], "cannot write into the folder"),
    ],
)
def test_mistakes_are_found_before_loading(run, sweep_line, no_loading, tmp_path, options, said):
    (tmp_path / "file").write_text("")
    options = [option.replace("FILE", str(tmp_path / "file")) for option in options]
    code, out, err = run(*sweep_line, *options)
    assert (code, out) == (2, "") and said in err


def test_answers_are_asked_for(run, no_loading):
    line = ["sweep", "--model", "m", "--clean", "a", "--corrupted", "b"]
    code, _, err = run(*line[:-2])
    assert code == 2 and "--corrupted is missing" in err
    code, _, err = run(*line)
    assert code == 2 and "--metric logit_diff needs --answer" in err
    code, _, err = run(*line, "--answer", "x")
    assert code == 2 and "--metric logit_diff needs --wrong" in err
    code, _, err = run(*line, "--metric", "answer_prob")
    assert code == 2 and "--metric answer_prob needs --answer" in err


def test_mistakes_that_need_the_model(run, model_folder, sweep_line):
    line = ["sweep", "--model", model_folder, "--clean", CLEAN]
    answers = ["--answer", " the", "--wrong", " a"]
    code, _, err = run(*line, "--corrupted", "the cat", *answers)
    assert code == 2 and "tokens" in err and "clean" in err and "corrupted" in err
    assert "^" in err, "both tokenizations are shown aligned"
    several = ["--answer", "zebra", "--wrong", " a"]
    code, _, err = run(*line, "--corrupted", CORRUPTED, *several)
    assert code == 2 and "zebra" in err and "token" in err
    code, _, err = run(*sweep_line, "--layers", "7")
    assert code == 2 and "layers 7 is out of range" in err


def test_an_answer_that_forgot_its_space(run, model_folder):
    line = ["sweep", "--model", model_folder, "--clean", CLEAN, "--corrupted", CORRUPTED]
    code, _, err = run(*line, "--answer", "a", "--wrong", " the")
    assert code == 0 and "'a' is taken as the token without a space" in err
    code, _, err = run(*line, "--answer", " a", "--wrong", "b")
    # " b" is two tokens here, so "b" can only mean itself.
    assert code == 0 and "without a space" not in err


# -- several metrics and pairs -------------------------------------------------------------------


PAIRS = [
    ("the cat in a can", "the can in a cat", " the", " a"),
    ("a cat on the can", "a can on the cat", " a", " the"),
    ("in the cat", "on the cat", " the", " a"),
]


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join("\t".join(row) for row in PAIRS) + "\n\n")
    return path


def expected_of_pairs(model, metric):
    return sweep(model, [p[0] for p in PAIRS], [p[1] for p in PAIRS], metric=metric)


def test_several_metrics(run_json, sweep_line, model):
    document = run_json(*sweep_line, "--metric", "logit_diff, kl")
    assert document["axes"] == ["metric", "layer", "pos"]
    names = document["labels"]["metric"]
    expected = sweep(model, CLEAN, CORRUPTED, metric=[logit_diff(" the", " a"), kl_divergence()])
    assert names == expected.labels["metric"]
    assert_close_to(torch.tensor(document["values"]), expected.values)
    assert [document["by_metric"][name]["unit"] for name in names] == ["logits", "nats"]


def test_pairs_of_a_file_have_standard_errors(run, run_json, model, model_folder, pairs_file):
    line = ["sweep", "--model", model_folder, "--pairs", pairs_file]
    document = run_json(*line)
    answers = [[p[i] for p in PAIRS] for i in (2, 3)]
    expected = expected_of_pairs(model, logit_diff(*answers))
    assert_close_to(torch.tensor(document["values"]), expected.values)
    assert_close_to(torch.tensor(document["standard_error"]), expected.standard_error)
    assert document["labels"]["pos"][-1] == "-1", "pairs of different lengths: from the end"
    _, text, _ = run(*line)
    assert "mean of 3 examples" in text and "+-" in text


def test_pairs_given_one_by_one(run_json, model, model_folder):
    line = ["sweep", "--model", model_folder, "--answer", " the", "--wrong", " a"]
    for clean, corrupted, _, _ in PAIRS:
        line += ["--clean", clean, "--corrupted", corrupted]
    document = run_json(*line)
    expected = expected_of_pairs(model, logit_diff(" the", " a"))
    assert_close_to(torch.tensor(document["values"]), expected.values)


def test_a_picture_that_cannot_be_drawn_costs_no_table(run, sweep_line, tmp_path):
    options = ("--sites", "resid_pre,attn_out", "--metric", "logit_diff,kl", "--out", tmp_path)
    code, text, err = run(*sweep_line, *options)
    assert code == 0 and "logit difference" in text
    assert "no heatmap: " in err and not (tmp_path / "heatmap.png").exists()
    assert Scores.load(tmp_path).axes == ("metric", "site", "layer", "pos")


# -- plans and folders ---------------------------------------------------------------------------


def test_explain_runs_nothing(run, run_json, sweep_line, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was run")

    plain_call = torch.nn.Module.__call__

    def not_the_model(self, *args, **kwargs):
        assert not isinstance(self, HookedTransformer), "the model was run"
        return plain_call(self, *args, **kwargs)

    monkeypatch.setattr("fastlens.patching.wave.Wave.run", refuse)
    # Not on HookedTransformer itself: a method replaced there is a reason not to run the wave.
    monkeypatch.setattr("torch.nn.Module.__call__", not_the_model)
    code, text, _ = run(*sweep_line, "--explain", "--memory", "1GiB", "--out", tmp_path / "new")
    assert code == 0 and "strategy: wave" in text and "GFLOP" in text
    assert not (tmp_path / "new").exists()
    document = run_json(*sweep_line, "--explain", "--memory", "1GiB")
    assert document["plan"]["strategy"] == "wave"
    assert document["explanation"] in text


def test_an_interrupted_sweep_goes_on(run, sweep_line, tmp_path):
    line = (*sweep_line, "--out", tmp_path)
    _, first, err = run(*line)
    assert "goes on from there" not in err
    shard = tmp_path / "chunks" / "00000.safetensors"
    written = shard.stat().st_mtime_ns
    code, again, err = run(*line)
    assert code == 0 and again == first
    assert "1 finished part of a sweep" in err and "goes on from there" in err
    assert shard.stat().st_mtime_ns == written
    code, _, err = run(*line, "--normalize")
    assert code == 2 and "holds another sweep: metrics" in err
