"""GLM-4-0414: GLM with norms before and behind each sublayer."""

from dataclasses import replace

from fastlens.weights.families import glm
from fastlens.weights.family import Key

_BEHIND = {"post_self_attn": "ln1_post", "post_mlp": "ln2_post"}

FAMILY = replace(
    glm.FAMILY,
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    config_class="Glm4Config",
    fixed={**glm.FAMILY.fixed, "use_normalization_before_and_after": True},
    keys={
        **glm.KEYS,
        **{f"layers.{{l}}.{theirs}_layernorm.weight": Key("d_model", f"blocks.{{l}}.{ours}.w")
           for theirs, ours in _BEHIND.items()},
    },
    repositories=(
        "THUDM/GLM-4-9B-0414",
        "THUDM/GLM-4-32B-0414",
        "THUDM/GLM-4-32B-Base-0414",
        "THUDM/GLM-Z1-9B-0414",
    ),
)  # fmt: skip
