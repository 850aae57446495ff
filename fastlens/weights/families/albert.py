"""ALBERT: one block run many times, and narrow embeddings. Loaded by `HookedEncoder`."""

from dataclasses import replace
from typing import Any

from fastlens.weights.families import bert
from fastlens.weights.family import Key
from fastlens.weights.views import bias_heads, input_heads, output_heads, transposed


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return bert.encoder_fields(
        config,
        d_model=4096,
        n_heads=64,
        n_token_types=config.get("type_vocab_size", 2),
        d_embed=config.get("embedding_size", 128),
        shared_layers=True,
    )


# The only block, whose parameters all of ours have.
B, T, M = "encoder.albert_layer_groups.0.albert_layers.0.", "blocks.0.", "predictions."
KEYS: dict[str, Key | None] = {
    **{name: key for name, key in bert.BODY.items() if name.startswith("embeddings.")},
    "encoder.embedding_hidden_mapping_in.weight": Key(
        "d_model d_embed", "embed.W_proj", transposed
    ),
    "encoder.embedding_hidden_mapping_in.bias": Key("d_model", "embed.b_proj"),
    B + "attention.query.weight": Key("heads d_model", T + "attn.W_Q", input_heads),
    B + "attention.query.bias": Key("heads", T + "attn.b_Q", bias_heads),
    B + "attention.key.weight": Key("heads d_model", T + "attn.W_K", input_heads),
    B + "attention.key.bias": Key("heads", T + "attn.b_K", bias_heads),
    B + "attention.value.weight": Key("heads d_model", T + "attn.W_V", input_heads),
    B + "attention.value.bias": Key("heads", T + "attn.b_V", bias_heads),
    B + "attention.dense.weight": Key("d_model heads", T + "attn.W_O", output_heads),
    B + "attention.dense.bias": Key("d_model", T + "attn.b_O"),
    B + "attention.LayerNorm.weight": Key("d_model", T + "ln1.w"),
    B + "attention.LayerNorm.bias": Key("d_model", T + "ln1.b"),
    B + "ffn.weight": Key("d_mlp d_model", T + "mlp.W_in", transposed),
    B + "ffn.bias": Key("d_mlp", T + "mlp.b_in"),
    B + "ffn_output.weight": Key("d_model d_mlp", T + "mlp.W_out", transposed),
    B + "ffn_output.bias": Key("d_model", T + "mlp.b_out"),
    B + "full_layer_layer_norm.weight": Key("d_model", T + "ln2.w"),
    B + "full_layer_layer_norm.bias": Key("d_model", T + "ln2.b"),
    "pooler.weight": Key("d_model d_model", "pooler.W", transposed),
    "pooler.bias": Key("d_model", "pooler.b"),
    M + "dense.weight": Key("d_embed d_model", "mlm_head.W", transposed),
    M + "dense.bias": Key("d_embed", "mlm_head.b"),
    M + "LayerNorm.weight": Key("d_embed", "mlm_head.ln.w"),
    M + "LayerNorm.bias": Key("d_embed", "mlm_head.ln.b"),
    M + "decoder.weight": Key("d_vocab d_embed", "unembed.W_U", transposed),
    M + "decoder.bias": Key("d_vocab", "unembed.b_U"),
    M + "bias": Key("d_vocab", "unembed.b_U"),
    # Whether two sentences stand in their order: BERT's question, so its head.
    "sop_classifier.classifier.weight": Key("two d_model", "nsp_head.W", transposed),
    "sop_classifier.classifier.bias": Key("two", "nsp_head.b"),
}

FAMILY = replace(
    bert.FAMILY,
    name="albert",
    architectures=("AlbertForMaskedLM", "AlbertForPreTraining", "AlbertModel"),
    config_class="AlbertConfig",
    prefix="albert.",
    config={
        **bert.FAMILY.config,
        "vocab_size": ("d_vocab", 30000),
        "hidden_size": ("d_model", 4096),
        "num_attention_heads": ("n_heads", 64),
        "intermediate_size": ("d_mlp", 16384),
        "hidden_act": ("act_fn", "gelu_new"),
    },
    derive=_fields,
    only={**bert.FAMILY.only, "num_hidden_groups": 1, "inner_group_num": 1},
    reads=bert.FAMILY.reads | {"embedding_size"},
    # All but dropout are TensorFlow's, and nobody's in PyTorch.
    ignored=bert.IGNORED
    | frozenset(
        """classifier_dropout_prob down_scale_factor gap_size layers_to_keep
        net_structure_type num_memory_blocks""".split()
    ),
    keys=KEYS,
    # What the hub called them before repositories had owners.
    aliases={
        f"albert-{size}-v{version}": f"albert/albert-{size}-v{version}"
        for size in ("base", "large", "xlarge", "xxlarge")
        for version in (1, 2)
    },
)
