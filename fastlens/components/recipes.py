"""How a block's activations follow from one another: what a cache need not store."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fastlens.components.attention import AbstractAttention, Attention, GroupedQueryAttention
from fastlens.components.bert_block import BertBlock
from fastlens.components.bidirectional_attention import BidirectionalAttention
from fastlens.components.block import TransformerBlock
from fastlens.components.latent_attention import LatentAttention
from fastlens.components.mlp import MLP, GatedMLP
from fastlens.components.norms import LayerNorm, LayerNormPre, RMSNorm, RMSNormPre, normalized_by
from fastlens.components.rows import methods_of
from fastlens.components.t5_attention import T5Attention
from fastlens.ops.activations import SUPPORTED_ACTIVATIONS

NORMS = (LayerNorm, LayerNormPre, RMSNorm, RMSNormPre)
# As they were defined: a class, too, can have its method replaced.
_FORWARDS = {
    kind: kind.forward
    for kind in (
        *NORMS,
        MLP,
        GatedMLP,
        TransformerBlock,
        BertBlock,
        Attention,
        GroupedQueryAttention,
        LatentAttention,
        BidirectionalAttention,
        T5Attention,
    )
}


_FUNCTIONS = set(SUPPORTED_ACTIVATIONS.values())


class Recipe(NamedTuple):
    """An activation as a formula of others that fire before it, exact to the last bit.

    Attributes:
        sources: Their hook names, in the formula's order.
        formula: Of tensors only: no weights, which may be edited later. Small vectors such as a
            bias are copied into it.
    """

    sources: tuple[str, ...]
    formula: Callable[..., Tensor]


def recipes_of(block: nn.Module, prefix: str) -> dict[str, Recipe]:
    """What follows in this block, by hook name; nothing for a block of another kind.

    Args:
        prefix: Of the block's hook names, such as ``"blocks.0."``.
    """
    if not is_ours(block) or type(block) not in _TABLES:
        return {}
    found = _TABLES[type(block)](block)
    return {
        prefix + place: Recipe(tuple(prefix + source for source in recipe.sources), recipe.formula)
        for place, recipe in found.items()
    }


def _of_transformer_block(block: Any) -> dict[str, Recipe]:
    cfg = block.cfg
    found = {}
    reads = not cfg.norm_after_sublayer
    if reads and not (cfg.use_attn_in or cfg.use_split_qkv_input):
        found |= norm_recipe(block.ln1, "ln1", "hook_resid_pre")
    if cfg.attn_only:
        return found
    into_mlp = "hook_resid_pre"
    if not cfg.parallel_attn_mlp:
        into_mlp = "hook_resid_mid"
        found[into_mlp] = Recipe(("hook_resid_pre", "hook_attn_out"), torch.add)
    if cfg.use_hook_mlp_in:
        into_mlp = "hook_mlp_in"
    if reads:
        found |= norm_recipe(block.ln2, "ln2", into_mlp)
    return found | _of_mlp(block.mlp)


def _of_bert_block(block: Any) -> dict[str, Recipe]:
    into_norm = "hook_mlp_in" if block.cfg.use_hook_mlp_in else "hook_resid_mid"
    return {
        "hook_resid_mid": Recipe(("hook_resid_pre", "hook_attn_out"), torch.add),
        **norm_recipe(block.ln1, "ln1", into_norm),
        **norm_recipe(block.ln2, "ln2", "hook_resid_post"),
        **_of_mlp(block.mlp),
    }


_TABLES: Mapping[type, Callable[[Any], dict[str, Recipe]]] = {
    TransformerBlock: _of_transformer_block,
    BertBlock: _of_bert_block,
}


def norm_recipe(norm: Any, name: str, source: str) -> dict[str, Recipe]:
    """The normalised input of a norm, from what it reads and its scale."""
    if not isinstance(norm, NORMS) or not is_ours(norm):
        return {}
    formula = partial(normalized_by, centres=norm.centres, dtype=norm.cfg.dtype)
    return {f"{name}.hook_normalized": Recipe((source, f"{name}.hook_scale"), formula)}


def _of_mlp(mlp: Any) -> dict[str, Recipe]:
    # A function of somebody else's may have state, draw numbers, or write to what it is given.
    if type(mlp) not in (MLP, GatedMLP) or not is_ours(mlp) or mlp.act_fn not in _FUNCTIONS:
        return {}
    if mlp.cfg.is_layer_norm_activation():
        return {"mlp.hook_mid": Recipe(("mlp.hook_pre",), mlp.act_fn)}
    if type(mlp) is MLP:
        return {"mlp.hook_post": Recipe(("mlp.hook_pre",), mlp.act_fn)}
    if type(mlp) is GatedMLP:
        bias = mlp.b_in.detach().clone()
        formula = partial(_gated, act_fn=mlp.act_fn, bias=bias)
        return {"mlp.hook_post": Recipe(("mlp.hook_pre", "mlp.hook_pre_linear"), formula)}
    return {}


def _gated(pre: Tensor, linear: Tensor, *, act_fn: Callable[..., Tensor], bias: Tensor) -> Tensor:
    return torch.addcmul(bias.to(pre.device), act_fn(pre), linear)


def is_ours(module: nn.Module) -> bool:
    """Whether a module computes what its class says: none of its steps replaced, no hook on it."""
    kind = type(module)
    state = module.__dict__
    return (
        kind in _FORWARDS
        and kind.forward is _FORWARDS[kind]
        and not methods_of(kind) & state.keys()
        and not (state["_forward_hooks"] or state["_forward_pre_hooks"])
        and not _has_any_global_hook()
    )


def fused_attention(layer: nn.Module) -> AbstractAttention | None:
    """The layer itself, if it is ours and its scores and pattern are not looked at now."""
    if isinstance(layer, AbstractAttention) and type(layer) in _FORWARDS and is_ours(layer):
        return layer if layer.is_fused else None
    return None


def captured(names: Sequence[str], recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The recipes of places that are captured together with their sources."""
    wanted = set(names)
    return {
        name: recipes[name]
        for name in names
        if name in recipes and wanted.issuperset(recipes[name].sources)
    }
