"""Published config.json files are read, and read as transformers reads them."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.family import Family, family_of
from tests.weights.config_files import (
    ADDED,
    AS_PUBLISHED,
    FROM_MEMORY,
    REFUSED,
    REFUSED_CONFIGS,
)

CONFIGS = AS_PUBLISHED | FROM_MEMORY

TANH = "gelu_pytorch_tanh"
# What each model is: family, d_head, key-value heads, n_ctx, rotary base, rotary channels,
# (window, layers that have it), activation, epsilon, whether embeddings are tied.
# fmt: off
EXPECTED: dict[str, tuple[Any, ...]] = {
    "albert-base-v1": ("albert", 64, None, 512, None, None, None, "gelu", 1e-12, True),
    "aya-23-8B": ("cohere", 128, 8, 8192, 10000, 128, None, "silu", 1e-05, True),
    "Baichuan2-13B-Chat": ("baichuan", 128, None, 4096, None, None, None, "silu", 1e-06, False),
    "Baichuan2-7B-Chat": ("baichuan", 128, None, 4096, 10000.0, 128, None, "silu", 1e-06, False),
    "bert-base-uncased": ("bert", 64, None, 512, None, None, None, "gelu", 1e-12, True),
    "bloom-560m": ("bloom", 64, None, 2048, None, None, None, "gelu_fast", 1e-05, True),
    "DeepSeek-R1-Distill-Qwen-7B":
        ("qwen2", 128, 4, 131072, 10000, 128, None, "silu", 1e-06, False),
    "DeepSeek-V2-Lite-Chat":
        ("deepseek_v2", 192, None, 163840, 10000, 64, None, "silu", 1e-06, False),
    "DeepSeek-V2-Lite-Chat (saved by transformers 5)":
        ("deepseek_v2", 192, None, 163840, 10000, 64, None, "silu", 1e-06, False),
    "DeepSeek-V2.5": ("deepseek_v2", 192, None, 163840, 10000, 64, None, "silu", 1e-06, False),
    "DeepSeek-V3 (bf16)": ("deepseek_v3", 192, None, 163840, 10000, 64, None, "silu", 1e-06, False),
    "distilbert-base-uncased": ("distilbert", 64, None, 512, None, None, None, "gelu", 1e-12, True),
    "distilgpt2": ("gpt2", 64, None, 1024, None, None, None, "gelu_new", 1e-05, True),
    "electra-small (32000 tokens)":
        ("electra", 64, None, 512, None, None, None, "gelu", 1e-12, True),
    "esm2_t6_8M_UR50D": ("esm", 16, None, 1026, 10000.0, 16, None, "gelu", 1e-05, True),
    "EXAONE-3.0-7.8B-Instruct": ("exaone", 128, 8, 4096, 500000.0, 128, None, "silu", 1e-05, False),
    "EXAONE-4.0-32B": ("exaone4", 128, 8, 131072, 1000000, 128, (4096, 48), "silu", 1e-05, False),
    "falcon-7b (RefinedWebModel)": ("falcon", 64, 1, 2048, 10000.0, 64, None, "gelu", 1e-05, True),
    "gemma-2-2b": ("gemma2", 256, 4, 8192, 10000.0, 256, (4096, 13), TANH, 1e-06, True),
    "gemma-2-9b-it": ("gemma2", 256, 8, 8192, 10000.0, 256, (4096, 21), TANH, 1e-06, True),
    "gemma-3-1b-it": ("gemma3_text", 256, 1, 32768, 1000000, 256, (512, 22), TANH, 1e-06, True),
    "gemma-3-4b-it": ("gemma3", 256, 4, 131072, 1000000.0, 256, (1024, 29), TANH, 1e-06, True),
    "gemma-3-4b-it (printed)":
        ("gemma3", 256, 4, 131072, 1000000.0, 256, (1024, 29), TANH, 1e-06, True),
    "gemma-7b": ("gemma", 256, 16, 8192, 10000.0, 256, None, TANH, 1e-06, True),
    "gemma-7b-it": ("gemma", 256, 16, 8192, 10000.0, 256, None, TANH, 1e-06, True),
    "GLM-4.5-Air": ("glm4_moe", 128, 8, 131072, 1000000, 64, None, "silu", 1e-05, False),
    "gpt-j-6b": ("gptj", 256, None, 2048, 10000, 64, None, "gelu_new", 1e-05, False),
    "gpt-oss-20b": ("gpt_oss", 64, 8, 131072, 150000, 64, (128, 12), "silu", 1e-05, False),
    "gpt2": ("gpt2", 64, None, 1024, None, None, None, "gelu_new", 1e-05, True),
    "gpt2-medium": ("gpt2", 64, None, 1024, None, None, None, "gelu_new", 1e-05, True),
    "gpt2-small (fine-tuned)": ("gpt2", 64, None, 1024, None, None, None, "gelu_new", 1e-05, True),
    "granite-3.3-8b-instruct":
        ("granite", 128, 8, 131072, 10000000.0, 128, None, "silu", 1e-05, True),
    "h2ogpt-oasst1-512-12b": ("gpt_neox", 128, None, 2048, 10000, 32, None, "gelu", 1e-05, False),
    "Hy-MT2-7B": ("hunyuan_v1_dense", 128, 8, 262144, 11158839.925, 128, None, "silu", 1e-05, True),
    "Llama-2-13b-hf": ("llama", 128, None, 4096, 10000.0, 128, None, "silu", 1e-05, False),
    "Llama-2-7b-chat-hf": ("llama", 128, None, 4096, 10000.0, 128, None, "silu", 1e-05, False),
    "Llama-3.1-8B-Instruct": ("llama", 128, 8, 131072, 500000.0, 128, None, "silu", 1e-05, False),
    "Llama-3.2-1B-Instruct": ("llama", 64, 8, 131072, 500000.0, 64, None, "silu", 1e-05, True),
    "medgemma-27b (text)":
        ("gemma3_text", 128, 16, 131072, 1000000.0, 128, (1024, 52), TANH, 1e-06, True),
    "Meta-Llama-3-8B (fine-tuned)":
        ("llama", 128, 8, 8192, 500000.0, 128, None, "silu", 1e-05, False),
    "Mistral-7B-Instruct-v0.3":
        ("mistral", 128, 8, 32768, 1000000.0, 128, None, "silu", 1e-05, False),
    "Mixtral-8x7B-v0.1": ("mixtral", 128, 8, 32768, 1000000.0, 128, None, "silu", 1e-05, False),
    "ModernBERT-large": ("modernbert", 64, None, 8192, 160000.0, 64, (65, 18), "gelu", 1e-05, True),
    "mpt-7b-instruct": ("mpt", 128, None, 2048, None, None, None, "gelu", 1e-05, True),
    "Nemotron-Mini-4B": ("nemotron", 128, 8, 4096, 10000, 64, None, "relu2", 1e-05, False),
    "OLMo-2-1124-7B-Instruct": ("olmo2", 128, None, 4096, 500000, 128, None, "silu", 1e-06, False),
    "Olmo-3.1-32B-Instruct":
        ("olmo3", 128, 8, 65536, 500000, 128, (4096, 48), "silu", 1e-06, False),
    "opt-1.3b": ("opt", 64, None, 2048, None, None, None, "relu", 1e-05, True),
    "opt-125m": ("opt", 64, None, 2048, None, None, None, "relu", 1e-05, True),
    "opt-6.7b": ("opt", 128, None, 2048, None, None, None, "relu", 1e-05, True),
    "phi-1": ("phi", 64, None, 2048, 10000.0, 32, None, "gelu_new", 1e-05, False),
    "phi-2": ("phi", 80, None, 2048, 10000.0, 32, None, "gelu_new", 1e-05, False),
    "Phi-3-medium-4k-instruct":
        ("phi3", 128, 10, 4096, 10000.0, 128, (2047, 40), "silu", 1e-05, False),
    "Phi-3-mini-4k-instruct":
        ("phi3", 96, None, 4096, 10000.0, 96, (2047, 32), "silu", 1e-05, False),
    "Phi-3.5-mini-instruct":
        ("phi3", 96, None, 131072, 10000.0, 96, (262144, 32), "silu", 1e-05, False),
    "phi-4": ("phi3", 128, 10, 16384, 250000.0, 128, None, "silu", 1e-05, False),
    "Phi-4-mini-instruct": ("phi3", 128, 8, 131072, 10000.0, 96, (262144, 32), "silu", 1e-05, True),
    "pythia-6.9b-deduped": ("gpt_neox", 128, None, 2048, 10000, 32, None, "gelu", 1e-05, False),
    "Qwen1.5-MoE-A2.7B-Chat":
        ("qwen2_moe", 128, None, 32768, 1000000.0, 128, None, "silu", 1e-06, False),
    "Qwen2-72B-Instruct": ("qwen2", 128, 8, 32768, 1000000.0, 128, None, "silu", 1e-06, False),
    "Qwen2.5-0.5B": ("qwen2", 64, 2, 32768, 1000000.0, 64, None, "silu", 1e-06, True),
    "Qwen2.5-0.5B-Instruct": ("qwen2", 64, 2, 32768, 1000000.0, 64, None, "silu", 1e-06, True),
    "Qwen2.5-7B-Instruct": ("qwen2", 128, 4, 32768, 1000000.0, 128, None, "silu", 1e-06, False),
    "Qwen3-30B-A3B-Thinking-2507":
        ("qwen3_moe", 128, 4, 262144, 10000000, 128, None, "silu", 1e-06, False),
    "Qwen3-8B": ("qwen3", 128, 8, 40960, 1000000.0, 128, None, "silu", 1e-06, False),
    "Qwen3-Embedding-0.6B": ("qwen3", 128, 8, 32768, 1000000, 128, None, "silu", 1e-06, True),
    "roberta-base": ("roberta", 64, None, 512, None, None, None, "gelu", 1e-05, True),
    "SmolLM2-1.7B-Instruct": ("llama", 64, None, 8192, 130000, 64, None, "silu", 1e-05, True),
    "SmolLM2-135M": ("llama", 64, 3, 8192, 100000, 64, None, "silu", 1e-05, True),
    "starcoder2-15b": ("starcoder2", 128, 4, 16384, 100000, 128, (4096, 40), TANH, 1e-05, False),
    "t5-small": ("t5", 64, None, 512, None, None, None, "relu", 1e-06, True),
    "TinyLlama-1.1B-Chat-v1.0": ("llama", 64, 4, 2048, 10000.0, 64, None, "silu", 1e-05, False),
    "TinyStories-1M": ("gpt_neo", 4, None, 2048, None, None, (256, 4), "gelu_new", 1e-05, True),
    "tk-instruct-base (T5 1.1)": ("t5", 64, None, 512, None, None, None, "gelu_new", 1e-06, False),
    "Yi-1.5-34B": ("llama", 128, 8, 4096, 5000000.0, 128, None, "silu", 1e-06, False),
    "AFM-4.5B": ("arcee", 128, 4, 65536, 10000.0, 128, None, "relu2", 1e-05, False),
    "albert-base-v2": ("albert", 64, None, 512, None, None, None, "gelu_new", 1e-12, True),
    "Apertus-8B-2509": ("apertus", 128, 8, 65536, 12000000, 128, None, "xielu", 1e-05, False),
    "biogpt": ("biogpt", 64, None, 1024, None, None, None, "gelu", 1e-05, True),
    "c4ai-command-r-plus": ("cohere", 128, 8, 8192, 75000000.0, 128, None, "silu", 1e-05, True),
    "c4ai-command-r-v01": ("cohere", 128, None, 8192, 8000000.0, 128, None, "silu", 1e-05, True),
    "c4ai-command-r7b-12-2024":
        ("cohere2", 128, 8, 8192, 50000, 128, (4096, 24), "silu", 1e-05, True),
    "camembert-base": ("camembert", 64, None, 512, None, None, None, "gelu", 1e-05, True),
    "codegen-350M-mono": ("codegen", 64, None, 2048, 10000, 32, None, "gelu_new", 1e-05, False),
    "CodeLlama-7b-hf": ("llama", 128, None, 16384, 1000000, 128, None, "silu", 1e-05, False),
    "DeepSeek-R1-Distill-Llama-8B":
        ("llama", 128, 8, 131072, 500000.0, 128, None, "silu", 1e-05, False),
    "DeepSeek-R1-Distill-Qwen-1.5B":
        ("qwen2", 128, 2, 131072, 10000, 128, None, "silu", 1e-06, False),
    "electra-base-discriminator": ("electra", 64, None, 512, None, None, None, "gelu", 1e-12, True),
    "electra-small-generator": ("electra", 64, None, 512, None, None, None, "gelu", 1e-12, True),
    "ERNIE-4.5-0.3B-PT": ("ernie4_5", 128, 2, 131072, 500000.0, 128, None, "silu", 1e-05, True),
    "EXAONE-3.5-2.4B-Instruct": ("exaone", 80, 8, 32768, 1000000, 80, None, "silu", 1e-05, True),
    "EXAONE-4.0-1.2B": ("exaone4", 64, 8, 65536, 1000000, 64, None, "silu", 1e-05, True),
    "falcon-40b": ("falcon", 64, 8, 2048, 10000.0, 64, None, "gelu", 1e-05, True),
    "falcon-7b": ("falcon", 64, 1, 2048, 10000.0, 64, None, "gelu", 1e-05, True),
    "Falcon3-7B-Base": ("llama", 256, 4, 32768, 1000042, 256, None, "silu", 1e-06, False),
    "flan-t5-base": ("t5", 64, None, 512, None, None, None, "gelu_new", 1e-06, False),
    "gemma-2-27b": ("gemma2", 128, 16, 8192, 10000.0, 128, (4096, 23), TANH, 1e-06, True),
    "gemma-2b": ("gemma", 256, 1, 8192, 10000.0, 256, None, TANH, 1e-06, True),
    "gemma-3-270m": ("gemma3_text", 256, 1, 32768, 1000000.0, 256, (512, 15), TANH, 1e-06, True),
    "gemma-3-27b-it": ("gemma3", 128, 16, 131072, 1000000.0, 128, (1024, 52), TANH, 1e-06, True),
    "GLM-4-32B-0414": ("glm4", 128, 2, 32768, 10000.0, 64, None, "silu", 1e-05, False),
    "GLM-4-9B-0414": ("glm4", 128, 2, 32768, 10000.0, 64, None, "silu", 1e-05, False),
    "glm-4-9b-hf": ("glm", 128, 2, 8192, 10000.0, 64, None, "silu", 1.5625e-07, False),
    "gpt-neo-125m": ("gpt_neo", 64, None, 2048, None, None, (256, 6), "gelu_new", 1e-05, True),
    "gpt-neox-20b": ("gpt_neox", 96, None, 2048, 10000, 24, None, "gelu_fast", 1e-05, False),
    "granite-3.0-1b-a400m-base": ("granitemoe", 64, 8, 4096, 10000, 64, None, "silu", 1e-06, True),
    "helium-1-2b": ("helium", 128, 8, 4096, 20000.0, 128, None, "silu", 1e-08, False),
    "internlm2-7b (base)": ("internlm2", 128, 8, 32768, 1000000, 128, None, "silu", 1e-05, False),
    "internlm2_5-7b": ("internlm2", 128, 8, 262144, 50000000, 128, None, "silu", 1e-05, False),
    "MiniCPM3-4B": ("minicpm3", 96, None, 32768, 10000.0, 32, None, "silu", 1e-05, True),
    "Ministral-8B-Instruct-2410":
        ("mistral", 128, 8, 32768, 100000000.0, 128, (32768, 36), "silu", 1e-05, False),
    "Mistral-7B-v0.1": ("mistral", 128, 8, 32768, 10000.0, 128, (4096, 32), "silu", 1e-05, False),
    "Mistral-Nemo-Base-2407":
        ("mistral", 128, 8, 131072, 1000000.0, 128, None, "silu", 1e-05, False),
    "Mistral-Small-24B-Base-2501":
        ("mistral", 128, 8, 32768, 100000000.0, 128, None, "silu", 1e-05, False),
    "OLMo-1B-hf": ("olmo", 128, None, 2048, 10000.0, 128, None, "silu", 1e-05, True),
    "OLMo-2-0425-1B": ("olmo2", 128, None, 4096, 500000, 128, None, "silu", 1e-06, False),
    "OLMo-7B-0724-hf": ("olmo", 128, None, 4096, 10000.0, 128, None, "silu", 1e-05, False),
    "OLMoE-1B-7B-0924": ("olmoe", 128, 16, 4096, 10000.0, 128, None, "silu", 1e-05, False),
    "persimmon-8b-base": ("persimmon", 64, None, 16384, 25000.0, 32, None, "relu2", 1e-05, False),
    "phi-1_5": ("phi", 64, None, 2048, 10000.0, 32, None, "gelu_new", 1e-05, False),
    "pythia-70m": ("gpt_neox", 64, None, 2048, 10000, 16, None, "gelu", 1e-05, False),
    "Qwen-1_8B": ("qwen", 128, None, 8192, 10000, 128, None, "silu", 1e-06, False),
    "Qwen1.5-0.5B": ("qwen2", 64, 16, 32768, 1000000.0, 64, None, "silu", 1e-06, True),
    "Qwen2.5-Math-7B": ("qwen2", 128, 4, 4096, 10000, 128, None, "silu", 1e-06, False),
    "Qwen3-0.6B": ("qwen3", 128, 8, 40960, 1000000, 128, None, "silu", 1e-06, True),
    "QwQ-32B": ("qwen2", 128, 8, 40960, 1000000.0, 128, None, "silu", 1e-05, False),
    "santacoder": ("santacoder", 128, None, 2048, None, None, None, "gelu_fast", 1e-05, True),
    "Seed-OSS-36B-Base": ("seed_oss", 128, 8, 524288, 10000000.0, 128, None, "silu", 1e-06, False),
    "SmolLM3-3B": ("smollm3", 128, 4, 65536, 5000000.0, 128, None, "silu", 1e-06, True),
    "stablelm-2-1_6b": ("stablelm", 64, None, 4096, 10000, 16, None, "silu", 1e-05, False),
    "stablelm-3b-4e1t": ("stablelm", 80, None, 4096, 10000, 20, None, "silu", 1e-05, False),
    "starcoder2-3b": ("starcoder2", 128, 2, 16384, 999999.442, 128, (4096, 30), TANH, 1e-05, True),
    "starcoderbase-1b": ("gpt_bigcode", 128, 1, 8192, None, None, None, TANH, 1e-05, True),
    "xglm-564M": ("xglm", 64, None, 2048, None, None, None, "gelu", 1e-05, True),
    "xlm-roberta-base": ("xlm-roberta", 64, None, 512, None, None, None, "gelu", 1e-05, True),
    "Yi-6B": ("llama", 128, 4, 4096, 5000000.0, 128, None, "silu", 1e-05, False),
}
# fmt: on
FIELDS = "d_head n_key_value_heads n_ctx rotary_base rotary_dim windows act_fn eps".split()

# What else is special to a model.
MORE: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite-Chat": {
        "num_experts": 64, "experts_per_token": 6, "yarn_attention_factor": 1.0,
        "attn_scale": math.sqrt(192) / (0.1 * 0.707 * math.log(40) + 1) ** 2,
    },
    "falcon-7b": {"parallel_attn_mlp": True, "d_mlp": 4 * 4544},
    "gemma-2-27b": {
        "attn_scale": 12.0, "attn_scores_soft_cap": 50.0, "output_logits_soft_cap": 30.0,
    },
    "gemma-3-27b-it": {
        "attn_scale": math.sqrt(168), "rotary_base_local": 1e4, "rotary_scaling_factor": 8.0,
    },
    "gpt-oss-20b": {
        "num_experts": 32, "experts_per_token": 4, "yarn_factor": 32.0, "yarn_truncate": False,
        "yarn_attention_factor": 0.1 * math.log(32) + 1, "use_attention_sinks": True,
    },
    "granite-3.3-8b-instruct": {"attn_scale": 128.0},
    "Llama-3.2-1B-Instruct": {"use_NTK_by_parts_rope": True, "NTK_by_parts_factor": 32.0},
    "Olmo-3.1-32B-Instruct": {"yarn_attention_factor": 1.2079441541679836, "yarn_factor": 8.0},
    "OLMo-7B-0724-hf": {"clip_qkv": 8.0},
    "Phi-4-mini-instruct": {
        "longrope_original_ctx_len": 4096,
        "longrope_attention_factor": math.sqrt(1 + math.log(32) / math.log(4096)),
    },
    "phi-2": {"parallel_attn_mlp": True},
    "SmolLM3-3B": {"rotary_layers": [True, True, True, False] * 9},
}  # fmt: skip
# What tensors are multiplied with.
FACTORS: dict[str, dict[str, float]] = {
    "aya-23-8B": {"unembed.W_U": 0.0625},
    "c4ai-command-r7b-12-2024": {"unembed.W_U": 0.25},
    "gemma-2b": {"embed.W_E": math.sqrt(2048)},
    "granite-3.3-8b-instruct": {"embed.W_E": 12.0, "unembed.W_U": 1 / 16},
}


def read(config: dict[str, Any]) -> tuple[Family, HookedTransformerConfig]:
    family, _ = family_of(config)
    return family, HookedTransformerConfig(**family.config_fields(config), device="cpu")


def test_every_model_has_expectations():
    assert set(CONFIGS) == set(EXPECTED)
    assert set(MORE) | set(FACTORS) <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_is_read_as_what_the_model_is(name: str):
    family, cfg = read(CONFIGS[name])
    found = SimpleNamespace(**vars(cfg), windows=None)
    if cfg.use_local_attn:
        assert cfg.attn_types is not None
        found.windows = (cfg.window_size, cfg.attn_types.count("local"))
    if cfg.positional_embedding_type != "rotary":
        found.rotary_base = found.rotary_dim = None
    else:
        found.rotary_base = round(found.rotary_base, 3)
    tied = CONFIGS[name].get("tie_word_embeddings", family.ties_by_default)
    values = [family.name, *(getattr(found, field) for field in FIELDS), tied]
    assert tuple(values) == EXPECTED[name]
    for field, value in MORE.get(name, {}).items():
        assert getattr(cfg, field) == pytest.approx(value), field
    for parameter, factor in FACTORS.get(name, {}).items():
        assert family.factors[parameter](CONFIGS[name]) == pytest.approx(factor, rel=1e-3)


def transformers_knows(name: str) -> bool:
    """Whether it has the architecture; of others, whose code is on the hub, it reads nothing."""
    return family_of(CONFIGS[name])[0].config_class != "PretrainedConfig"


@pytest.mark.parametrize("name", [name for name in CONFIGS if transformers_knows(name)])
def test_is_read_as_transformers_reads_it(name: str):
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIGS[name]
    family, cfg = read(config)
    known = config.get("model_type") in CONFIG_MAPPING
    theirs = CONFIG_MAPPING[config["model_type"]] if known else None
    theirs = theirs or getattr(transformers, family.config_class)
    # It writes what it has read, with its own defaults and under today's names.
    written = theirs.from_dict(dict(config)).to_dict()
    _, again = read({**written, "architectures": config["architectures"]})
    assert vars(again) == vars(cfg)


@pytest.mark.parametrize("name", ADDED)
def test_saved_again_by_an_older_transformers(name: str):
    _, cfg = read(CONFIGS[name])
    _, again = read(CONFIGS[name] | ADDED[name])
    assert vars(again) == vars(cfg)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str):
    with pytest.raises(ConfigError) as error:
        read(REFUSED_CONFIGS[name])
    assert REFUSED[name] in str(error.value)


def test_quantised_weights_are_refused_with_what_to_do():
    stored = {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"}
    with pytest.raises(ConfigError, match=r"quantised \(mxfp4\).*hf_model="):
        read(CONFIGS["gpt-oss-20b"] | {"quantization_config": stored})


@pytest.mark.parametrize(
    "changed",
    [
        {"add_cross_attention": True},
        {"pruned_heads": {"0": [1]}},
        {"tie_encoder_decoder": True},
        {"use_bfloat16": True},
    ],
)
@pytest.mark.parametrize("name", ["Mistral-7B-Instruct-v0.3", "distilgpt2"])
def test_what_old_files_switch_off_is_refused_where_it_is_on(name: str, changed: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(changed))):
        read(CONFIGS[name] | changed)


@pytest.mark.parametrize("changed", [{"rope_theta": 1e6}, {"partial_rotary_factor": 0.5}])
def test_two_names_of_one_thing_must_agree(changed: dict[str, Any]):
    with pytest.raises(ConfigError, match="from rotary_emb_base and rotary_pct"):
        read(CONFIGS["pythia-6.9b-deduped"] | changed)
