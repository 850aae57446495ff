"""Component classes, the factories, and TransformerLens' patching functions."""

import torch

from tests.compat.library import Library
from tests.models import randomise


def _part(path: str, *arguments, model: str = "gpt2", use=None, **changes):
    """A component of its own with the same values in both libraries, and what ``use`` makes of it.

    Without ``use`` it is called with a residual stream.
    """

    def call(lens: Library):
        part = lens(f"components.{path}")(lens.cfg(model, **changes), *arguments)
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for name, leaf in part.named_parameters():
                if "W_" in name:
                    leaf.copy_(torch.randn(leaf.shape, generator=generator) * 0.1)
        randomise(part)
        return part(lens.residual) if use is None else use(part, lens)

    return call


def _heads(attn, lens):
    q, k, v = attn.calculate_qkv_matrices(lens.residual, lens.residual, lens.residual)
    scores = attn.calculate_attention_scores(q, k)
    masked = attn.apply_causal_mask(scores, 0)
    return q, k, v, masked, attn.calculate_z_scores(v, masked.softmax(-1))


def _attend(attn, lens):
    return attn(lens.residual, lens.residual, lens.residual)


def _one_expert(expert, lens):
    return expert(lens.residual[0])


def _attention(use, model: str = "gpt2", kind: str = "Attention", **changes):
    return _part(kind, "global", 0, model=model, use=use, **changes)


ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 8}
HEADS = ("calculate_qkv_matrices", "calculate_attention_scores", "calculate_z_scores")


def _turned(attn, lens):
    x = lens.random(2, 6, 4, 8)
    return attn.apply_rotary(x), attn.apply_rotary(x, 3)


def _patched(name: str):
    """One of the functions of `patching`, on a metric that reads two logits."""

    def call(lens: Library):
        model = lens.gpt2
        clean, corrupted = lens.tokens[:1, :4], lens.corrupted[:1, :4]
        _, cache = model.run_with_cache(clean)

        def metric(logits):
            return logits[0, -1, 3] - logits[0, -1, 5]

        return lens(f"patching.{name}")(model, corrupted, cache, metric)

    return call


def _setter(name: str, index: list[int], *shape: int):
    def call(lens: Library):
        corrupted, clean = lens.random(*shape), lens.random(*shape, seed=8)
        return lens(f"patching.{name}")(corrupted, index, clean)

    return call


def _generic(lens: Library):
    setter = lens("patching.layer_pos_patch_setter")
    _, cache = lens.gpt2.run_with_cache(lens.tokens[:1, :4])
    return lens("patching.generic_activation_patch")(
        lens.gpt2,
        lens.corrupted[:1, :4],
        cache,
        lambda logits: logits[0, -1, 3],
        setter,
        "resid_pre",
        index_axis_names=["layer", "pos"],
    )


PATCHING = """resid_pre resid_mid attn_out mlp_out attn_head_out_by_pos attn_head_q_by_pos
attn_head_k_by_pos attn_head_v_by_pos attn_head_pattern_by_pos attn_head_pattern_dest_src_pos
attn_head_out_all_pos attn_head_q_all_pos attn_head_k_all_pos attn_head_v_all_pos
attn_head_pattern_all_pos attn_head_all_pos_every attn_head_by_pos_every block_every""".split()


