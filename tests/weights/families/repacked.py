"""Llama's arithmetic under other names: transformers' Llama is the truth for remote code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastlens import HookedTransformer
from tests.close import assert_close_to
from tests.weights.families.generated import float64_throughout, tokens_of

Repack = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """A tiny random Llama; gains random too."""
    config = LlamaConfig(**{
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1, **changes,
    })  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with float64_throughout():
            model = LlamaForCausalLM._from_config(config, attn_implementation="eager").to(dtype)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def save(folder: Path, config: dict[str, Any], repack: Repack, **changes: Any) -> Path:
    """A folder as the remote code's repository holds it."""
    tensors = repack(dict(llama(**changes).state_dict()))
    save_file(
        {name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def check(folder: Path, **changes: Any) -> HookedTransformer:
    """Logits, KV cache and processing of the folder's model against transformers' Llama."""
    tokens = tokens_of()
    wide = {"verbose": False, "dtype": torch.float64}
    with torch.no_grad():
        with float64_throughout():
            want = llama(torch.float64, **changes)(tokens).logits
        ours = HookedTransformer.from_pretrained_no_processing(folder, **wide)
        assert_close_to(ours(tokens), want, atol=1e-9, name="logits in float64")
        narrow = HookedTransformer.from_pretrained_no_processing(folder, verbose=False)
        assert_close_to(narrow(tokens), want.float(), atol=1e-5, name="logits")
        folded = HookedTransformer.from_pretrained(folder, verbose=False)
        streamed = HookedTransformer.from_pretrained(folder, verbose=False, offload="disk")
        assert torch.equal(streamed(tokens), folded(tokens))
        got, truth = folded(tokens).log_softmax(-1), want.float().log_softmax(-1)
        assert_close_to(got, truth, atol=2e-5, name="log p")
        options = {"do_sample": False, "stop_at_eos": False, "verbose": False}
        made = narrow.generate(tokens[:, :6], max_new_tokens=4, **options)
        again = llama(**changes)(made).logits[:, 5:-1].argmax(-1)
        assert torch.equal(made[:, 6:], again)
    return narrow
