"""Memory on the GPU, printed."""

import pytest
import torch

from fastlens.compat.utilities.gpu_utils import print_gpu_mem

COMPARED = ["transformer_lens.utilities.gpu_utils.print_gpu_mem"]


@pytest.mark.tl
@pytest.mark.parametrize("step", ["", "after loading"])
def test_the_words_of_transformer_lens(theirs, capsys, monkeypatch, step):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    print_gpu_mem(step)
    ours = capsys.readouterr().out
    theirs("gpu_utils").print_gpu_mem(step)
    assert ours == capsys.readouterr().out


def test_gibibytes(capsys, monkeypatch):
    """TransformerLens divides by 2e30, so that it always prints 0.0."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 * 2**29)
    print_gpu_mem("now")
    assert capsys.readouterr().out == "now ~ 1.5 GiB allocated on GPU.\n"
