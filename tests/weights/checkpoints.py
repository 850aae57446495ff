"""Tiny transformers models with random weights, and checkpoint folders made of them."""

import functools
import json
from pathlib import Path
from typing import Any

import torch

VOCAB = 60
_GPT2 = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4}
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
_NEOX = {**_COMMON, "hidden_act": "gelu", "intermediate_size": 128}
_LLAMA = {**_COMMON, "num_key_value_heads": 2}
# Of the wavelengths at theta 1000 and head size 8, some are kept, some blended, some divided.
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

# Name -> (family, transformers' config class, its arguments).
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "GPT2Config", _GPT2),
    "gpt2_scaled": (
        "gpt2", "GPT2Config", {**_GPT2, "n_inner": 40, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt2_untied": (
        "gpt2", "GPT2Config", {**_GPT2, "tie_word_embeddings": False, "scale_attn_weights": False},
    ),
    "neox": ("gpt_neox", "GPTNeoXConfig", _NEOX),
    "neox_sequential": (
        "gpt_neox",
        "GPTNeoXConfig",
        {**_NEOX, "use_parallel_residual": False,
         "rope_parameters": {"rope_type": "default", "rope_theta": 500.0,
                             "partial_rotary_factor": 0.5}},
    ),
    "neox_full_rotary": (
        "gpt_neox", "GPTNeoXConfig",
        {**_NEOX, "tie_word_embeddings": True, "attention_bias": False,
         "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0,
                             "partial_rotary_factor": 1.0}},
    ),
    "llama_full": ("llama", "LlamaConfig", {**_LLAMA, "num_key_value_heads": 4}),
    "llama_grouped": ("llama", "LlamaConfig", _LLAMA),
    "llama_single": ("llama", "LlamaConfig", {**_LLAMA, "num_key_value_heads": 1}),
    "llama_llama3": ("llama", "LlamaConfig", {**_LLAMA, "rope_parameters": _LLAMA3}),
    "llama_linear": (
        "llama",
        "LlamaConfig",
        {**_LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ),
    "llama_yarn": ("llama", "LlamaConfig", {**_LLAMA, "rope_parameters": _YARN}),
    "llama_tied": ("llama", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "llama_biased": ("llama", "LlamaConfig", {**_LLAMA, "attention_bias": True}),
    "llama_head_dim": ("llama", "LlamaConfig", {**_LLAMA, "head_dim": 12}),
    "llama_mlp_bias": ("llama", "LlamaConfig", {**_LLAMA, "mlp_bias": True}),
    "mistral_window": ("mistral", "MistralConfig", {**_LLAMA, "sliding_window": 4}),
    "mistral_plain": ("mistral", "MistralConfig", {**_LLAMA, "sliding_window": None}),
}  # fmt: skip


def cases_of(family: str) -> dict[str, dict[str, Any]]:
    """The arguments of a family's cases. Biases of gates, which `hf_model` zeroes, are left out."""
    return {
        name: arguments
        for name, (of, _, arguments) in CASES.items()
        if of == family and not arguments.get("mlp_bias")
    }


@functools.cache
def hf_model(case: str) -> Any:
    """The model of a case, in eval mode, with every parameter random (gains around one)."""
    import transformers

    _, config_class, arguments = CASES[case]
    config = getattr(transformers, config_class)(bos_token_id=0, eos_token_id=1, **arguments)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(1.0 if is_gain else 0.0, 0.1)
            if name.endswith(("gate_proj.bias", "up_proj.bias")):
                parameter.zero_()
    return model


def save_folder(folder: Path, case: str, **changes: Any) -> Path:
    """The case's checkpoint folder; ``changes`` edit its config.json (None removes a key)."""
    hf_model(case).save_pretrained(folder)
    edit_config(folder, **changes)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of a folder's config.json; None removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))


def word_tokenizer() -> Any:
    """A tokenizer of ``w0 w1 ... w56``, with BOS, EOS and UNK as ids 0, 1, 2."""
    import tokenizers
    import transformers

    words = ["<s>", "</s>", "<unk>", *(f"w{n}" for n in range(VOCAB - 3))]
    vocab = {word: n for n, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def prompt(length: int = 12) -> torch.Tensor:
    """Two rows of tokens."""
    torch.manual_seed(3)
    return torch.randint(3, VOCAB, (2, length))


def weights_of(source: Any, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Every tensor a source gives, by name."""
    from fastlens.config import HookedTransformerConfig

    cfg = HookedTransformerConfig(**source.config_fields(), device="cpu")
    return {key: tensor for _, group in source.groups(cfg, dtype) for key, tensor in group.items()}


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of rotary channels, as its converter makes it from Hugging Face's."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _all_q_then_k_then_v(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of GPT-NeoX's fused projection."""
    per_head = tensor.reshape(heads, 3, tensor.shape[0] // heads // 3, *tensor.shape[1:])
    return torch.cat([per_head[:, n].reshape(-1, *tensor.shape[1:]) for n in range(3)])


def write_gguf(path: Path, case: str, quantize: str | None = None, **metadata: Any) -> Path:
    """The case as llama.cpp's converter would write it; ``metadata`` adds or (None) drops keys."""
    import gguf

    model, (family, _, _) = hf_model(case), CASES[case]
    config = model.config
    architecture = {"gpt2": "gpt2", "gpt_neox": "gptneox", "llama": "llama"}[family]
    writer = gguf.GGUFWriter(path, architecture)
    heads, width = config.num_attention_heads, config.hidden_size
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": width,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", 4 * width),
        "attention.head_count": heads,
    }
    undo_kv = getattr(config, "num_key_value_heads", heads)
    if family == "llama":
        keys |= {
            "attention.head_count_kv": undo_kv,
            "rope.freq_base": float(config.rope_parameters["rope_theta"]),
            "rope.dimension_count": config.head_dim,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        }
    elif family == "gpt_neox":
        keys |= {
            "rope.dimension_count": int(
                width // heads * config.rope_parameters["partial_rotary_factor"]
            ),
            "attention.layer_norm_epsilon": config.layer_norm_eps,
            "use_parallel_residual": config.use_parallel_residual,
        }
    else:
        keys["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    for key, value in {**keys, **metadata}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
               str: writer.add_string}.get(type(value))  # fmt: skip
        if add is not None:
            add(key if key.startswith("tokenizer.") else f"{architecture}.{key}", value)
    names = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, tensor in state.items():
        name = name.replace("lm_head", "embed_out") if family == "gpt_neox" else name
        if "q_proj" in name or "k_proj" in name:
            tensor = _interleaved(tensor, heads if "q_proj" in name else undo_kv)
        elif "query_key_value" in name:
            tensor = _all_q_then_k_then_v(tensor, heads)
        elif name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.t()
        array = tensor.contiguous().numpy()
        in_blocks = quantize is not None and array.ndim == 2 and array.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType[quantize] if in_blocks else None
        if kind is not None:
            array = gguf.quants.quantize(array, kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
