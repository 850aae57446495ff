"""MPT: ALiBi positions, fused q, k and v, and no bias anywhere."""

from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.family import HARMLESS, Family, Key
from fastlens.weights.views import input_heads, output_heads, transposed

# Part of the config -> the values that transformers' code computes; it does not look at them.
_ONLY = {
    "alibi": (True,),
    "alibi_bias_max": (8,),
    "attn_type": ("multihead_attention",),
    "prefix_lm": (False,),
    "qk_ln": (False,),
}
_NORMS = ("low_precision_layernorm", "layernorm")
# How it is computed, dropout, a mask that only training passes, and what every config has.
_IGNORED = HARMLESS | {"attn_impl", "attn_pdrop", "attn_uses_sequence_id", "tie_word_embeddings"}


def _attention(config: dict[str, Any]) -> dict[str, Any]:
    stated = dict(config.get("attn_config") or {})
    clip, softmax_scale = stated.pop("clip_qkv", None), stated.pop("softmax_scale", None)
    refused = [
        f"attn_config.{name}={value!r}"
        for name, value in stated.items()
        if name not in _IGNORED
        and not name.startswith("_")
        and (value not in _ONLY[name] if name in _ONLY else bool(value))
    ]
    if config.get("norm_type", _NORMS[0]) not in _NORMS:
        refused.append(f"norm_type={config['norm_type']!r}")
    if refused:
        raise ConfigError(
            f"this MPT has {', '.join(refused)}. transformers does not read that and computes "
            f"another model than was trained, so it is not loaded."
        )
    d_model, heads = config.get("d_model", 2048), config.get("n_heads", 16)
    return {
        "d_head": d_model // heads,
        "clip_qkv": clip or None,
        **({} if softmax_scale is None else {"attn_scale": 1 / softmax_scale}),
    }


def _qkv(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    return tuple(input_heads(part, cfg) for part in tensor.chunk(3))


B, T = "blocks.{l}.", "blocks.{l}."
KEYS = {
    "wte.weight": Key("d_vocab d_model", "embed.W_E"),
    B + "norm_1.weight": Key("d_model", T + "ln1.w"),
    B + "attn.Wqkv.weight": Key("qkv d_model", tuple(f"{T}attn.W_{x}" for x in "QKV"), _qkv),
    B + "attn.out_proj.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    B + "norm_2.weight": Key("d_model", T + "ln2.w"),
    B + "ffn.up_proj.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    B + "ffn.down_proj.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    "norm_f.weight": Key("d_model", "ln_final.w"),
    "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
}

FAMILY = Family(
    name="mpt",
    # The second is what the code in the repositories calls it.
    architectures=("MptForCausalLM", "MPTForCausalLM"),
    config_class="MptConfig",
    prefix="transformer.",
    config={
        "vocab_size": ("d_vocab", 50368),
        "d_model": ("d_model", 2048),
        "n_layers": ("n_layers", 24),
        "n_heads": ("n_heads", 16),
        "max_seq_len": ("n_ctx", 2048),
        "layer_norm_epsilon": ("eps", 1e-5),
    },
    fixed={
        "normalization_type": "LN",
        "positional_embedding_type": "alibi",
        "act_fn": "gelu",
    },
    derive=_attention,
    ties_by_default=True,
    reads=frozenset({"attn_config", "norm_type"}),
    only={"expansion_ratio": 4, "no_bias": True},
    # No dropout in eval mode; learned positions stand back where there is ALiBi; the fraction
    # scales gradients only.
    ignored=frozenset(
        """resid_pdrop emb_pdrop learned_pos_emb init_device init_config embedding_fraction
        tokenizer_name verbose""".split()
    ),
    keys=KEYS,
    repositories=tuple(
        f"mosaicml/mpt-{size}{kind}"
        for size in ("7b", "7b-8k", "30b")
        for kind in ("", "-instruct", "-chat")
    ),
    default_prepend_bos=False,
)
