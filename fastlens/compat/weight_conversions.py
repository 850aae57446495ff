"""TransformerLens' ``convert_*_weights``: a transformers model's tensors under TransformerLens'
names, by the tables of `fastlens.weights.families`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import WeightsError
from fastlens.weights.families.gpt2 import KEYS as GPT2_KEYS
from fastlens.weights.families.mingpt import KEYS as MINGPT_KEYS
from fastlens.weights.family import Key, Place
from fastlens.weights.own_format import OldLayout
from fastlens.weights.source import Source, open_source
from fastlens.weights.tensor_files import LiveReader
from fastlens.weights.views import transposed


def _converted(hf_model: Any, cfg: HookedTransformerConfig, *families: str) -> dict[str, Tensor]:
    source = open_source(cfg.model_name, hf_model=hf_model)
    if source.family is None or source.family.name not in families:
        asked = " or ".join(families)
        raise WeightsError(f"a {asked} model was asked, but {type(hf_model).__name__} was given.")
    return tensors_of(source, cfg)


def _by_table(
    keys: Mapping[str, Key | None], tensors: Mapping[str, Tensor], cfg: HookedTransformerConfig
) -> dict[str, Tensor]:
    """A plain state dict by a table; what it lacks is left out."""
    out: dict[str, Tensor] = {}
    for pattern, key in keys.items():
        if key is None:
            continue
        for layer in range(cfg.n_layers) if "{l}" in pattern else (None,):
            name = pattern.format(l=layer)
            if name in tensors:
                views = key.view(tensors[name], cfg)
                views = (views,) if isinstance(views, Tensor) else views
                out.update(zip(key.targets(Place(pattern, layer), cfg), views, strict=True))
    return out


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


def convert_apertus_weights(apertus: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `ApertusForCausalLM`'s tensors."""
    return _converted(apertus, cfg, "apertus")


def convert_bloom_weights(bloom: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `BloomForCausalLM`'s tensors."""
    return _converted(bloom, cfg, "bloom")


def convert_coder_weights(model: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `GPT2LMHeadCustomModel`'s tensors."""
    return _converted(model, cfg, "santacoder")


def convert_gemma_weights(gemma: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """The tensors of a Gemma model of any of the three releases."""
    return _converted(gemma, cfg, "gemma", "gemma2", "gemma3", "gemma3_text")


def convert_gpt_oss_weights(gpt_oss: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `GptOssForCausalLM`'s tensors."""
    return _converted(gpt_oss, cfg, "gpt_oss")


def convert_gptj_weights(gptj: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `GPTJForCausalLM`'s tensors."""
    return _converted(gptj, cfg, "gptj")


def convert_mixtral_weights(mixtral: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `MixtralForCausalLM`'s tensors."""
    return _converted(mixtral, cfg, "mixtral")


def convert_neo_weights(neo: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `GPTNeoForCausalLM`'s tensors."""
    return _converted(neo, cfg, "gpt_neo")


def convert_olmo_weights(olmo: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `OlmoForCausalLM`'s tensors."""
    return _converted(olmo, cfg, "olmo")


def convert_olmo2_weights(olmo2: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `Olmo2ForCausalLM`'s tensors."""
    return _converted(olmo2, cfg, "olmo2")


def convert_olmo3_weights(olmo3: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `Olmo3ForCausalLM`'s tensors."""
    return _converted(olmo3, cfg, "olmo3")


def convert_olmoe_weights(olmoe: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `OlmoeForCausalLM`'s tensors."""
    return _converted(olmoe, cfg, "olmoe")


def convert_opt_weights(opt: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `OPTForCausalLM`'s tensors."""
    return _converted(opt, cfg, "opt")


def convert_phi_weights(phi: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `PhiForCausalLM`'s tensors."""
    return _converted(phi, cfg, "phi")


def convert_phi3_weights(phi: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `Phi3ForCausalLM`'s tensors."""
    return _converted(phi, cfg, "phi3")


def convert_qwen_weights(qwen: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `QWenLMHeadModel`'s tensors."""
    return _converted(qwen, cfg, "qwen")


def convert_qwen2_weights(qwen: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `Qwen2ForCausalLM`'s tensors."""
    return _converted(qwen, cfg, "qwen2")


def convert_qwen3_weights(qwen: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """A `Qwen3ForCausalLM`'s tensors."""
    return _converted(qwen, cfg, "qwen3")


def convert_mingpt_weights(
    old_state_dict: Mapping[str, Tensor], cfg: HookedTransformerConfig
) -> dict[str, Tensor]:
    """The tensors of a minGPT's state dict."""
    return _by_table(MINGPT_KEYS, old_state_dict, cfg)


def _heads_of_rows(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """nanoGPT's ``[(qkv head d_head), d_model]``, which is GPT-2's transposed."""
    key = GPT2_KEYS["h.{l}.attn.c_attn.weight"]
    found = key.view(tensor.t(), cfg)
    return (found,) if isinstance(found, Tensor) else found


# Those that GPT-2 stores [in, out], and nanoGPT's nn.Linear [out, in].
_TURNED = {
    "h.{l}.attn.c_attn.weight": _heads_of_rows,
    "h.{l}.attn.c_proj.weight": lambda tensor, cfg: tensor.t().view(cfg.n_heads, -1, cfg.d_model),
    "h.{l}.mlp.c_fc.weight": transposed,
    "h.{l}.mlp.c_proj.weight": transposed,
}
NANOGPT_KEYS = {
    ("" if name.startswith("lm_head") else "transformer.") + name: key
    and replace(key, view=_TURNED.get(name, key.view))
    for name, key in GPT2_KEYS.items()
}


def convert_nanogpt_weights(
    old_state_dict: Mapping[str, Tensor], cfg: HookedTransformerConfig
) -> dict[str, Tensor]:
    """The tensors of a nanoGPT's state dict, compiled or not; biases that it lacks are zero."""
    stored = {name.removeprefix("_orig_mod."): tensor for name, tensor in old_state_dict.items()}
    found = _by_table(NANOGPT_KEYS, stored, cfg)
    blocks = range(cfg.n_layers)
    norms = ["ln_final.b", *(f"blocks.{layer}.ln{n}.b" for layer in blocks for n in (1, 2))]
    zeros = {**dict.fromkeys(norms, (cfg.d_model,)), **_biases(cfg)}
    for name, shape in zeros.items():
        found.setdefault(name, torch.zeros(shape, dtype=cfg.dtype))
    return found


def convert_neel_solu_old_weights(
    state_dict: dict[str, Tensor], cfg: HookedTransformerConfig
) -> dict[str, Tensor]:
    """The state dict of one of the first SoLU models, in today's layout."""
    reader = OldLayout(LiveReader(state_dict), cfg.n_layers)
    return {name: reader.read(name) for name in reader.shapes}
