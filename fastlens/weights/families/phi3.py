"""Phi 3, 3.5 and 4: Llama with fused projections, some with windows, some with LongRoPE."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.weights.families import llama
from fastlens.weights.family import Key
from fastlens.weights.views import input_heads
from fastlens.weights.windows import all_windowed, window_fields


def _qkv(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """``[(all heads of q, then of k, then of v) d_head, d_model]``."""
    kv_heads = cfg.n_key_value_heads or cfg.n_heads
    rows = [heads * cfg.d_head for heads in (cfg.n_heads, kv_heads, kv_heads)]
    return tuple(input_heads(part, cfg) for part in tensor.split(rows))


def _gate_and_up(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    gate, up = tensor.chunk(2)
    return gate.t(), up.t()


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
        # What Phi-3 called LongRoPE before it had a name.
        config["rope_scaling"] = {**rope, "rope_type": "longrope"}
    fields = llama.heads_and_rotary(config, fraction=config.get("partial_rotary_factor", 1.0))
    window = config.get("sliding_window")
    kinds = all_windowed(window, config.get("num_hidden_layers", 32))
    return {**fields, **window_fields(window, kinds, fields)}


_DEFAULTS = {"hidden_size": 3072, "max_position_embeddings": 4096,
             "original_max_position_embeddings": 4096}  # fmt: skip
T = "blocks.{l}."
_FUSED: dict[str, Key | None] = {
    llama.A + "qkv_proj.weight": Key(
        "heads+kv_heads+kv_heads d_model",
        (T + "attn.W_Q", T + "attn.{kv}W_K", T + "attn.{kv}W_V"), _qkv),
    llama.M + "gate_up_proj.weight": Key(
        "d_mlp+d_mlp d_model", (T + "mlp.W_gate", T + "mlp.W_in"), _gate_and_up),
}  # fmt: skip
_APART = {llama.A + f"{x}_proj.weight" for x in "qkv"} | {
    llama.M + f"{x}_proj.weight" for x in ("gate", "up")
}
KEYS = {name: key for name, key in llama.keys().items() if name not in _APART} | _FUSED

FAMILY = replace(
    llama.FAMILY,
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    config_class="Phi3Config",
    config={
        **llama.CONFIG,
        "vocab_size": ("d_vocab", 32064),
        "hidden_size": ("d_model", 3072),
        "intermediate_size": ("d_mlp", 8192),
        "max_position_embeddings": ("n_ctx", 4096),
        "rms_norm_eps": ("eps", 1e-5),
    },
    derive=_derive,
    reads=llama.FAMILY.reads
    | {"sliding_window", "partial_rotary_factor", "original_max_position_embeddings"},
    # Left in published configs; one value in all of them.
    only={"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1,
          "interpolate_factor": 1},
    switches={},
    # No dropout in eval mode.
    ignored=frozenset({"attention_dropout", "resid_pdrop", "embd_pdrop"}),
    keys=KEYS,
    aliases={"phi-3": "microsoft/Phi-3-mini-4k-instruct", "phi-4": "microsoft/phi-4"},
    repositories=(
        "microsoft/Phi-3-medium-4k-instruct",
        "microsoft/Phi-3-mini-128k-instruct",
        "microsoft/Phi-3.5-mini-instruct",
        "microsoft/Phi-4-mini-instruct",
    ),
    gguf={},
)  # fmt: skip
