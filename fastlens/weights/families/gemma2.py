"""Gemma 2: Gemma with soft caps, windows in every other layer and norms around each sublayer."""

from dataclasses import replace
from typing import Any

from fastlens.config import SOFTCAP_OFF
from fastlens.weights.families import gemma, llama
from fastlens.weights.family import Key
from fastlens.weights.windows import window_fields


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    fields = gemma.grouped_heads(config)
    layers = config.get("num_hidden_layers", 26)
    alternating = ["sliding_attention", "full_attention"] * (layers // 2 + 1)
    kinds = config.get("layer_types") or alternating[:layers]
    return {
        **fields,
        "attn_scale": config["query_pre_attn_scalar"] ** 0.5,
        "attn_scores_soft_cap": config["attn_logit_softcapping"] or SOFTCAP_OFF,
        "output_logits_soft_cap": config["final_logit_softcapping"] or SOFTCAP_OFF,
        **window_fields(config["sliding_window"], kinds, fields),
    }


def _embedding_scale(config: dict[str, Any]) -> float:
    return gemma.embedding_scale(config, 2304)


_DEFAULTS = {"hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4,
             "head_dim": 256, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256,
             "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
             "sliding_window": 4096}  # fmt: skip
# Gemma 1's post_attention_layernorm stood before the MLP; this one is behind attention.
_NORMS = {"post_attention": "ln1_post", "pre_feedforward": "ln2", "post_feedforward": "ln2_post"}
KEYS = gemma.gains_from_one(
    {
        **llama.keys(llama.SWITCH, llama.SWITCH),
        **{f"layers.{{l}}.{theirs}_layernorm.weight": Key("d_model", f"blocks.{{l}}.{ours}.w")
           for theirs, ours in _NORMS.items()},
    }
)  # fmt: skip
CONFIG = {
    "vocab_size": ("d_vocab", 256000),
    "hidden_size": ("d_model", 2304),
    "intermediate_size": ("d_mlp", 9216),
    "num_hidden_layers": ("n_layers", 26),
    "num_attention_heads": ("n_heads", 8),
    "hidden_activation": ("act_fn", "gelu_pytorch_tanh"),
    "max_position_embeddings": ("n_ctx", 8192),
    "rms_norm_eps": ("eps", 1e-6),
}

FAMILY = replace(
    gemma.FAMILY,
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    config_class="Gemma2Config",
    config=CONFIG,
    fixed={**llama.FAMILY.fixed, "use_normalization_before_and_after": True},
    derive=_derive,
    factors={"embed.W_E": _embedding_scale},
    reads=llama.FAMILY.reads
    | set(
        """query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping sliding_window
        layer_types""".split()
    ),
    # The second name of the window is read by no code.
    only={"use_bidirectional_attention": False, "sliding_window_size": 4096},
    # Left in published configs and read by no code; the kind of KV cache.
    ignored=frozenset({"attention_dropout", "hidden_act", "cache_implementation"}),
    keys=KEYS,
    aliases={
        f"gemma-2-{size}{kind}": f"google/gemma-2-{size}{kind}"
        for size in ("2b", "9b", "27b")
        for kind in ("", "-it")
    },
    repositories=(),
)
