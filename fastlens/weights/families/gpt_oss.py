"""GPT-OSS: attention sinks, alternating windows, YaRN, and experts with biases and clamped gates.

OpenAI's own files are quantised (MXFP4), which is refused: load them dequantised with transformers.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.weights.families import llama, mixtral
from fastlens.weights.family import Key
from fastlens.weights.views import each_expert
from fastlens.weights.windows import window_fields


def _every_other(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """Gate and up of each expert in turn: they alternate along the last axis."""
    return tuple(both[..., start::2].t() for both in tensor for start in (0, 1))


def _turned(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """``[expert, in, out]`` as ``[out, in]`` for each expert."""
    return tuple(weight.t() for weight in tensor)


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    if not (config.get("rope_scaling") or config.get("rope_parameters")):
        config["rope_parameters"] = _YARN
    fields = mixtral.always_grouped({"rope_theta": 150000.0, **config})
    kinds = config.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention"
        for layer in range(config.get("num_hidden_layers", 36))
    ]
    return {**fields, **window_fields(config.get("sliding_window"), kinds, fields)}


_DEFAULTS = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
             "max_position_embeddings": 131072, "sliding_window": 128}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
         "truncate": False, "original_max_position_embeddings": 4096}  # fmt: skip
_MLP, _EXPERT = "blocks.{l}.mlp.", "blocks.{l}.mlp.experts.{e}."

FAMILY = replace(
    mixtral.FAMILY,
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    config_class="GptOssConfig",
    config={
        **llama.CONFIG,
        "vocab_size": ("d_vocab", 201088),
        "hidden_size": ("d_model", 2880),
        "intermediate_size": ("d_mlp", 2880),
        "num_hidden_layers": ("n_layers", 36),
        "num_attention_heads": ("n_heads", 64),
        "max_position_embeddings": ("n_ctx", 131072),
        "rms_norm_eps": ("eps", 1e-5),
        "num_local_experts": ("num_experts", 128),
        "num_experts_per_tok": ("experts_per_token", 4),
        "swiglu_alpha": ("expert_glu_alpha", 1.702),
        "swiglu_limit": ("expert_glu_limit", 7.0),
    },
    fixed={
        **llama.FAMILY.fixed,
        "use_attention_sinks": True,
        "softmax_after_top_k": True,
        "expert_biases": True,
    },
    derive=_derive,
    reads=llama.FAMILY.reads | {"sliding_window", "layer_types"},
    switches={llama.SWITCH: True},
    # OpenAI's own names of what the config has under transformers' names.
    ignored=mixtral.TRAINING | {"attention_dropout", "initial_context_length", "experts_per_token"},
    keys={
        **mixtral.routed(llama.keys(llama.SWITCH, llama.SWITCH)),
        llama.A + "sinks": Key("n_heads", "blocks.{l}.attn.sinks"),
        **mixtral.router_key("mlp.router.weight"),
        llama.M + "router.bias": Key("experts", _MLP + "W_gate.bias"),
        llama.M + "experts.gate_up_proj": Key(
            "experts d_model d_mlp+d_mlp",
            (_EXPERT + "W_gate.weight", _EXPERT + "W_in.weight"),
            _every_other,
        ),
        llama.M + "experts.gate_up_proj_bias": Key(
            "experts d_mlp+d_mlp", (_EXPERT + "W_gate.bias", _EXPERT + "W_in.bias"), _every_other
        ),
        llama.M + "experts.down_proj": Key(
            "experts d_mlp d_model", _EXPERT + "W_out.weight", _turned
        ),
        llama.M + "experts.down_proj_bias": Key(
            "experts d_model", _EXPERT + "W_out.bias", each_expert
        ),
    },
    aliases=dict.fromkeys(("gpt-oss-20b", "gpt-oss"), "openai/gpt-oss-20b"),
    repositories=("openai/gpt-oss-120b",),
)
