"""BioGPT: OPT's block and positions, scaled embeddings."""

from typing import Any

from fastlens.weights.families import opt
from fastlens.weights.families.xglm import embedding_scale
from fastlens.weights.family import Family, Key
from fastlens.weights.views import transposed


def _head_size(config: dict[str, Any]) -> dict[str, Any]:
    return {"d_head": config.get("hidden_size", 1024) // config.get("num_attention_heads", 16)}


FAMILY = Family(
    name="biogpt",
    architectures=("BioGptForCausalLM",),
    config_class="BioGptConfig",
    prefix="biogpt.",
    config={
        "vocab_size": ("d_vocab", 42384),
        "hidden_size": ("d_model", 1024),
        "num_hidden_layers": ("n_layers", 24),
        "num_attention_heads": ("n_heads", 16),
        "intermediate_size": ("d_mlp", 4096),
        "hidden_act": ("act_fn", "gelu"),
        "max_position_embeddings": ("n_ctx", 1024),
    },
    # transformers' norms do not read layer_norm_eps, which is 1e-12 in every config.
    fixed={"normalization_type": "LN", "eps": 1e-5},
    derive=_head_size,
    ties_by_default=True,
    reads=frozenset({"scale_embedding"}),
    # No dropout in eval mode.
    ignored=frozenset(
        """layer_norm_eps hidden_dropout_prob attention_probs_dropout_prob activation_dropout
        layerdrop""".split()
    ),
    keys={
        **opt.keys(),
        "embed_positions.weight": Key("n_ctx+2 d_model", "pos_embed.W_pos", opt.positions_from_two),
        "layer_norm.weight": Key("d_model", "ln_final.w"),
        "layer_norm.bias": Key("d_model", "ln_final.b"),
        "output_projection.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
    },
    factors={"embed.W_E": lambda config: embedding_scale(config, "hidden_size")},
    repositories=("microsoft/biogpt", "microsoft/BioGPT-Large", "microsoft/BioGPT-Large-PubMedQA"),
)
