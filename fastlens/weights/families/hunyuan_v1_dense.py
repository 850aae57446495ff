"""HunYuan 0.5B to 7B: Llama with an RMS norm of queries and keys after they are rotated."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import llama, qwen3
from fastlens.weights.rope import DEFAULT_THETA


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    alpha = rope.get("alpha")
    if alpha and rope.get("rope_type", rope.get("type")) == "dynamic":
        # Called dynamic, but with a fixed alpha that stretches the base and nothing else.
        theta = rope.get("rope_theta") or config.get("rope_theta", DEFAULT_THETA)
        heads = config.get("num_attention_heads", 32)
        d_head = config.get("head_dim") or config.get("hidden_size", 4096) // heads
        theta *= alpha ** (d_head / (d_head - 2))
        stretched = {"rope_type": "default", "rope_theta": theta}
        config = {**config, "rope_scaling": None, "rope_parameters": stretched}
    return llama.heads_and_rotary(config)


_NORMS = {
    name.replace(f"{x}_norm", f"{theirs}_layernorm"): key
    for x, theirs in (("q", "query"), ("k", "key"))
    for name, key in qwen3.QK_NORMS.items()
    if f"{x}_norm" in name
}

FAMILY = replace(
    llama.FAMILY,
    name="hunyuan_v1_dense",
    architectures=("HunYuanDenseV1ForCausalLM",),
    config_class="HunYuanDenseV1Config",
    config={
        **llama.CONFIG,
        "vocab_size": ("d_vocab", 290943),
        "rms_norm_eps": ("eps", 1e-5),
    },
    fixed={**llama.FAMILY.fixed, "use_qk_norm": True, "qk_norm_kind": "behind_rotary"},
    derive=_derive,
    only={"use_qk_norm": True, "use_cla": False, "use_rotary_pos_emb": True, "mlp_bias": False,
          "add_classification_head": False, "norm_type": "rms"},
    switches={llama.SWITCH: False},
    # No dropout in eval mode. The rest is of other models that the training library makes: tokens,
    # heads that classify, caches that layers share.
    ignored=frozenset(
        """attention_dropout pretraining_tp eod_token_id pad_id im_start_id im_end_id im_newline_id
        text_start_id text_end_id mask_init_id org_vocab_size class_num dense_list pool_type
        cla_share_factor attention_head_dim""".split()
    ),
    keys={**llama.keys(llama.SWITCH, llama.SWITCH), **_NORMS},
    aliases={},
    repositories=tuple(
        f"tencent/Hunyuan-{size}-{kind}"
        for size in ("0.5B", "1.8B", "4B", "7B")
        for kind in ("Instruct", "Pretrain")
    ),
    gguf={},
)  # fmt: skip
