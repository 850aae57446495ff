"""What families share whose first layers are dense and the others DeepSeek's mixtures."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fastlens.weights.families import mixtral
from fastlens.weights.family import Key
from fastlens.weights.llama_like import M

# How DeepSeek trained, and modules behind the model that predict further tokens.
TRAINING = mixtral.TRAINING | set(
    """attention_dropout pretraining_tp num_nextn_predict_layers num_mtp_layers aux_loss_alpha
    seq_aux ep_size""".split()
)
# What `mixture_fields` reads.
READS = frozenset(
    """intermediate_size moe_intermediate_size first_k_dense_replace n_routed_experts
    n_shared_experts num_experts_per_tok n_group topk_group routed_scaling_factor""".split()
)
_SHARED = "blocks.{l}.mlp.shared_expert."


def first_dense(default: int) -> Callable[[dict[str, Any], int], bool]:
    """Whether a layer is one of the first, which have no mixture."""
    return lambda config, layer: layer < (config.get("first_k_dense_replace", default) or 0)


def mixture_fields(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The mixtures of the layers behind the first; no such fields if all layers are dense.

    Args:
        defaults: Of the family's config class, for what the config does not say.
    """
    config = {**defaults, **config}
    dense, d_mlp = config["first_k_dense_replace"] or 0, config["intermediate_size"]
    if dense >= config["num_hidden_layers"]:
        return {"d_mlp": d_mlp, "d_mlp_dense": d_mlp}
    width = config["moe_intermediate_size"]
    return {
        "d_mlp": width,
        "d_mlp_dense": d_mlp,
        "n_dense_layers": dense,
        "num_experts": config["n_routed_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "d_shared_expert": width * (config["n_shared_experts"] or 0) or None,
        "expert_groups": config["n_group"],
        "groups_per_token": config["topk_group"],
        "expert_weight_scale": config["routed_scaling_factor"],
    }


def mixed_keys(
    dense: Mapping[str, Key | None], default: int, has_bias: bool = True
) -> dict[str, Key | None]:
    """The keys of dense blocks, and of mixtures behind the first layers.

    Args:
        default: How many layers are dense if the config does not say.
        has_bias: Whether the router has a bias for the choice.
    """
    is_dense = first_dense(default)
    first = {
        name: replace(key, axes=key.axes.replace("d_mlp", "d_mlp_dense"), in_layer=is_dense)
        for name, key in dense.items()
        if key is not None and name.startswith(M)
    }
    mixtures = {
        **mixtral.EXPERTS,
        **{M + f"shared_experts.{theirs}_proj.weight": Key(axes, f"{_SHARED}{ours}.weight")
           for theirs, ours, axes in (("gate", "W_gate", "d_shared d_model"),
                                      ("up", "W_in", "d_shared d_model"),
                                      ("down", "W_out", "d_model d_shared"))},
    }  # fmt: skip
    if has_bias:
        bias = Key("experts", "blocks.{l}.mlp.b_choice")
        mixtures[M + "gate.e_score_correction_bias"] = bias
    behind = {
        name: key and replace(key, in_layer=lambda config, layer: not is_dense(config, layer))
        for name, key in mixtures.items()
    }
    return {**dense, **first, **behind}
