"""Tiny model configs that any test may build: one a mechanism, float32, CPU, random weights.

``TINY_CONFIGS[name]`` is a dict of `HookedTransformerConfig` fields (TransformerLens takes the same
ones). Use `tiny(name, **changes)` rather than editing the dict: the tables are shared.
"""

from typing import Any

D_VOCAB = 50
N_CTX = 64

_BASE: dict[str, Any] = {
    "d_model": 32,
    "d_head": 8,
    "n_heads": 4,
    "n_layers": 2,
    "n_ctx": N_CTX,
    "d_vocab": D_VOCAB,
    "act_fn": "gelu_new",
    "normalization_type": "LN",
    "device": "cpu",
    "seed": 0,
}

_LLAMA: dict[str, Any] = {
    **_BASE,
    "n_layers": 3,
    "n_key_value_heads": 2,
    "d_mlp": 48,
    "act_fn": "silu",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "uses_rms_norm": True,
    "final_rms": True,
    "positional_embedding_type": "rotary",
    "rotary_dim": 8,
    "eps": 1e-6,
}

_NEOX: dict[str, Any] = {
    **_BASE,
    "act_fn": "gelu",
    "parallel_attn_mlp": True,
    "positional_embedding_type": "rotary",
    "rotary_dim": 4,
}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**_BASE, "n_layers": 3},
    "llama": _LLAMA,
    "llama_mqa": {**_LLAMA, "n_layers": 2, "n_key_value_heads": 1},
    "neox": _NEOX,
    "attn_only": {**_BASE, "attn_only": True, "act_fn": None},
    "solu_ln": {**_BASE, "act_fn": "solu_ln"},
    # One layer of each kind, and a window shorter than any test prompt.
    "local": {
        **_BASE,
        "use_local_attn": True,
        "window_size": 4,
        "attn_types": ["global", "local"],
        "use_attn_scale": False,
    },
    "qk_norm": {**_LLAMA, "n_layers": 2, "use_qk_norm": True},
    "alibi": {**_BASE, "positional_embedding_type": "alibi"},
    "shortformer": {**_BASE, "positional_embedding_type": "shortformer"},
    # Weights four times as large: at the usual scale the caps would change nothing one can see.
    "softcap": {
        **_LLAMA,
        "n_layers": 2,
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 10.0,
        "initializer_range": 0.6,
    },
    "post_norm": {
        **_LLAMA,
        "n_layers": 2,
        "act_fn": "gelu_pytorch_tanh",
        "use_normalization_before_and_after": True,
    },
    "no_norm": {**_BASE, "normalization_type": None},
    "bidirectional": {**_BASE, "attention_dir": "bidirectional"},
    "inverse_layer_scale": {**_BASE, "n_layers": 3, "scale_attn_by_inverse_layer_idx": True},
    "rotary_adjacent": {**_NEOX, "rotary_adjacent_pairs": True},
    # Wavelengths of the four frequencies fall below, between and above the two context lengths.
    "ntk": {
        **_LLAMA,
        "n_layers": 2,
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_low_freq_factor": 1.0,
        "NTK_by_parts_high_freq_factor": 4.0,
        "NTK_by_parts_factor": 8.0,
        "NTK_original_ctx_len": 128,
        "rotary_base": 1000,
    },
    # Norms on what is written, one QK-norm over all heads.
    "olmo2": {**_LLAMA, "n_layers": 2, "original_architecture": "Olmo2ForCausalLM"},
    "sinks": {
        **_LLAMA,
        "n_layers": 2,
        "use_attention_sinks": True,
        "use_local_attn": True,
        "window_size": 4,
        "attn_types": ["local", "global"],
    },
    "moe": {**_LLAMA, "n_layers": 2, "d_mlp": 20, "num_experts": 5, "experts_per_token": 2},
    "gpt_oss": {
        **_LLAMA,
        "n_layers": 2,
        "d_mlp": 20,
        "num_experts": 5,
        "experts_per_token": 2,
        "use_attention_sinks": True,
        "original_architecture": "GptOssForCausalLM",
    },
    "post_embedding_ln": {
        **_BASE,
        "positional_embedding_type": "alibi",
        "post_embedding_ln": True,
    },
}


def tiny(name: str, **changes: Any) -> dict[str, Any]:
    """A fresh copy of one table with fields changed, ready for either library's config."""
    table = {**TINY_CONFIGS[name], **changes}
    return {
        field: list(value) if isinstance(value, list) else value for field, value in table.items()
    }
