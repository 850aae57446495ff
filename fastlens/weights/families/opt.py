"""OPT and Galactica: GPT-2's block in fairseq's names, positions from the third row on."""

from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.family import Family, Key
from fastlens.weights.views import (
    bias_heads,
    first_positions,
    input_heads,
    output_heads,
    transposed,
)


def positions_from_two(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    """A position table whose first two rows belong to padding (fairseq)."""
    return first_positions(tensor[2:], cfg)


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    d_model = config.get("hidden_size", 768)
    width = config.get("word_embed_proj_dim") or d_model
    if width != d_model or not config.get("do_layer_norm_before", True):
        raise ConfigError(
            f"this OPT has word_embed_proj_dim={width} for hidden_size={d_model} and "
            f"do_layer_norm_before={config.get('do_layer_norm_before', True)}, as OPT-350m has. "
            f"Projected embeddings and norms on the stream itself are not computed here; all "
            f"other sizes of OPT have neither."
        )
    if config.get("_remove_final_layer_norm", False):
        raise ConfigError(
            "_remove_final_layer_norm=True was found (OPT models tuned before transformers "
            "4.20.1). A model without its last norm is not computed here."
        )
    trained = config.get("layer_norm_elementwise_affine", True)
    return {
        "d_head": d_model // config.get("num_attention_heads", 12),
        "normalization_type": "LN" if trained else "LNPre",
    }


BIAS, GAIN = "enable_bias", "layer_norm_elementwise_affine"
L, T = "layers.{l}.", "blocks.{l}."
A = L + "self_attn."


def keys(bias: str | None = None, gain: str | None = None, prefix: str = "") -> dict[str, Key]:
    """fairseq's tensors of a block; ``bias`` and ``gain`` are switches of the config."""
    norms = {"self_attn_layer_norm": "ln1", "final_layer_norm": "ln2"}
    found = {
        **{f"{L}{theirs}.{kind}": Key("d_model", f"{T}{ours}.{kind[0]}", when=gain)
           for theirs, ours in norms.items() for kind in ("weight", "bias")},
        **{f"{A}{x}_proj.weight": Key("heads d_model", f"{T}attn.W_{x.upper()}", input_heads)
           for x in "qkv"},
        **{f"{A}{x}_proj.bias": Key("heads", f"{T}attn.b_{x.upper()}", bias_heads, bias)
           for x in "qkv"},
        A + "out_proj.weight": Key("d_model heads", T + "attn.W_O", output_heads),
        A + "out_proj.bias": Key("d_model", T + "attn.b_O", when=bias),
        L + "fc1.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
        L + "fc1.bias": Key("d_mlp", T + "mlp.b_in", when=bias),
        L + "fc2.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
        L + "fc2.bias": Key("d_model", T + "mlp.b_out", when=bias),
        "embed_tokens.weight": Key("d_vocab d_model", "embed.W_E"),
    }  # fmt: skip
    return {prefix + name: key for name, key in found.items()}


_SIZES = {"small": "125m", "medium": "1.3b", "large": "2.7b", "xl": "6.7b", "xxl": "13b",
          "xxxl": "30b", "xxxxl": "66b"}  # fmt: skip

FAMILY = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    config_class="OPTConfig",
    prefix="model.",
    config={
        "vocab_size": ("d_vocab", 50272),
        "hidden_size": ("d_model", 768),
        "num_hidden_layers": ("n_layers", 12),
        "num_attention_heads": ("n_heads", 12),
        "ffn_dim": ("d_mlp", 3072),
        "max_position_embeddings": ("n_ctx", 2048),
        "activation_function": ("act_fn", "relu"),
    },
    fixed={"eps": 1e-5},
    derive=_derive,
    ties_by_default=True,
    reads=frozenset({"word_embed_proj_dim", "do_layer_norm_before", "_remove_final_layer_norm"}),
    switches={BIAS: True, GAIN: True},
    # In Galactica's configs; transformers has no other way.
    only={"scale_embeddings": False, "learned_embeddings": True},
    # No dropout in eval mode.
    ignored=frozenset("dropout attention_dropout activation_dropout layerdrop init_std".split()),
    keys={
        **keys(BIAS, GAIN, "decoder."),
        "decoder.embed_positions.weight": Key(
            "n_ctx+2 d_model", "pos_embed.W_pos", positions_from_two
        ),
        "decoder.final_layer_norm.weight": Key("d_model", "ln_final.w", when=GAIN),
        "decoder.final_layer_norm.bias": Key("d_model", "ln_final.b", when=GAIN),
        "decoder.version": None,
        "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
    },
    aliases={
        "opt": "facebook/opt-125m",
        **{f"opt-{old}": f"facebook/opt-{size}" for old, size in _SIZES.items()},
        **{f"opt-{size}": f"facebook/opt-{size}" for size in _SIZES.values()},
    },
    repositories=tuple(f"facebook/galactica-{size}" for size in ("125m", "1.3b", "6.7b", "30b")),
)
