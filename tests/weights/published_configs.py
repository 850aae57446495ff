"""Config files of models TransformerLens lists, and where it reads another value from them."""

from typing import Any

_SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads".split()


def _sizes(*values: Any, **rest: Any) -> dict[str, Any]:
    return {**dict(zip(_SIZES, values, strict=True)), **rest}


_LLAMA_1 = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "vocab_size": 32000}
_LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32000}
_LLAMA_3 = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "vocab_size": 128256,
            "rope_theta": 500000.0, "num_key_value_heads": 8}  # fmt: skip


def _llama_31(factor: float) -> dict[str, Any]:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip
    return {**_LLAMA_3, "max_position_embeddings": 131072, "rope_scaling": scaling}


_CODE = {"max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
_7B, _70B = _sizes(4096, 11008, 32, 32), _sizes(8192, 28672, 80, 64)
_8B = _sizes(4096, 14336, 32, 32)
_GEMMA = {"head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192,
          "rms_norm_eps": 1e-6}  # fmt: skip
_GEMMA_2 = {**_GEMMA, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}  # fmt: skip
_GEMMA_3 = {"head_dim": 256, "vocab_size": 262208, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6, "sliding_window": 1024, "query_pre_attn_scalar": 256,
            "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
_GEMMA_3_SMALL = {**_GEMMA_3, "vocab_size": 262144, "max_position_embeddings": 32768,
                  "sliding_window": 512, "rope_scaling": None}  # fmt: skip
_GEMMA_3_27B = _sizes(5376, 21504, 62, 32, num_key_value_heads=16, **{
    **_GEMMA_3, "head_dim": 128, "query_pre_attn_scalar": 168})  # fmt: skip
_OLMO_2 = {"vocab_size": 100352, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
           "rope_theta": 500000.0}  # fmt: skip

# The first prefix of a name that is here.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-7b-hf": {**_7B, **_LLAMA_1},
    "llama-13b-hf": _sizes(5120, 13824, 40, 40, **_LLAMA_1),
    "llama-30b-hf": _sizes(6656, 17920, 60, 52, **_LLAMA_1),
    "llama-65b-hf": _sizes(8192, 22016, 80, 64, **_LLAMA_1),
    "meta-llama/Llama-2-7b": {**_7B, **_LLAMA_2},
    "meta-llama/Llama-2-13b": _sizes(5120, 13824, 40, 40, **_LLAMA_2),
    "meta-llama/Llama-2-70b": {**_70B, **_LLAMA_2, "num_key_value_heads": 8},
    "codellama/CodeLlama-7b-Python": {**_7B, **_CODE, "vocab_size": 32000},
    "codellama/CodeLlama-7b": {**_7B, **_CODE, "vocab_size": 32016},
    "meta-llama/Meta-Llama-3-8B": {**_8B, **_LLAMA_3},
    "meta-llama/Meta-Llama-3-70B": {**_70B, **_LLAMA_3},
    "meta-llama/Llama-3.1-8B": {**_8B, **_llama_31(8.0)},
    "meta-llama/Llama-3.1-70B": {**_70B, **_llama_31(8.0)},
    "meta-llama/Llama-3.2-1B": _sizes(2048, 8192, 16, 32, head_dim=64, **_llama_31(32.0)),
    "meta-llama/Llama-3.2-3B": _sizes(3072, 8192, 28, 24, head_dim=128, **_llama_31(32.0)),
    "meta-llama/Llama-3.3-70B": {**_70B, **_llama_31(8.0)},
    "google/gemma-2b": _sizes(2048, 16384, 18, 8, num_key_value_heads=1, **_GEMMA),
    "google/gemma-7b": _sizes(3072, 24576, 28, 16, num_key_value_heads=16, **_GEMMA),
    "google/gemma-2-2b": _sizes(2304, 9216, 26, 8, num_key_value_heads=4, **_GEMMA_2),
    "google/gemma-2-9b": _sizes(3584, 14336, 42, 16, num_key_value_heads=8, **_GEMMA_2),
    "google/gemma-2-27b": _sizes(4608, 36864, 46, 32, num_key_value_heads=16, **{
        **_GEMMA_2, "head_dim": 128, "query_pre_attn_scalar": 144}),
    "google/gemma-3-270m": _sizes(640, 2048, 18, 4, num_key_value_heads=1, **_GEMMA_3_SMALL),
    "google/gemma-3-1b": _sizes(1152, 6912, 26, 4, num_key_value_heads=1, **_GEMMA_3_SMALL),
    "google/gemma-3-4b": _sizes(2560, 10240, 34, 8, num_key_value_heads=4, **_GEMMA_3),
    "google/medgemma-4b": _sizes(2560, 10240, 34, 8, num_key_value_heads=4, **_GEMMA_3),
    "google/gemma-3-12b": _sizes(3840, 15360, 48, 16, num_key_value_heads=8, **_GEMMA_3),
    "google/medgemma-27b-text-it": {**_GEMMA_3_27B, "vocab_size": 262144},
    "google/gemma-3-27b": _GEMMA_3_27B,
    "google/medgemma-27b-it": _GEMMA_3_27B,
    "allenai/OLMo-1B-hf": _sizes(2048, 8192, 16, 16, vocab_size=50304),
    "allenai/OLMo-7B-hf": _sizes(4096, 11008, 32, 32, vocab_size=50304),
    "allenai/OLMo-2-0425-1B": _sizes(2048, 8192, 16, 16, **_OLMO_2),
    "allenai/OLMo-2-1124-7B": _sizes(4096, 11008, 32, 32, **_OLMO_2),
    "bigcode/santacoder": {"attention_head_type": "multiquery", "n_positions": 2048},
}  # fmt: skip


def published(name: str) -> dict[str, Any]:
    """The attributes of a name's config; empty for one that is not here."""
    return next((config for prefix, config in PUBLISHED.items() if name.startswith(prefix)), {})


ANY = "*"
# Name (or its beginning, or the architecture, or any) and field -> why ours is another value.
_NOT_ARITHMETIC = "says nothing about what the model computes"
DIFFERENT: dict[tuple[str, str], str] = {
    (ANY, "initializer_range"): _NOT_ARITHMETIC,
    (ANY, "trust_remote_code"): "a model's own code is never run here",
    (ANY, "tokenizer_prepends_bos"): "the tokenizer itself is asked",
    (ANY, "quantization_method"): "quantised weights are refused, or read from GGUF files",
    (ANY, "load_in_4bit"): "quantised weights are refused, or read from GGUF files",
    (ANY, "tokenizer_name"): "comes from where the weights come from",
    (ANY, "dtype"): "that of the caller, not of the file",
    ("T5ForConditionalGeneration", "default_prepend_bos"): "T5 has no BOS; neither prepends one",
    ("GemmaForCausalLM", "act_fn"): "transformers computes the tanh form, whatever the file says",
}
