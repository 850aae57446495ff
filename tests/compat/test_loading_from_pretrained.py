"""`loading_from_pretrained`; values against TransformerLens: tests/compat/calls/loading.py."""

import huggingface_hub
import pytest
import torch

from fastlens import HookedTransformer
from fastlens.compat import loading_from_pretrained as loading
from fastlens.errors import ConfigError, ModelNameError, SourceError
from tests.weights.checkpoints import hf_model, prompt, save_folder
from tests.weights.toys import RUN, SIZES, save_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("saved"), "llama_grouped")


def test_a_config_without_weights(folder):
    """The same as loading the model gives, options included."""
    options = {"first_n_layers": 2, "n_ctx": 16, "default_prepend_bos": False, "device": "cpu"}
    cfg = loading.get_pretrained_model_config(str(folder), fold_ln=True, **options)
    model = HookedTransformer.from_pretrained(folder, verbose=False, **options)
    got, want = dict(cfg.to_dict()), dict(model.cfg.to_dict())
    for name in ("tokenizer_name", "tokenizer_prepends_bos"):  # the folder holds no tokenizer
        got.pop(name), want.pop(name)
    assert got == want
    (folder / "model.safetensors").rename(folder / "away")
    assert loading.get_num_params_of_pretrained(str(folder)) > 0
    (folder / "away").rename(folder / "model.safetensors")


def test_options_of_a_config(folder, caplog):
    cfg = loading.get_pretrained_model_config(
        str(folder), hf_cfg={"vocab_size": 99}, n_ctx=4096, dtype=torch.bfloat16, device="cpu"
    )
    assert cfg.d_vocab == 99 and cfg.n_ctx == 4096 and cfg.dtype == torch.bfloat16
    assert cfg.normalization_type == "RMS" and "n_ctx=4096 is longer" in caplog.text
    with pytest.raises(ConfigError, match="3 layers"):
        loading.get_pretrained_model_config(str(folder), first_n_layers=9)
    toy = loading.get_basic_config("toy-induction", device="cpu")
    assert (
        toy.n_layers
        == HookedTransformer.from_pretrained("toy-induction", verbose=False).cfg.n_layers
    )
    assert toy.debug is True


def test_weights_by_name_and_in_memory(folder):
    cfg = loading.get_pretrained_model_config(str(folder), device="cpu")
    want = HookedTransformer.from_pretrained_no_processing(folder, verbose=False, device="cpu")
    for hf in (None, hf_model("llama_grouped")):
        tensors = loading.get_pretrained_state_dict(str(folder), cfg, hf, torch.float64)
        assert {v.dtype for k, v in tensors.items() if "W_" in k} == {torch.float64}
        model = HookedTransformer(cfg)
        model.load_state_dict(model.fill_missing_keys(tensors))
        assert torch.equal(model(prompt()), want(prompt()))


def test_names_and_checkpoints():
    assert loading.get_official_model_name("gpt2-small") == "gpt2"
    assert loading.get_official_model_name("toy-induction") == "toy-induction"
    # TransformerLens knows no other models than its own; here any repository may be asked for.
    assert loading.get_official_model_name("someone/something") == "someone/something"
    with pytest.raises(ValueError, match="Nearest: 'gpt2"):
        loading.get_official_model_name("gtp2")
    with pytest.raises(ValueError, match="the checkpoints of 'gpt2'"):
        loading.get_checkpoint_labels("gpt2")
    assert loading.PYTHIA_CHECKPOINTS[:3] == [0, 1, 2] and loading.PYTHIA_V0_CHECKPOINTS[0] == 1000
    with pytest.raises(ModelNameError, match="no checkpoint at that step"):
        loading.get_pretrained_model_config("pythia-70m", checkpoint_value=3)


def test_offline_and_broken_folders(tmp_path):
    with pytest.raises(SourceError, match="hub could not be reached, or is switched off"):
        loading.get_pretrained_model_config("EleutherAI/pythia-14m")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(SourceError, match="cannot be read"):
        loading.convert_hf_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["OddModel"]}', encoding="utf-8")
    with pytest.raises(ConfigError, match="OddModel"):
        loading.convert_hf_model_config(str(tmp_path))


COMPARED = ["transformer_lens.loading_from_pretrained.convert_neel_model_config"]


@pytest.mark.tl
@pytest.mark.parametrize("name", ["solu-1l", "solu-1l-pile", "attn-only-demo", "redwood_attn_2l"])
def test_configs_of_toy_models(name, tmp_path, monkeypatch):
    """As TransformerLens reads the same file."""
    theirs = pytest.importorskip("transformer_lens.loading_from_pretrained")
    config = {**SIZES, **RUN, "shortformer_pos": "demo" in name, "final_rms": "pile" in name}
    config["tokenizer_name"] = "NeelNanda/gpt-neox-tokenizer-digits"
    save_toy(tmp_path, config, {})
    monkeypatch.setattr(theirs.utils, "download_file_from_hf", lambda *_, **__: config)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    want = theirs.convert_neel_model_config(name)
    assert loading.convert_neel_model_config(name) == want
    assert loading.get_pretrained_model_config(name, device="cpu").n_ctx == want["n_ctx"]
