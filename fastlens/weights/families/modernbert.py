"""ModernBERT: a rotary encoder with gated MLPs, windows and early norms. By `HookedEncoder`."""

from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.families import bert
from fastlens.weights.family import Family, Key
from fastlens.weights.views import (
    bias_heads,
    input_heads,
    must_be_zero,
    output_heads,
    transposed,
)

# Layer type of transformers -> ours, the old attribute of its rotary base, and its default.
KINDS = {
    "full_attention": ("global", "global_rope_theta", 160_000.0),
    "sliding_attention": ("local", "local_rope_theta", 10_000.0),
}


def _rotary_base(config: dict[str, Any], layer_type: str) -> float:
    _, attribute, default = KINDS[layer_type]
    rope = dict((config.get("rope_parameters") or {}).get(layer_type) or {})
    kind = rope.get("rope_type", "default")
    if kind != "default" or config.get("rope_scaling"):
        raise ConfigError(
            f"rotary positions of {layer_type} layers are scaled (rope_type={kind!r}, "
            f"rope_scaling={config.get('rope_scaling')}), which no ModernBERT here computes."
        )
    base = rope.get("rope_theta", config.get(attribute, default))
    if base is None:
        raise ConfigError(f"{attribute} is null in the config. State it: {default} is usual.")
    return base


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    n_layers, every = config.get("num_hidden_layers", 22), "global_attn_every_n_layers"
    types = config.get("layer_types") or [
        "sliding_attention" if layer % config.get(every, 3) else "full_attention"
        for layer in range(n_layers)
    ]
    unknown = sorted(set(types) - KINDS.keys())
    if unknown:
        raise ConfigError(f"layer_types has {unknown}; ModernBERT's are {', '.join(KINDS)}.")
    fields = bert.encoder_fields(
        config,
        pre_norm=True,
        n_token_types=0,
        heads=("mlm_head",),
        head_act_fn=config.get("classifier_activation", "gelu"),
        first_norm=False,
    )
    return {
        **fields,
        "attn_types": [KINDS[kind][0] for kind in types],
        # Half of it to either side, and the token itself.
        "window_size": config.get("local_attention", 128) // 2 + 1,
        "rotary_base": _rotary_base(config, "full_attention"),
        "rotary_base_local": _rotary_base(config, "sliding_attention"),
    }


def _qkv(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """All heads' queries, then their keys, then their values."""
    view = bias_heads if tensor.ndim == 1 else input_heads
    return tuple(view(part, cfg) for part in tensor.chunk(3))


B, T = "layers.{l}.", "blocks.{l}."
KEYS: dict[str, Key | None] = {
    "embeddings.tok_embeddings.weight": Key("d_vocab d_model", "embed.embed.W_E"),
    "embeddings.norm.weight": Key("d_model", "embed.ln.w"),
    "embeddings.norm.bias": Key("d_model", "embed.ln.b", when="norm_bias"),
    B + "attn_norm.weight": Key("d_model", T + "ln1.w", from_layer=1),
    B + "attn_norm.bias": Key("d_model", T + "ln1.b", when="norm_bias", from_layer=1),
    B + "attn.Wqkv.weight": Key("qkv d_model", tuple(T + f"attn.W_{x}" for x in "QKV"), _qkv),
    B + "attn.Wqkv.bias": Key(
        "qkv", tuple(T + f"attn.b_{x}" for x in "QKV"), _qkv, when="attention_bias"
    ),
    B + "attn.Wo.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    B + "attn.Wo.bias": Key("d_model", T + "attn.b_O", when="attention_bias"),
    B + "mlp_norm.weight": Key("d_model", T + "ln2.w"),
    B + "mlp_norm.bias": Key("d_model", T + "ln2.b", when="norm_bias"),
    B + "mlp.Wi.weight": Key(
        "d_mlp+d_mlp d_model", (T + "mlp.W_gate", T + "mlp.W_in"), lambda w, _: w.t().chunk(2, 1)
    ),
    B + "mlp.Wi.bias": Key("d_mlp+d_mlp", (), must_be_zero, when="mlp_bias"),
    B + "mlp.Wo.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    B + "mlp.Wo.bias": Key("d_model", T + "mlp.b_out", when="mlp_bias"),
    "final_norm.weight": Key("d_model", "ln_final.w"),
    "final_norm.bias": Key("d_model", "ln_final.b", when="norm_bias"),
    "head.dense.weight": Key("d_model d_model", "mlm_head.W", transposed),
    "head.dense.bias": Key("d_model", "mlm_head.b", when="classifier_bias"),
    "head.norm.weight": Key("d_model", "mlm_head.ln.w"),
    "head.norm.bias": Key("d_model", "mlm_head.ln.b", when="norm_bias"),
    "decoder.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
    "decoder.bias": Key("d_vocab", "unembed.b_U", when="decoder_bias"),
}

FAMILY = Family(
    name="modernbert",
    architectures=("ModernBertForMaskedLM", "ModernBertModel"),
    config_class="ModernBertConfig",
    prefix="model.",
    config={
        "vocab_size": ("d_vocab", 50368),
        "hidden_size": ("d_model", 768),
        "num_hidden_layers": ("n_layers", 22),
        "num_attention_heads": ("n_heads", 12),
        "intermediate_size": ("d_mlp", 1152),
        "hidden_activation": ("act_fn", "gelu"),
        "max_position_embeddings": ("n_ctx", 8192),
        "norm_eps": ("eps", 1e-5),
    },
    fixed={
        "normalization_type": "LN",
        "positional_embedding_type": "rotary",
        "attention_dir": "bidirectional",
        "gated_mlp": True,
        "use_local_attn": True,
    },
    derive=_fields,
    ties_by_default=True,
    switches={
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
    },
    reads=frozenset(
        """add_cross_attention classifier_activation global_attn_every_n_layers global_rope_theta
        layer_types local_attention local_rope_theta rope_parameters rope_scaling""".split()
    ),
    # Dropout, training, speed, classifiers, and how sparse the logits of a loss are.
    ignored=frozenset(
        """attention_dropout classifier_dropout classifier_pooling cls_token_id
        deterministic_flash_attn embedding_dropout initializer_cutoff_factor layer_norm_eps
        mlp_dropout position_embedding_type reference_compile repad_logits_with_grad
        sparse_pred_ignore_index sparse_prediction""".split()
    ),
    keys=KEYS,
    repositories=("answerdotai/ModernBERT-base", "answerdotai/ModernBERT-large"),
    model_class="HookedEncoder",
    optional=(("mlm_head", "unembed"),),
)
