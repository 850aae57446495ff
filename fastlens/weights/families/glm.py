"""GLM-4 in transformers' format: Llama with adjacent rotary pairs in half of each head."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama, phi3


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    fields = llama.heads_and_rotary(config, fraction=config["partial_rotary_factor"])
    return {**fields, "rotary_adjacent_pairs": True}


_DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072,
             "partial_rotary_factor": 0.5}  # fmt: skip
_FUSED = llama.M + "gate_up_proj.weight"
KEYS = llama.keys(llama.SWITCH) | {_FUSED: phi3.KEYS[_FUSED]}
for _name in ("gate_proj", "up_proj"):
    del KEYS[f"{llama.M}{_name}.weight"]

FAMILY = replace(
    llama.FAMILY,
    name="glm",
    architectures=("GlmForCausalLM",),
    config_class="GlmConfig",
    config={
        **llama.CONFIG,
        "vocab_size": ("d_vocab", 151552),
        "intermediate_size": ("d_mlp", 13696),
        "num_hidden_layers": ("n_layers", 40),
        "max_position_embeddings": ("n_ctx", 131072),
        "rms_norm_eps": ("eps", 1.5625e-7),
    },
    derive=_derive,
    reads=llama.FAMILY.reads | {"partial_rotary_factor"},
    only={},
    switches={llama.SWITCH: True},
    keys=KEYS,
    aliases={},
    repositories=("THUDM/glm-4-9b-hf", "THUDM/glm-4-9b-chat-hf", "THUDM/glm-edge-1.5b-chat"),
    default_prepend_bos=False,
    gguf={},
)