def _activation(lens: Library):
    factory = lens("factories.activation_function_factory.ActivationFunctionFactory")
    names = ("relu", "gelu", "silu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "solu", "xielu")
    return [
        factory.pick_activation_function(lens.cfg(act_fn=name))(lens.residual) for name in names
    ]


def _xielu(lens: Library):
    kind = lens("utilities.activation_functions.XIELU")
    return kind()(lens.residual), kind(0.5, 0.7, 0.4)(lens.residual)


def _mlp(lens: Library):
    create = lens("factories.mlp_factory.MLPFactory").create_mlp
    return [type(create(lens.cfg(name))).__name__ for name in ("gpt2", "llama")]


def _selected(part, lens):
    part.select_activation_function()
    return part.act_fn(lens.residual), type(part.ln).__name__, part.d_mlp


CALLS = {
    "components.abstract_attention": {"AbstractAttention": _attention(_attend)},
    "components.abstract_attention.AbstractAttention": {
        "forward": _attention(_attend),
        "OV": _attention(lambda attn, lens: attn.OV.AB),
        "QK": _attention(lambda attn, lens: attn.QK.AB),
        "apply_causal_mask": _attention(_heads),
        "apply_rotary": _attention(_turned, **ROTARY),
        "calculate_sin_cos_rotary": _attention(
            lambda attn, lens: attn.calculate_sin_cos_rotary(8, 12, 500.0), **ROTARY
        ),
        "rotate_every_two": _attention(
            lambda attn, lens: attn.rotate_every_two(lens.random(2, 3, 8)), **ROTARY
        ),
        "create_alibi_slope": _attention(lambda attn, lens: attn.create_alibi_slope(5)),
        "create_alibi_multipliers": _attention(lambda attn, lens: attn.create_alibi_multipliers(8)),
        "create_alibi_bias": _attention(lambda attn, lens: attn.create_alibi_bias(4, 5)),
        **{name: _attention(_heads) for name in HEADS},
    },
    "components.attention": {"Attention": _attention(_attend)},
    "components.grouped_query_attention": {
        "GroupedQueryAttention": _attention(_attend, "llama", "GroupedQueryAttention"),
    },
    "components.grouped_query_attention.GroupedQueryAttention": {
        **{
            name: _attention(
                lambda attn, lens, name=name: getattr(attn, name), "llama", "GroupedQueryAttention"
            )
            for name in ("W_K", "W_V", "b_K", "b_V")
        },
        **{name: _attention(_heads, "llama", "GroupedQueryAttention") for name in HEADS},
    },
    "components.embed": {"Embed": _part("Embed", use=lambda part, lens: part.W_E)},
    "components.embed.Embed": {"forward": _part("Embed", use=lambda p, lens: p(lens.tokens))},
    "components.pos_embed": {"PosEmbed": _part("PosEmbed", use=lambda part, lens: part.W_pos)},
    "components.pos_embed.PosEmbed": {
        "forward": _part("PosEmbed", use=lambda part, lens: part(lens.tokens, 2)),
    },
    "components.unembed": {"Unembed": _part("Unembed")},
    "components.unembed.Unembed": {"forward": _part("Unembed")},
    "components.layer_norm": {"LayerNorm": _part("LayerNorm")},
    "components.layer_norm.LayerNorm": {"forward": _part("LayerNorm")},
    "components.layer_norm_pre": {"LayerNormPre": _part("LayerNormPre")},
    "components.layer_norm_pre.LayerNormPre": {"forward": _part("LayerNormPre")},
    "components.rms_norm": {"RMSNorm": _part("RMSNorm", model="llama")},
    "components.rms_norm.RMSNorm": {"forward": _part("RMSNorm", model="llama")},
    "components.rms_norm_pre": {"RMSNormPre": _part("RMSNormPre", model="llama")},
    "components.rms_norm_pre.RMSNormPre": {"forward": _part("RMSNormPre", model="llama")},
    "components.mlps.can_be_used_as_mlp": {
        "CanBeUsedAsMLP": _part("mlps.can_be_used_as_mlp.CanBeUsedAsMLP"),
    },
    "components.mlps.can_be_used_as_mlp.CanBeUsedAsMLP": {
        "forward": _part("mlps.can_be_used_as_mlp.CanBeUsedAsMLP"),
        "select_activation_function": _part(
            "mlps.can_be_used_as_mlp.CanBeUsedAsMLP", model="solu_ln", use=_selected
        ),
    },
    "components.mlps.mlp": {"MLP": _part("MLP")},
    "components.mlps.mlp.MLP": {"forward": _part("MLP")},
    "components.mlps.gated_mlp": {"GatedMLP": _part("GatedMLP", model="llama")},
    "components.mlps.gated_mlp.GatedMLP": {"forward": _part("GatedMLP", model="llama")},
    "components.mlps.moe": {
        "MoE": _part("MoE", model="moe"),
        "MoEGatedMLP": _part("mlps.moe.MoEGatedMLP", model="moe", use=_one_expert),
    },
    "components.mlps.moe.MoE": {"forward": _part("MoE", model="moe")},
    "components.mlps.moe.MoEGatedMLP": {
        "forward": _part("mlps.moe.MoEGatedMLP", model="moe", use=_one_expert),
    },
    "components.transformer_block": {"TransformerBlock": _part("TransformerBlock", 0)},
    "components.transformer_block.TransformerBlock": {
        "forward": _part("TransformerBlock", 0),
        "apply_mlp": _part(
            "TransformerBlock", 0, use=lambda part, lens: part.apply_mlp(lens.residual)
        ),
    },
    "factories.activation_function_factory": {"ActivationFunctionFactory": _activation},
    "factories.activation_function_factory.ActivationFunctionFactory": {
        "pick_activation_function": _activation,
    },
    "utilities.activation_functions.XIELU": {"forward": _xielu},
    "factories.mlp_factory": {"MLPFactory": _mlp},
    "factories.mlp_factory.MLPFactory": {"create_mlp": _mlp},
    "patching": {
        **{f"get_act_patch_{name}": _patched(f"get_act_patch_{name}") for name in PATCHING},
        "generic_activation_patch": _generic,
        "make_df_from_ranges": lambda lens: lens("patching.make_df_from_ranges")(
            [2, 3], ["layer", "pos"]
        ),
        "layer_pos_patch_setter": _setter("layer_pos_patch_setter", [0, 1], 2, 3, 4),
        "layer_pos_head_vector_patch_setter": _setter(
            "layer_pos_head_vector_patch_setter", [0, 1, 2], 2, 3, 4, 5
        ),
        "layer_head_vector_patch_setter": _setter(
            "layer_head_vector_patch_setter", [0, 2], 2, 3, 4, 5
        ),
        "layer_head_pattern_patch_setter": _setter(
            "layer_head_pattern_patch_setter", [0, 2], 2, 4, 5, 5
        ),
        "layer_head_pos_pattern_patch_setter": _setter(
            "layer_head_pos_pattern_patch_setter", [0, 2, 3], 2, 4, 5, 5
        ),
        "layer_head_dest_src_pos_pattern_patch_setter": _setter(
            "layer_head_dest_src_pos_pattern_patch_setter", [0, 2, 3, 1], 2, 4, 5, 5
        ),
    },
}
