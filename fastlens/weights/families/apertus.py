"""Apertus: Llama with a plain MLP of xIELU and an RMS norm of every head's queries and keys."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, WeightsError
from fastlens.weights.families import llama, qwen3
from fastlens.weights.family import Key


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {"intermediate_size": 14336, "max_position_embeddings": 65536, **config}
    if not (config.get("rope_scaling") or config.get("rope_parameters")):
        theta = config.get("rope_theta")
        if theta not in (None, _ROPE["rope_theta"]):
            raise ConfigError(
                f"the config has rope_theta={theta} and no scaling. transformers 4 computes that; "
                f"transformers 5 does not read it and takes the final models' Llama-3 scaling. "
                f"Set rope_parameters to what is meant, such as "
                f"{{'rope_type': 'default', 'rope_theta': {theta}}}."
            )
        config["rope_parameters"] = _ROPE
    return llama.heads_and_rotary({"rope_theta": _ROPE["rope_theta"], **config})


def _has_xielu(config: dict[str, Any]) -> bool:
    return config.get("hidden_act", "xielu") == "xielu"


def _number(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    return tensor.squeeze(0)


def _constant(value: float) -> Any:
    """xIELU's constants stand in checkpoints too, sometimes rounded to bfloat16."""

    def check(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
        if abs(tensor.item() - value) > 0.005 * abs(value):
            raise WeightsError(
                f"this Apertus has {tensor.item()} where xIELU has its constant {value}. fastlens "
                f"computes xIELU with that constant only, so the model is not loaded."
            )
        return ()

    return check


# What transformers takes where the config has no rotary parameters at all.
_ROPE = {
    "rope_type": "llama3", "rope_theta": 12000000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
ACT, T = "layers.{l}.mlp.act_fn.", "blocks.{l}.mlp.act_fn."
XIELU: dict[str, Key | None] = {
    ACT + "alpha_p": Key("1", T + "alpha_p", _number, _has_xielu),
    ACT + "alpha_n": Key("1", T + "alpha_n", _number, _has_xielu),
    ACT + "beta": Key("", (), _constant(0.5), _has_xielu),
    ACT + "eps": Key("", (), _constant(-1e-6), _has_xielu),
}
_RENAMED = {"input_layernorm": "attention_layernorm",
            "post_attention_layernorm": "feedforward_layernorm"}  # fmt: skip
KEYS = {
    name.replace(name.split(".")[-2], _RENAMED.get(name.split(".")[-2], name.split(".")[-2])): key
    for name, key in llama.keys(llama.SWITCH, llama.SWITCH, gated=False).items()
}

FAMILY = replace(
    llama.FAMILY,
    name="apertus",
    architectures=("ApertusForCausalLM",),
    config_class="ApertusConfig",
    config={
        **llama.CONFIG,
        "vocab_size": ("d_vocab", 131072),
        "intermediate_size": ("d_mlp", 14336),
        "hidden_act": ("act_fn", "xielu"),
        "max_position_embeddings": ("n_ctx", 65536),
        "rms_norm_eps": ("eps", 1e-5),
    },
    fixed={"normalization_type": "RMS", "final_rms": True, "use_qk_norm": True},
    derive=_derive,
    # Left by the library that trained it.
    only={"qk_norm": True, "post_norm": False, "mlp_bias": False},
    switches={llama.SWITCH: False},
    ignored=frozenset({"attention_dropout", "hidden_dropout"}),
    keys={**KEYS, **qwen3.QK_NORMS, **XIELU},
    aliases={
        **dict.fromkeys(("apertus-8b", "apertus"), "swiss-ai/Apertus-8B-2509"),
        **dict.fromkeys(("apertus-8b-instruct", "apertus-instruct"),
                        "swiss-ai/Apertus-8B-Instruct-2509"),
    },
    repositories=("swiss-ai/Apertus-70B-2509", "swiss-ai/Apertus-70B-Instruct-2509"),
    gguf={},
)  # fmt: skip
