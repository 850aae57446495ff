"""The example scripts on the models they are written for."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastlens.scores import Scores
from tests.close import assert_close_to
from tests.smollm2 import smollm2

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def load(name: str) -> ModuleType:
    """An example as a module, without running its command line."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_activation_patching(tmp_path, capsys):
    model = smollm2()
    example = load("activation_patching")
    # Every layer is the demo's test.
    scores = example.main(model, layers=slice(0, None, 5), out=tmp_path)
    assert scores.baselines["clean"] == pytest.approx(2.857, abs=0.01)
    assert scores.baselines["corrupted"] == pytest.approx(-8.704, abs=0.01)
    # The name carries the place through the lower layers, the last token through the upper ones.
    assert scores.values.argmax(1).tolist() == [2, 2, 2, 2, 2, 8]
    with torch.no_grad():
        by_hand = example.patch_by_hand(model, 15)
    assert_close_to(scores.select(layer="L15").values, by_hand, atol=1e-3)
    assert Scores.load(tmp_path).values.equal(scores.values)
    assert (tmp_path / "heatmap.png").is_file()
    assert "clean:     +2.857" in capsys.readouterr().out


@pytest.mark.slow
def test_ioi(capsys):
    model = smollm2()
    found = load("ioi").main(model)
    assert found["logit_diff"].item() == pytest.approx(5.88, abs=0.01)
    assert_close_to(found["lens"][-1], found["logit_diff"], atol=1e-3)
    assert_close_to(found["by_part"].sum(), found["logit_diff"], atol=1e-3)
    # Heads of a layer sum to what its attention wrote (no output biases in this model).
    per_layer = found["by_head"].view(model.cfg.n_layers, model.cfg.n_heads).sum(1)
    assert_close_to(per_layer, found["by_part"][1::2], atol=1e-3)
    out = capsys.readouterr().out
    assert "Rank: 0" in out and "| John|" in out and "heads: L23H3" in out


@pytest.mark.slow
def test_induction_heads_of_a_language_model(capsys):
    model = smollm2()
    scores, second, ablated = load("induction_heads").main(model)
    assert second < 3.0 and ablated > second + 3.0
    assert scores.meta["loss_first_half"] > 13.0
    assert scores.select(kind="induction").top(1)[0].name == "L18H6"
    assert "loss per token" in capsys.readouterr().out


def test_induction_heads_of_the_toy():
    from fastlens import HookedTransformer

    model = HookedTransformer.from_pretrained("toy-induction", verbose=False)
    scores, second, ablated = load("induction_heads").main(model)
    assert scores.select(kind="induction").values.max() > 0.8
    assert scores.meta["loss_second_half"] < 0.5 * scores.meta["loss_first_half"]
    assert ablated > 2 * second
    assert torch.is_grad_enabled()


@pytest.mark.slow
def test_sae(capsys):
    from fastlens import HookedTransformer

    model = HookedTransformer.from_pretrained("toy-induction", verbose=False)
    by_feature, together = load("sae").main(model)
    # The token before is written at position 6 alone, by a few features.
    assert by_feature.values.shape == (1, 18, 256)
    assert by_feature.values[0].amax(1).argmax() == 6
    alone = by_feature.values[0, 6].sort(descending=True).values
    assert alone[0] > 0.1 and alone[10] < 0.01
    found = dict(zip(together.labels["run"], together.values.tolist(), strict=True))
    assert found["the stream itself"] == pytest.approx(1.0, abs=0.05)
    assert found["the best 1"] == pytest.approx(alone[0].item(), abs=1e-5)
    assert found["the best 2"] > 1.5 * found["the best 1"] and found["all features"] > 0.3
    assert "of the variance explained" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_a_command_line(name, tmp_path):
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert result.returncode == 0, result.stderr
    assert "--model" in result.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_stay_readable(name):
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 110, "an example is read in one sitting"
