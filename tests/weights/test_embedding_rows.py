"""Tokens' vectors that are read one by one."""

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.weights.embedding_rows import EmbeddingRows, UnembedColumns
from tests.weights.checkpoints import VOCAB, save_folder, write_gguf

CASES = ["gpt2", "gpt2_untied", "neox", "llama_grouped", "llama_tied"]


def load(path, **options):
    return HookedTransformer.from_pretrained(str(path), verbose=False, **options)


def models(path, **options):
    return load(path, **options), load(path, offload="disk", **options)


def check(in_memory, streamed):
    tokens = torch.tensor([[5, 3, 3], [59, 0, 17]])
    with torch.no_grad():
        assert torch.equal(streamed.embed.rows(tokens), in_memory.W_E[tokens])
        columns = torch.tensor([7, 5, 7, 0])
        weight, bias = streamed.unembed.columns(columns)
        assert torch.equal(weight, in_memory.W_U.t()[columns])
        assert torch.equal(bias, in_memory.b_U[columns])
    assert streamed.streaming.stream.bytes_read == 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("processed", [True, False])
def test_the_same_as_in_memory(tmp_path, case, dtype, processed):
    names = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    flags = {} if processed else dict.fromkeys(names, False)
    check(*models(save_folder(tmp_path / case, case), dtype=dtype, **flags))


@pytest.mark.parametrize("quantize", [None, "Q8_0"])
def test_from_gguf(tmp_path, quantize):
    path = write_gguf(tmp_path / "model.gguf", "llama_grouped", quantize=quantize)
    check(*models(path))


def test_the_kinds_and_their_absence(tmp_path):
    in_memory, streamed = models(save_folder(tmp_path / "gpt2", "gpt2"))
    assert isinstance(streamed.embed.rows, EmbeddingRows)
    assert isinstance(streamed.unembed.columns, UnembedColumns)
    assert in_memory.embed.rows is None
    in_memory.save_pretrained(tmp_path / "native")
    native = load(tmp_path / "native", offload="disk")
    # A column there is scattered over the file.
    assert native.unembed.columns is None
    assert native.embed.rows is not None


def test_the_whole_one_is_used_where_it_is_in_memory(tmp_path):
    _, streamed = models(save_folder(tmp_path / "gpt2", "gpt2"))
    with torch.no_grad():
        streamed.W_E.mul_(2)
        streamed.W_U.mul_(2)
    assert streamed.embed.rows(torch.tensor([[1]])) is None
    assert streamed.unembed.columns(torch.tensor([1])) is None


def test_tokens_outside_the_vocabulary(tmp_path):
    _, streamed = models(save_folder(tmp_path / "gpt2", "gpt2"))
    for token in (-1, VOCAB):
        with pytest.raises(IndexError, match=f"the vocabulary has 0 to {VOCAB - 1}"):
            streamed.embed.rows(torch.tensor([[token]]))
    assert streamed.embed.rows(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 32)
