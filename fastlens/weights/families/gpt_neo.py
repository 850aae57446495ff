"""GPT-Neo and TinyStories: GPT-2's block, with windows in every other layer and unscaled scores."""

from typing import Any

from fastlens.errors import ConfigError
from fastlens.weights.family import Family, Key
from fastlens.weights.views import first_positions, input_heads, output_heads, transposed


def _layers(config: dict[str, Any]) -> dict[str, Any]:
    """The size of heads, and which layers have a window."""
    stated = config.get("attention_types") or [[["global", "local"], 12]]
    kinds = [kind for group, times in stated for kind in list(group) * times]
    n_layers = config.get("num_layers", 24)
    unrolled = list(config.get("attention_layers") or kinds)
    if unrolled != kinds or len(kinds) != n_layers:
        raise ConfigError(
            f"attention_types={stated} gives {len(kinds)} layers; the config has "
            f"num_layers={n_layers} and attention_layers={unrolled}. Make them agree."
        )
    return {
        "d_head": config.get("hidden_size", 2048) // config.get("num_heads", 16),
        "attn_types": kinds,
    }


A, T = "h.{l}.attn.attention.", "blocks.{l}."
M = "h.{l}.mlp."
NORMS = {"h.{l}.ln_1": T + "ln1", "h.{l}.ln_2": T + "ln2", "ln_f": "ln_final"}
KEYS = {
    "wte.weight": Key("d_vocab d_model", "embed.W_E"),
    "wpe.weight": Key("n_ctx d_model", "pos_embed.W_pos", first_positions),
    **{f"{theirs}.weight": Key("d_model", f"{ours}.w") for theirs, ours in NORMS.items()},
    **{f"{theirs}.bias": Key("d_model", f"{ours}.b") for theirs, ours in NORMS.items()},
    **{f"{A}{x}_proj.weight": Key("heads d_model", f"{T}attn.W_{x.upper()}", input_heads)
       for x in "qkv"},
    A + "out_proj.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    A + "out_proj.bias": Key("d_model", T + "attn.b_O"),
    **dict.fromkeys((A + "bias", A + "masked_bias")),
    M + "c_fc.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    M + "c_fc.bias": Key("d_mlp", T + "mlp.b_in"),
    M + "c_proj.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    M + "c_proj.bias": Key("d_model", T + "mlp.b_out"),
    "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
}  # fmt: skip

_SIZES = {"small": "125M", "medium": "1.3B", "large": "2.7B"}
# "1Layer" is 1L in TransformerLens; one repository's name has a letter less.
_STORIES = {"1M": "1M", "3M": "3M", "8M": "8M", "28M": "28M", "33M": "33M",
            "1L-21M": "1Layer-21M", "2L-33M": "2Layers-33M"}  # fmt: skip
ALIASES = {
    "neo": "EleutherAI/gpt-neo-125M",
    **{f"{prefix}neo-{old}": f"EleutherAI/gpt-neo-{size}"
       for old, size in _SIZES.items() for prefix in ("", "gpt-")},
    **{f"gpt-neo-{size}": f"EleutherAI/gpt-neo-{size}" for size in _SIZES.values()},
    **{f"tiny-stories-{short}": f"roneneldan/TinyStories-{size}"
       for short, size in _STORIES.items()},
    **{f"tiny-stories-instruct-{short}": f"roneneldan/TinyStories-Instruct-{size}"
       for short, size in _STORIES.items() if short != "1L-21M"},
    "tiny-stories-instruct-1L-21M": "roneneldan/TinyStories-Instuct-1Layer-21M",
}  # fmt: skip

FAMILY = Family(
    name="gpt_neo",
    architectures=("GPTNeoForCausalLM",),
    config_class="GPTNeoConfig",
    prefix="transformer.",
    config={
        "vocab_size": ("d_vocab", 50257),
        "max_position_embeddings": ("n_ctx", 2048),
        "hidden_size": ("d_model", 2048),
        "num_layers": ("n_layers", 24),
        "num_heads": ("n_heads", 16),
        "intermediate_size": ("d_mlp", None),
        "window_size": ("window_size", 256),
        "activation_function": ("act_fn", "gelu_new"),
        "layer_norm_epsilon": ("eps", 1e-5),
    },
    fixed={"normalization_type": "LN", "use_attn_scale": False, "use_local_attn": True},
    derive=_layers,
    ties_by_default=True,
    reads=frozenset({"attention_types", "attention_layers"}),
    # No dropout in eval mode, and the heads of tasks.
    ignored=frozenset(
        """resid_dropout embed_dropout attention_dropout classifier_dropout summary_type
        summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout""".split()
    ),
    keys=KEYS,
    aliases=ALIASES,
)
