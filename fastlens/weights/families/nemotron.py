"""Nemotron 3 and 4, Minitron: LayerNorms stored as gain minus one, squared ReLU, half rotary."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama, starcoder2
from fastlens.weights.views import plus_one


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    return llama.heads_and_rotary(
        {**_DEFAULTS, **config}, fraction=config.get("partial_rotary_factor", 0.5)
    )


_DEFAULTS = {"hidden_size": 6144, "num_attention_heads": 48, "max_position_embeddings": 4096}
KEYS = starcoder2.NORM_BIASES | {
    name: replace(key, view=plus_one) if key is not None and "norm.weight" in name else key
    for name, key in llama.keys(llama.SWITCH, llama.SWITCH, "mlp_bias", gated=False).items()
}

FAMILY = replace(
    llama.FAMILY,
    name="nemotron",
    architectures=("NemotronForCausalLM",),
    config_class="NemotronConfig",
    config={
        "vocab_size": ("d_vocab", 256000),
        "hidden_size": ("d_model", 6144),
        "intermediate_size": ("d_mlp", 24576),
        "num_hidden_layers": ("n_layers", 32),
        "num_attention_heads": ("n_heads", 48),
        "hidden_act": ("act_fn", "relu2"),
        "max_position_embeddings": ("n_ctx", 4096),
        "norm_eps": ("eps", 1e-5),
    },
    fixed={"normalization_type": "LN"},
    derive=_derive,
    reads=llama.FAMILY.reads | {"partial_rotary_factor"},
    only={},
    # No dropout in eval mode; the head size under the name of the library that trained it.
    ignored=frozenset({"attention_dropout", "kv_channels"}),
    keys=KEYS,
    aliases={},
    repositories=("nvidia/Minitron-4B-Base", "nvidia/Minitron-8B-Base"),
    gguf={},
)
