"""Loading a model for a command."""

import pytest
import torch

from fastlens.cli import loading
from fastlens.cli.options import Dtype, OptionError
from fastlens.errors import ModelNameError, SourceError


def test_quiet_and_as_asked(model_folder, capsys):
    model = loading.load_model(str(model_folder), device="cpu", dtype=Dtype.float64)
    assert model.W_E.dtype == torch.float64 and model.cfg.normalization_type == "LNPre"
    assert capsys.readouterr().out == ""
    plain = loading.load_model(str(model_folder), processing=False)
    assert plain.cfg.normalization_type == "LN"
    assert "2 layers, 4 heads, d_model 32, float32 on cpu" in loading.described(plain)


def test_unknown_names_have_near_ones():
    with pytest.raises(ModelNameError, match="Nearest: .*gpt2"):
        loading.load_model("gpt2-smal")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpuu"])
def test_a_device_that_is_not_here_is_found_before_loading(device, model_folder):
    with pytest.raises(OptionError, match=f"--device {device} cannot be used here: "):
        loading.load_model(str(model_folder / "nothing"), device=device)


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot write into the folder"):
        loading.writable(tmp_path / "file" / "inside")
    assert loading.writable(None) is None
    assert loading.writable(tmp_path / "new" / "deep").is_dir()
