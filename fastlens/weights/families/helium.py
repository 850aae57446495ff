"""Helium: Llama whose rotary pairs are neighbouring channels."""

from dataclasses import replace
from typing import Any

from fastlens.errors import ConfigError
from fastlens.weights.families import llama


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    fields = llama.heads_and_rotary(config)
    if config["num_attention_heads"] * fields["d_head"] != config["hidden_size"]:
        raise ConfigError(
            f"this Helium has {config['num_attention_heads']} heads of {fields['d_head']} channels "
            f"in a model of {config['hidden_size']}. Its output projection takes heads that fill "
            f"the model exactly."
        )
    return {**fields, "rotary_adjacent_pairs": True}


_DEFAULTS = {"hidden_size": 2560, "num_attention_heads": 20, "num_key_value_heads": 20,
             "head_dim": 128, "max_position_embeddings": 4096, "rope_theta": 100000.0}  # fmt: skip

FAMILY = replace(
    llama.FAMILY,
    name="helium",
    architectures=("HeliumForCausalLM",),
    config_class="HeliumConfig",
    config={
        **llama.CONFIG,
        "vocab_size": ("d_vocab", 48000),
        "hidden_size": ("d_model", 2560),
        "intermediate_size": ("d_mlp", 7040),
        "num_hidden_layers": ("n_layers", 24),
        "num_attention_heads": ("n_heads", 20),
        "max_position_embeddings": ("n_ctx", 4096),
        "rms_norm_eps": ("eps", 1e-8),
    },
    derive=_derive,
    only={},
    ignored=llama.FAMILY.ignored,
    keys=llama.keys(llama.SWITCH, False, "mlp_bias"),
    aliases={},
    repositories=("kyutai/helium-1-2b", "kyutai/helium-1-preview-2b"),
    gguf={},
)
