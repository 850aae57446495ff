"""Gemma 3 without images (270M, 1B): Gemma 2 with QK-norms and two rotary bases."""

from dataclasses import replace
from typing import Any

from fastlens.config import SOFTCAP_OFF
from fastlens.weights.families import gemma, gemma2
from fastlens.weights.families.qwen3 import QK_NORMS
from fastlens.weights.rope import rotary_fields_of_kinds
from fastlens.weights.windows import window_fields


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    layers = config["num_hidden_layers"]
    pattern = config["sliding_window_pattern"]
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer % pattern else "full_attention"
        for layer in range(1, layers + 1)
    ]
    d_head, n_ctx = config["head_dim"], config["max_position_embeddings"]
    return {
        "d_head": d_head,
        # Always grouped, as TransformerLens has Gemma's.
        "n_key_value_heads": config["num_key_value_heads"],
        **rotary_fields_of_kinds(config, d_head, n_ctx, kinds, theta=1e6, local_theta=1e4),
        "attn_scale": config["query_pre_attn_scalar"] ** 0.5,
        "output_logits_soft_cap": config["final_logit_softcapping"] or SOFTCAP_OFF,
        # Windowed layers are not scaled in Gemma 3 either.
        **window_fields(config["sliding_window"], kinds, {}),
    }


_DEFAULTS = {"num_hidden_layers": 26, "num_key_value_heads": 4, "head_dim": 256,
             "max_position_embeddings": 131072, "query_pre_attn_scalar": 256,
             "final_logit_softcapping": None, "sliding_window": 4096,
             "sliding_window_pattern": 6}  # fmt: skip
_ROTARY = {"rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"}
_NAMES = """gemma-3-270m gemma-3-270m-it gemma-3-1b-pt gemma-3-1b-it
medgemma-27b-text-it""".split()

FAMILY = replace(
    gemma2.FAMILY,
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    config_class="Gemma3TextConfig",
    config={
        **gemma2.CONFIG,
        "vocab_size": ("d_vocab", 262208),
        "max_position_embeddings": ("n_ctx", 131072),
    },
    fixed={**gemma2.FAMILY.fixed, "use_qk_norm": True},
    derive=_derive,
    only={"use_bidirectional_attention": False},
    reads=frozenset(
        """head_dim num_key_value_heads query_pre_attn_scalar final_logit_softcapping sliding_window
        sliding_window_pattern layer_types""".split()
    )
    | _ROTARY,
    keys={**gemma2.KEYS, **gemma.gains_from_one(QK_NORMS)},
    aliases={name: f"google/{name}" for name in _NAMES},
    repositories=(),
)
