"""StarCoder 2: LayerNorms, a plain MLP, biases everywhere, grouped heads and a window."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama
from fastlens.weights.family import Key
from fastlens.weights.windows import all_windowed, window_fields


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    fields = llama.heads_and_rotary({**_DEFAULTS, **config})
    window = config.get("sliding_window")
    kinds = all_windowed(window, config.get("num_hidden_layers", 30))
    return {**fields, **window_fields(window, kinds, fields)}


_DEFAULTS = {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 2,
             "max_position_embeddings": 4096}  # fmt: skip
SWITCH = "use_bias"
NORM_BIASES: dict[str, Key | None] = {
    "layers.{l}.input_layernorm.bias": Key("d_model", "blocks.{l}.ln1.b"),
    "layers.{l}.post_attention_layernorm.bias": Key("d_model", "blocks.{l}.ln2.b"),
    "norm.bias": Key("d_model", "ln_final.b"),
}
KEYS = NORM_BIASES | {
    name.replace("up_proj", "c_fc").replace("down_proj", "c_proj"): key
    for name, key in llama.keys(SWITCH, SWITCH, SWITCH, gated=False).items()
}

FAMILY = replace(
    llama.FAMILY,
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    config_class="Starcoder2Config",
    config={
        "vocab_size": ("d_vocab", 49152),
        "hidden_size": ("d_model", 3072),
        "intermediate_size": ("d_mlp", 12288),
        "num_hidden_layers": ("n_layers", 30),
        "num_attention_heads": ("n_heads", 24),
        "hidden_act": ("act_fn", "gelu_pytorch_tanh"),
        "max_position_embeddings": ("n_ctx", 4096),
        "norm_epsilon": ("eps", 1e-5),
    },
    fixed={"normalization_type": "LN"},
    derive=_derive,
    ties_by_default=True,
    reads=llama.FAMILY.reads | {"sliding_window"},
    # Left by the library that trained it.
    only={"mlp_type": "default", "norm_type": "layer_norm", "scale_attn_weights": True},
    switches={SWITCH: True},
    # No dropout in eval mode. transformers reads norm_epsilon and hidden_act, not other names.
    ignored=frozenset(
        """attention_dropout residual_dropout embedding_dropout attention_softmax_in_fp32
        scale_attention_softmax_in_fp32 layer_norm_epsilon rms_norm_eps
        activation_function""".split()
    ),
    keys=KEYS,
    aliases={},
    repositories=tuple(f"bigcode/starcoder2-{size}" for size in ("3b", "7b", "15b")),
    default_prepend_bos=False,
    gguf={},
)
