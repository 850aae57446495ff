"""OLMo 2: Llama with norms behind the sublayers, and joined norms of queries and keys."""

from dataclasses import replace

from fastlens.weights.families import llama, olmo
from fastlens.weights.family import Key

_BEHIND = {"post_attention": "ln1", "post_feedforward": "ln2"}
_INPUT_NORM = "layers.{l}.input_layernorm.weight"
# Norms of what attention and MLP write; Llama's name for ln2 is ln1's here.
NORMS = {
    f"layers.{{l}}.{theirs}_layernorm.weight": Key("d_model", f"blocks.{{l}}.{ours}.w")
    for theirs, ours in _BEHIND.items()
}
# One gain for each channel of each head.
_QK_NORMS = {
    f"{llama.A}{x}_norm.weight": Key(axes, f"blocks.{{l}}.attn.{x}_norm.w")
    for x, axes in (("q", "heads"), ("k", "kv_heads"))
}
_ALL = llama.keys(llama.SWITCH, llama.SWITCH) | NORMS | _QK_NORMS

FAMILY = replace(
    olmo.FAMILY,
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    config_class="Olmo2Config",
    config={**olmo.CONFIG, "rms_norm_eps": ("eps", 1e-5)},
    fixed={
        **llama.FAMILY.fixed,
        "norm_after_sublayer": True,
        "use_qk_norm": True,
        "qk_norm_kind": "joined",
    },
    derive=llama.heads_and_rotary,
    computed={},
    keys={name: key for name, key in _ALL.items() if name != _INPUT_NORM},
    aliases={"olmo-2-1b": "allenai/OLMo-2-0425-1B", "olmo-2-7b": "allenai/OLMo-2-1124-7B"},
    repositories=(
        "allenai/OLMo-2-0425-1B-Instruct",
        "allenai/OLMo-2-1124-7B-Instruct",
        "allenai/OLMo-2-1124-13B",
        "allenai/OLMo-2-0325-32B",
    ),
)
