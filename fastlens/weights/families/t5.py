"""T5, T5 v1.1 and Flan-T5: encoder and decoder, RMS norms, relative position biases."""

from collections.abc import Mapping
from typing import Any

from fastlens.errors import ConfigError
from fastlens.weights.family import Family, Key, Plan
from fastlens.weights.tensor_files import Shape
from fastlens.weights.views import input_heads, output_heads, transposed

_GATED, _SCALED = "is_gated_act", "scale_decoder_outputs"
_BIAS = ".layer.0.SelfAttention.relative_attention_bias.weight"


def _activation(config: dict[str, Any]) -> tuple[bool, str]:
    """Whether the MLP is gated, and its activation: ``"relu"``, ``"gated-gelu"`` ..."""
    stated = str(config.get("feed_forward_proj", "relu"))
    kind, _, gated = stated.partition("-")
    # v1.1 says gelu and means GPT-2's, by tanh.
    name = "gelu_new" if stated == "gated-gelu" else gated or kind
    is_gated = config.get(_GATED)
    is_gated = (kind == "gated") if is_gated is None else bool(is_gated)
    return is_gated, config.get("dense_act_fn") or name


def _derived(config: dict[str, Any]) -> dict[str, Any]:
    layers = config.get("num_layers", 6)
    decoder = config.get("num_decoder_layers")
    if decoder not in (None, layers):
        raise ConfigError(
            f"the encoder has {layers} layers and the decoder {decoder}, but "
            f"HookedEncoderDecoder (as TransformerLens') has n_layers of each."
        )
    start = config.get("decoder_start_token_id")
    scaled = config.get(_SCALED)
    if scaled is None:
        # Before transformers 5, what is said about tying said this too.
        scaled = config.get("tie_word_embeddings") is not False
    is_gated, act_fn = _activation(config)
    return {
        "gated_mlp": is_gated,
        "act_fn": act_fn,
        "tie_word_embeddings": bool(scaled),
        "decoder_start_token_id": config.get("pad_token_id", 0) if start is None else start,
    }


class _T5(Family):
    """Biases belong to the first layer of each stack, and old configs leave things unsaid."""

    def plan(self, shapes: Mapping[str, Shape], config: dict[str, Any]) -> Plan:
        return super().plan(shapes, {**config, _GATED: _activation(config)[0]})


def _attention(theirs: str, ours: str) -> dict[str, Key | None]:
    rows = {f"{theirs}.{x}.weight": Key("heads d_model", f"{ours}.W_{x.upper()}", input_heads)
            for x in "qkv"}  # fmt: skip
    return {**rows, f"{theirs}.o.weight": Key("d_model heads", f"{ours}.W_O", output_heads)}


def _stack(name: str) -> dict[str, Key | None]:
    layer, ours = f"{name}.block.{{l}}.layer.", f"{name}.{{l}}."
    is_decoder = name == "decoder"
    mlp, norm = (f"{layer}2", "ln3") if is_decoder else (f"{layer}1", "ln2")
    keys = {
        f"{name}.block.0{_BIAS}": Key("buckets n_heads", f"{name}.0.attn.rel_pos_bias.weight"),
        **_attention(f"{layer}0.SelfAttention", f"{ours}attn"),
        f"{layer}0.layer_norm.weight": Key("d_model", f"{ours}ln1.w"),
        # A plain MLP has wi, a gated one wi_0 and wi_1.
        f"{mlp}.DenseReluDense.wi.weight": Key("d_mlp d_model", f"{ours}mlp.W_in", transposed),
        f"{mlp}.DenseReluDense.wi_1.weight": Key("d_mlp d_model", f"{ours}mlp.W_in", transposed),
        f"{mlp}.DenseReluDense.wi_0.weight": Key(
            "d_mlp d_model", f"{ours}mlp.W_gate", transposed, _GATED
        ),
        f"{mlp}.DenseReluDense.wo.weight": Key("d_model d_mlp", f"{ours}mlp.W_out", transposed),
        f"{mlp}.layer_norm.weight": Key("d_model", f"{ours}{norm}.w"),
        f"{name}.final_layer_norm.weight": Key("d_model", f"{name}_final_ln.w"),
        # The same as `shared`.
        f"{name}.embed_tokens.weight": None,
    }
    if is_decoder:
        keys |= _attention(f"{layer}1.EncDecAttention", f"{ours}cross_attn")
        keys[f"{layer}1.layer_norm.weight"] = Key("d_model", f"{ours}ln2.w")
        # In the first checkpoints; no version of the model reads it.
        keys["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = None
    return keys


FAMILY = _T5(
    name="t5",
    architectures=("T5ForConditionalGeneration",),
    config_class="T5Config",
    model_class="HookedEncoderDecoder",
    prefix="",
    config={
        "vocab_size": ("d_vocab", 32128),
        "d_model": ("d_model", 512),
        "d_kv": ("d_head", 64),
        "d_ff": ("d_mlp", 2048),
        "num_layers": ("n_layers", 6),
        "num_heads": ("n_heads", 8),
        "n_positions": ("n_ctx", 512),
        "layer_norm_epsilon": ("eps", 1e-6),
        "relative_attention_num_buckets": ("relative_attention_num_buckets", 32),
        "relative_attention_max_distance": ("relative_attention_max_distance", 128),
    },
    fixed={
        "normalization_type": "RMS",
        "final_rms": True,
        "positional_embedding_type": "relative_positional_bias",
        "attention_dir": "bidirectional",
        "use_attn_scale": False,
    },
    derive=_derived,
    reads=frozenset(
        """num_decoder_layers feed_forward_proj dense_act_fn scale_decoder_outputs
        decoder_start_token_id""".split()
    ),
    switches={_GATED: False},
    ties_by_default=True,
    # No dropout in eval mode; the factor scales random weights.
    ignored=frozenset({"dropout_rate", "classifier_dropout", "initializer_factor"}),
    keys={
        "shared.weight": Key("d_vocab d_model", "embed.W_E"),
        **_stack("encoder"),
        **_stack("decoder"),
        "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
    },
    aliases={f"t5-{size}": f"google-t5/t5-{size}" for size in ("small", "base", "large")},
    default_prepend_bos=False,
)
