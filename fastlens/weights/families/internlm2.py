"""InternLM 2 and 2.5: Llama whose q, k and v lie together, group by group (remote code)."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.weights.families import llama
from fastlens.weights.family import Key
from fastlens.weights.rope import ROTARY_ATTRIBUTES
from fastlens.weights.views import input_heads, output_heads, transposed


def _qkv(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """``[(kv_head (its queries, k, v) d_head), d_model]``."""
    groups = tensor.view(cfg.n_key_value_heads or cfg.n_heads, -1, cfg.d_head, cfg.d_model)
    parts = groups[:, :-2], groups[:, -2], groups[:, -1]
    return tuple(input_heads(part.reshape(-1, cfg.d_model), cfg) for part in parts)


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_scaling") or {}
    # Dynamic NTK is the identity up to the training length, beyond which texts are refused.
    is_dynamic = rope.get("type") == "dynamic"
    if is_dynamic:
        config = {**config, "rope_scaling": None}
    fields = llama.heads_and_rotary(config)
    if not is_dynamic:
        return fields
    length = config.get("max_position_embeddings", 2048)
    return {**fields, "use_dynamic_ntk_rope": True, "train_seq_length": length}


A, M, T = "layers.{l}.attention.", "layers.{l}.feed_forward.", "blocks.{l}."
_NAMES = (T + "attn.W_Q", T + "attn.{kv}W_K", T + "attn.{kv}W_V")
KEYS: dict[str, Key | None] = {
    "tok_embeddings.weight": Key("d_vocab d_model", "embed.W_E"),
    "layers.{l}.attention_norm.weight": Key("d_model", T + "ln1.w"),
    A + "wqkv.weight": Key("heads+kv_heads+kv_heads d_model", _NAMES, _qkv),
    A + "wo.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    A + "rotary_emb.inv_freq": None,
    "layers.{l}.ffn_norm.weight": Key("d_model", T + "ln2.w"),
    M + "w1.weight": Key("d_mlp d_model", T + "mlp.W_gate", transposed),
    M + "w3.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    M + "w2.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    "norm.weight": Key("d_model", "ln_final.w"),
    "output.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
}

FAMILY = replace(
    llama.FAMILY,
    name="internlm2",
    architectures=("InternLM2ForCausalLM",),
    config_class="PretrainedConfig",
    config={**llama.CONFIG, "vocab_size": ("d_vocab", 103168)},
    derive=_derive,
    reads=ROTARY_ATTRIBUTES | {"num_key_value_heads"},
    only={"bias": False, "pretraining_tp": 1},
    switches={},
    ignored=frozenset(),
    keys=KEYS,
    aliases={},
    repositories=tuple(
        f"internlm/internlm2{version}-{kind}{size}b"
        for version, sizes in (("", ("1_8", "7", "20")), ("_5", ("1_8", "7", "20")))
        for size in sizes
        for kind in ("", "chat-")
    ),
    gguf={},
)
