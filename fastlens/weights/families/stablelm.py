"""StableLM 2 and 3B, Stable Code: Llama with LayerNorms and a quarter of the channels rotated."""

from dataclasses import replace
from typing import Any

from fastlens.errors import ConfigError
from fastlens.weights.families import llama, starcoder2


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    asked = [name for name in ("use_parallel_residual", "qk_layernorm") if config.get(name)]
    if asked:
        raise ConfigError(
            f"this StableLM has {' and '.join(asked)}, as only the 12B release does. fastlens "
            f"loads the sequential releases without QK-norm: {', '.join(FAMILY.repositories)}."
        )
    return llama.heads_and_rotary(
        {**_DEFAULTS, **config}, fraction=config.get("partial_rotary_factor", 0.25)
    )


_DEFAULTS = {"hidden_size": 2560, "num_key_value_heads": 32, "max_position_embeddings": 4096}
SWITCH = "use_qkv_bias"

FAMILY = replace(
    llama.FAMILY,
    name="stablelm",
    architectures=("StableLmForCausalLM",),
    config_class="StableLmConfig",
    config={
        "vocab_size": ("d_vocab", 50304),
        "hidden_size": ("d_model", 2560),
        "intermediate_size": ("d_mlp", 6912),
        "num_hidden_layers": ("n_layers", 32),
        "num_attention_heads": ("n_heads", 32),
        "hidden_act": ("act_fn", "silu"),
        "max_position_embeddings": ("n_ctx", 4096),
        "layer_norm_eps": ("eps", 1e-5),
    },
    fixed={"normalization_type": "LN", "gated_mlp": True},
    derive=_derive,
    reads=llama.FAMILY.reads | {"partial_rotary_factor", "use_parallel_residual", "qk_layernorm"},
    only={},
    switches={SWITCH: False},
    ignored=frozenset({"attention_dropout", "hidden_dropout"}),
    keys=llama.keys(SWITCH) | starcoder2.NORM_BIASES,
    aliases={},
    repositories=tuple(
        f"stabilityai/{name}"
        for name in "stablelm-2-1_6b stablelm-3b-4e1t stablelm-zephyr-3b stable-code-3b".split()
    ),
    gguf={},
)
