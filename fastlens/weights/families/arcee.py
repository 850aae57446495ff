"""Arcee AFM: Llama with a plain MLP of squared ReLUs."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    return llama.heads_and_rotary({"hidden_size": 2560, "max_position_embeddings": 4096, **config})


FAMILY = replace(
    llama.FAMILY,
    name="arcee",
    architectures=("ArceeForCausalLM",),
    config_class="ArceeConfig",
    config={
        **llama.CONFIG,
        "hidden_size": ("d_model", 2560),
        "intermediate_size": ("d_mlp", 18432),
        "hidden_act": ("act_fn", "relu2"),
        "max_position_embeddings": ("n_ctx", 4096),
        "rms_norm_eps": ("eps", 1e-5),
    },
    fixed={"normalization_type": "RMS", "final_rms": True},
    derive=_derive,
    only={},
    keys=llama.keys(llama.SWITCH, llama.SWITCH, "mlp_bias", gated=False),
    aliases={},
    repositories=("arcee-ai/AFM-4.5B", "arcee-ai/AFM-4.5B-Base"),
    gguf={},
)
