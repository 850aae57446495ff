"""Granite 3 with mixtures of experts (1B-A400M, 3B-A800M)."""

from dataclasses import replace

from fastlens.weights.families import granite, llama, mixtral

_RESIDUAL = granite.FAMILY.factors["blocks.{l}.mlp.W_out"]
_MOE = "block_sparse_moe."

FAMILY = replace(
    granite.FAMILY,
    name="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    config_class="GraniteMoeConfig",
    config={
        **llama.CONFIG,
        "num_local_experts": ("num_experts", 8),
        "num_experts_per_tok": ("experts_per_token", 2),
    },
    # The softmax is over the chosen experts: the same as over all, made to sum to one.
    fixed={**llama.FAMILY.fixed, "norm_topk_prob": True},
    factors={
        **granite.FAMILY.factors,
        "blocks.{l}.mlp.experts.{e}.W_out.weight": _RESIDUAL,
    },
    # Written by transformers 4.57, and the only kind there is.
    only={"position_embedding_type": "rope"},
    switches={llama.SWITCH: False},
    ignored=mixtral.TRAINING | {"attention_dropout"},
    keys={
        **mixtral.routed(llama.keys(llama.SWITCH, llama.SWITCH)),
        # As transformers 5 has them in memory, and as files do.
        **mixtral.router_key(_MOE + "router.weight"),
        **mixtral.router_key(_MOE + "router.layer.weight"),
        **mixtral.fused_keys(_MOE + "experts.gate_up_proj", _MOE + "experts.down_proj"),
        **mixtral.fused_keys(_MOE + "input_linear.weight", _MOE + "output_linear.weight"),
    },
    repositories=tuple(
        f"ibm-granite/granite-{version}-{size}-{kind}"
        for version in ("3.0", "3.1")
        for size in ("1b-a400m", "3b-a800m")
        for kind in ("base", "instruct")
    ),
)
