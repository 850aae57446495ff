"""GPT-J: rotary positions on adjacent channels, one norm for attention and MLP side by side."""

from typing import Any

from fastlens.errors import ConfigError
from fastlens.weights.family import Family, Key
from fastlens.weights.views import both, input_heads, output_heads, transposed


def head_size(config: dict[str, Any]) -> dict[str, Any]:
    """The size of heads, of which the first ``rotary_dim`` channels are rotated."""
    d_head = config.get("n_embd", 4096) // config.get("n_head", 16)
    rotated = config.get("rotary_dim", 64)
    if not rotated or rotated > d_head:
        raise ConfigError(
            f"rotary_dim={rotated} was found, and heads have {d_head} channels (n_embd / n_head). "
            f"It must be from 2 to {d_head}; transformers computes nothing else either."
        )
    return {"d_head": d_head}


A, T = "h.{l}.attn.", "blocks.{l}."
M = "h.{l}.mlp."
KEYS = {
    "wte.weight": Key("d_vocab d_model", "embed.W_E"),
    "h.{l}.ln_1.weight": Key("d_model", (T + "ln1.w", T + "ln2.w"), both),
    "h.{l}.ln_1.bias": Key("d_model", (T + "ln1.b", T + "ln2.b"), both),
    **{f"{A}{x}_proj.weight": Key("heads d_model", f"{T}attn.W_{x.upper()}", input_heads)
       for x in "qkv"},
    A + "out_proj.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    **{A + mask: None for mask in ("bias", "masked_bias", "causal_mask", "embed_positions")},
    M + "fc_in.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    M + "fc_in.bias": Key("d_mlp", T + "mlp.b_in"),
    M + "fc_out.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    M + "fc_out.bias": Key("d_model", T + "mlp.b_out"),
    "ln_f.weight": Key("d_model", "ln_final.w"),
    "ln_f.bias": Key("d_model", "ln_final.b"),
    "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
    "lm_head.bias": Key("d_vocab", "unembed.b_U"),
}  # fmt: skip

FAMILY = Family(
    name="gptj",
    architectures=("GPTJForCausalLM",),
    config_class="GPTJConfig",
    prefix="transformer.",
    config={
        "vocab_size": ("d_vocab", 50400),
        "n_positions": ("n_ctx", 2048),
        "n_embd": ("d_model", 4096),
        "n_layer": ("n_layers", 28),
        "n_head": ("n_heads", 16),
        "rotary_dim": ("rotary_dim", 64),
        "n_inner": ("d_mlp", None),
        "activation_function": ("act_fn", "gelu_new"),
        "layer_norm_epsilon": ("eps", 1e-5),
    },
    fixed={
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": True,
    },
    derive=head_size,
    # In the configs of the first releases; transformers has no other way.
    only={"rotary": True, "scale_attn_weights": True},
    # No dropout in eval mode, and the heads of tasks.
    ignored=frozenset(
        """resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation
        summary_proj_to_labels summary_first_dropout""".split()
    ),
    keys=KEYS,
    aliases=dict.fromkeys(("gpt-j-6B", "gpt-j", "gptj"), "EleutherAI/gpt-j-6B"),
)
