"""Qwen 1 (its code lies beside its weights; not in transformers)."""

from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.family import Family, Key
from fastlens.weights.rope import rotary_fields
from fastlens.weights.views import bias_heads, input_heads, output_heads, transposed


def _qkv(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """``[(qkv head d_head), d_model]``."""
    return tuple(input_heads(part, cfg) for part in tensor.chunk(3))


def _qkv_bias(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    return tuple(bias_heads(part, cfg) for part in tensor.chunk(3))


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    d_model, heads = config.get("hidden_size", 4096), config.get("num_attention_heads", 32)
    d_head = config.get("kv_channels", 128)
    if d_head * heads != d_model:
        raise ConfigError(
            f"kv_channels={d_head} was found with {heads} heads and hidden_size={d_model}. Heads "
            f"that do not fill the stream are not read of this architecture."
        )
    length = config.get("seq_length", 8192)
    rotary = rotary_fields(
        config, d_head, length, theta_name="rotary_emb_base", fraction=config.get("rotary_pct", 1.0)
    )
    return {
        # Beyond it log-n attention and dynamic NTK begin: texts that long are refused.
        "n_ctx": length,
        "train_seq_length": length,
        "d_head": d_head,
        "d_mlp": config.get("intermediate_size", 22016) // 2,
        **rotary,
    }


A, M, T = "h.{l}.attn.", "h.{l}.mlp.", "blocks.{l}."
_ATTN = T + "attn."
KEYS: dict[str, Key | None] = {
    "wte.weight": Key("d_vocab d_model", "embed.W_E"),
    "h.{l}.ln_1.weight": Key("d_model", T + "ln1.w"),
    A + "c_attn.weight": Key("qkv d_model", (_ATTN + "W_Q", _ATTN + "W_K", _ATTN + "W_V"), _qkv),
    A + "c_attn.bias": Key("qkv", (_ATTN + "b_Q", _ATTN + "b_K", _ATTN + "b_V"), _qkv_bias),
    A + "c_proj.weight": Key("d_model heads", _ATTN + "W_O", output_heads),
    **dict.fromkeys((A + "masked_bias", A + "logn_tensor", A + "rotary_emb.inv_freq",
                     "rotary_emb.inv_freq")),
    "h.{l}.ln_2.weight": Key("d_model", T + "ln2.w"),
    M + "w1.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    M + "w2.weight": Key("d_mlp d_model", T + "mlp.W_gate", transposed),
    M + "c_proj.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    "ln_f.weight": Key("d_model", "ln_final.w"),
    "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
}  # fmt: skip
_SIZES = ("1_8B", "7B", "14B")

FAMILY = Family(
    name="qwen",
    architectures=("QWenLMHeadModel",),
    config_class="PretrainedConfig",
    prefix="transformer.",
    config={
        "vocab_size": ("d_vocab", 151936),
        "hidden_size": ("d_model", 4096),
        "num_hidden_layers": ("n_layers", 32),
        "num_attention_heads": ("n_heads", 32),
        "layer_norm_epsilon": ("eps", 1e-6),
        "use_logn_attn": ("use_logn_attn", True),
        "use_dynamic_ntk": ("use_dynamic_ntk_rope", True),
    },
    fixed={"normalization_type": "RMS", "final_rms": True, "gated_mlp": True, "act_fn": "silu"},
    derive=_fields,
    reads=frozenset(
        """kv_channels seq_length intermediate_size rotary_emb_base rotary_pct rope_scaling
        rope_parameters rope_theta""".split()
    ),
    only={"no_bias": True, "scale_attn_weights": True, "use_cache_quantization": False},
    # No dropout in eval mode; the dtype and the kernels are the caller's.
    ignored=frozenset(
        """attn_dropout_prob emb_dropout_prob bf16 fp16 fp32 onnx_safe use_flash_attn
        use_cache_kernel softmax_in_fp32 max_position_embeddings""".split()
    ),
    keys=KEYS,
    aliases={
        f"qwen-{size.lower().replace('_', '.')}{chat.lower()}": f"Qwen/Qwen-{size}{chat}"
        for size in _SIZES
        for chat in ("", "-Chat")
    },
    repositories=("Qwen/Qwen-72B", "Qwen/Qwen-72B-Chat"),
    default_prepend_bos=False,
)
