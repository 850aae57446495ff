"""Llama 1 to 3.3, SmolLM2, CodeLlama, Yi: RMS norms, rotary positions, gated MLP, GQA."""

from typing import Any

from torch import Tensor

from fastlens.errors import ConfigError
from fastlens.weights.family import Family, Gguf
from fastlens.weights.gguf_file import GgufReader
from fastlens.weights.llama_like import SWITCH, A, heads_and_rotary, keys
from fastlens.weights.llama_like import M as M
from fastlens.weights.rope import ROTARY_ATTRIBUTES, gguf_rope


def _half_split(heads_attribute: str) -> Any:
    """Undo llama.cpp's order of rotary channels: pairs next to each other, instead of halves."""

    def undo(tensor: Tensor, config: dict[str, Any]) -> Tensor:
        heads = config[heads_attribute]
        pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    return undo


def _gguf_attributes(reader: GgufReader) -> dict[str, Any]:
    known = {key.removeprefix("llama."): value for key, value in reader.metadata.items()}
    d_head = known.get("attention.key_length") or known.get("rope.dimension_count")
    others = [known.get(key, d_head) for key in ("attention.value_length", "rope.dimension_count")]
    if others != [d_head, d_head]:
        raise ConfigError(
            "the GGUF file gives keys, values and rotary channels different sizes, which Llama's "
            "architecture does not have."
        )
    return {
        SWITCH: "blk.0.attn_q.bias" in reader.shapes,
        "mlp_bias": "blk.0.ffn_down.bias" in reader.shapes,
        "head_dim": d_head,
        "num_key_value_heads": known.get("attention.head_count_kv", known["attention.head_count"]),
        **gguf_rope(reader, "llama"),
    }


KEYS = keys(SWITCH, SWITCH, "mlp_bias")
CONFIG = {
    "vocab_size": ("d_vocab", 32000),
    "hidden_size": ("d_model", 4096),
    "intermediate_size": ("d_mlp", 11008),
    "num_hidden_layers": ("n_layers", 32),
    "num_attention_heads": ("n_heads", 32),
    "hidden_act": ("act_fn", "silu"),
    "max_position_embeddings": ("n_ctx", 2048),
    "rms_norm_eps": ("eps", 1e-6),
}

_BASES = """meta-llama/Meta-Llama-3-8B meta-llama/Meta-Llama-3-70B meta-llama/Llama-3.1-8B
meta-llama/Llama-3.1-70B meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-3B
HuggingFaceTB/SmolLM2-135M HuggingFaceTB/SmolLM2-360M HuggingFaceTB/SmolLM2-1.7B""".split()
ALIASES = {
    # LLaMA 1 was never on the hub: TransformerLens takes its weights as hf_model=.
    **{f"llama-{size}": f"llama-{size}-hf" for size in ("7b", "13b", "30b", "65b")},
    **{f"Llama-2-{run}": f"meta-llama/Llama-2-{run}-hf"
       for run in ("7b", "7b-chat", "13b", "13b-chat", "70b-chat")},
    "Llama-3.3-70B-Instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "meta-llama-2-70b-chat-hf": "meta-llama/Llama-2-70b-chat-hf",
    "CodeLlamallama-2-7b": "codellama/CodeLlama-7b-hf",
    **{f"CodeLlama-7b-{run}".lower(): f"codellama/CodeLlama-7b-{run}-hf"
       for run in ("Python", "Instruct")},
    **{f"yi-{run}".lower(): f"01-ai/Yi-{run}" for run in ("6B", "34B", "6B-Chat", "34B-Chat")},
}  # fmt: skip

_BLOCK = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
          **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}, "attn_output": "self_attn.o_proj",
          **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}}  # fmt: skip
GGUF = Gguf(
    config={"context_length": "max_position_embeddings", "embedding_length": "hidden_size",
            "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
            "attention.head_count": "num_attention_heads",
            "attention.head_count_kv": "num_key_value_heads", "rope.freq_base": "rope_theta",
            "attention.layer_norm_rms_epsilon": "rms_norm_eps", "vocab_size": "vocab_size"},
    names={"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head",
           "rope_freqs": None,
           **{f"blk.{{l}}.{theirs}": f"layers.{{l}}.{ours}" for theirs, ours in _BLOCK.items()}},
    undo={f"{A}{x}_proj.{kind}": _half_split(heads)
          for x, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
          for kind in ("weight", "bias")},
    derive=_gguf_attributes,
    reads=("attention.key_length", "attention.value_length", "rope.dimension_count",
           "rope.scaling."),
)  # fmt: skip

FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    config_class="LlamaConfig",
    prefix="model.",
    config=CONFIG,
    fixed={"normalization_type": "RMS", "final_rms": True, "gated_mlp": True},
    derive=heads_and_rotary,
    reads=ROTARY_ATTRIBUTES | {"head_dim", "num_key_value_heads"},
    # Left in SmolLM2's and Falcon 3's configs by the libraries that trained them.
    only={"is_llama_config": True, "rope_interleaved": False, "activation": "swiglu"},
    switches={SWITCH: False, "mlp_bias": False},
    # No dropout in eval mode; pretraining_tp cut the same products into slices.
    ignored=frozenset({"attention_dropout", "pretraining_tp"}),
    keys=KEYS,
    aliases=ALIASES,
    repositories=(*_BASES, *(f"{base}-Instruct" for base in _BASES)),
    gguf={"llama": GGUF},
)
