"""TransformerLens' ``convert_*_weights``: a transformers model's tensors under TransformerLens'
names, by the tables of `fastlens.weights.families`.
"""

from typing import Any

import torch
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import WeightsError
from fastlens.weights.source import Source, open_source


def _converted(hf_model: Any, cfg: HookedTransformerConfig, family: str) -> dict[str, Tensor]:
    source = open_source(cfg.model_name, hf_model=hf_model)
    if source.family is None or source.family.name != family:
        raise WeightsError(f"a {family} model was asked, but {type(hf_model).__name__} was given.")
    return tensors_of(source, cfg)


def tensors_of(
    source: Source, cfg: HookedTransformerConfig, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """All tensors of a source at once; biases it lacks are zero, as in TransformerLens.

    ``dtype`` is what they come in; by default as they are stored. Tensors of a model in memory are
    views of its own where the dtype is the same.
    """
    tensors = {
        key: tensor for _, group in source.groups(cfg, dtype) for key, tensor in group.items()
    }
    if source.family is None or source.family.model_class == "HookedTransformer":
        for key, shape in _biases(cfg).items():
            if key not in tensors:
                tensors[key] = torch.zeros(shape, dtype=cfg.dtype, device=cfg.device)
    return tensors


def _biases(cfg: HookedTransformerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every bias a model of this config has."""
    kv, kv_heads = ("", cfg.n_heads)
    if cfg.n_key_value_heads is not None:
        kv, kv_heads = "_", cfg.n_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(cfg.n_layers):
        attn, mlp = f"blocks.{layer}.attn.", f"blocks.{layer}.mlp."
        shapes[attn + "b_Q"] = (cfg.n_heads, cfg.d_head)
        shapes |= dict.fromkeys((f"{attn}{kv}b_K", f"{attn}{kv}b_V"), (kv_heads, cfg.d_head))
        shapes[attn + "b_O"] = (cfg.d_model,)
        if cfg.d_mlp is not None and not cfg.attn_only:
            shapes |= {mlp + "b_in": (cfg.d_mlp,), mlp + "b_out": (cfg.d_model,)}
    return {**shapes, "unembed.b_U": (cfg.d_vocab_out,)}


def convert_gpt2_weights(gpt2: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `GPT2LMHeadModel`'s tensors."""
    return _converted(gpt2, cfg, "gpt2")


def convert_neox_weights(neox: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `GPTNeoXForCausalLM`'s tensors."""
    return _converted(neox, cfg, "gpt_neox")


def convert_llama_weights(llama: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `LlamaForCausalLM`'s tensors."""
    return _converted(llama, cfg, "llama")


def convert_mistral_weights(mistral: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `MistralForCausalLM`'s tensors."""
    return _converted(mistral, cfg, "mistral")


def convert_bert_weights(bert: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `BertForPreTraining`'s tensors."""
    return _converted(bert, cfg, "bert")


def convert_t5_weights(t5: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `T5ForConditionalGeneration`'s tensors."""
    return _converted(t5, cfg, "t5")
