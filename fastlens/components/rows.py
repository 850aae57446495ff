"""A block's pieces over packed rows, without hooks: what a sweep calls instead of modules.

Rows are positions of many runs behind one another, so no axis of them means what a HookPoint
promises, and none may reach one. The pieces read the same leaves as the modules and call the same
ops; `foreign_part` says where a model's modules are not the ones these pieces stand for.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import parametrize

from fastlens.components.attention import AbstractAttention, Attention, GroupedQueryAttention
from fastlens.components.block import TransformerBlock
from fastlens.components.embed import Embed, PosEmbed, Unembed
from fastlens.components.grouped_router import GroupedRouterMoE
from fastlens.components.latent_attention import LatentAttention
from fastlens.components.layout import from_input_heads, from_output_heads, linear, neighbours
from fastlens.components.mlp import MLP, CanBeUsedAsMLP, GatedMLP
from fastlens.components.moe import ExpertWeight, MoE, MoEGatedMLP
from fastlens.components.norms import (
    LayerNorm,
    LayerNormPre,
    RMSNorm,
    RMSNormPre,
    norm_before,
    norm_behind,
)
from fastlens.components.qk_norm import QK_NORM_CLASSES
from fastlens.components.xielu import XIELU
from fastlens.hooks.point import HookPoint
from fastlens.ops.activations import soft_cap
from fastlens.ops.rotary import rotary

Edit = Callable[[str, Tensor], None]

_PLAIN = {
    *(TransformerBlock, Attention, GroupedQueryAttention, LatentAttention),
    *(MLP, GatedMLP, HookPoint, XIELU),
    *(LayerNorm, LayerNormPre, RMSNorm, RMSNormPre, Embed, PosEmbed, Unembed),
    *(nn.Identity, nn.ModuleList, *QK_NORM_CLASSES),
    *(MoE, GroupedRouterMoE, MoEGatedMLP, ExpertWeight),
}


def normalized(norm: nn.Module, x: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """LayerNorm or RMSNorm of rows; an ``nn.Identity`` gives them back."""
    return x if isinstance(norm, nn.Identity) else norm.unhooked(x)  # type: ignore[operator]


def read(block: Any, name: str, x: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """What attention (``"ln1"``) or the MLP (``"ln2"``) reads of rows of the stream."""
    norm = norm_before(block.cfg, name)
    return x if norm is None else normalized(getattr(block, norm), x)


def written(block: Any, name: str, out: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """What enters the stream of what attention (``"ln1"``) or the MLP (``"ln2"``) gives."""
    norm = norm_behind(block.cfg, name)
    return out if norm is None else normalized(getattr(block, norm), out)


# -- attention -----------------------------------------------------------------------------------


def projected(
    attn: AbstractAttention, x: Float[Tensor, "row d_model"], names: str
) -> Float[Tensor, "row heads d_head"]:
    """Queries, keys or values before QK-norm and rotary, side by side: ``names`` is ``"qkv"``,
    ``"kv"``, ``"q"`` and so on. One product where the weights are neighbours in memory."""
    weights, biases = zip(*(_leaves(attn)[name] for name in names), strict=True)
    joint = neighbours([w.transpose(1, 2) for w in weights])
    bias = None if joint is None else neighbours(biases)
    if joint is not None and bias is not None:
        return linear(x, joint.flatten(0, 1), bias.flatten()).unflatten(-1, bias.shape)
    parts = [
        linear(x, from_input_heads(w), b.reshape(-1)).unflatten(-1, b.shape)
        for w, b in zip(weights, biases, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def projections(
    attn: AbstractAttention, x: Float[Tensor, "row d_model"], names: str
) -> tuple[Tensor, ...]:
    """Queries, keys or values before QK-norm and rotary, each ``[row, heads, width]``."""
    if isinstance(attn, LatentAttention):
        return attn.of_rows(x, names)
    leaves = _leaves(attn)
    return projected(attn, x, names).split([len(leaves[name][1]) for name in names], 1)


def projected_heads(
    attn: AbstractAttention,
    x: Float[Tensor, "entry d_model"],
    name: str,
    heads: Int[Tensor, " entry"],
) -> Float[Tensor, "entry d_head"]:
    """Each entry's query, key or value of its own head."""
    if isinstance(attn, LatentAttention):
        return attn.of_row_heads(x, name, heads)
    weight, bias = _leaves(attn)[name]
    out = x.new_empty(x.shape[0], weight.shape[2])
    for head in heads.unique().tolist():
        mine = (heads == head).nonzero()[:, 0]
        out[mine] = linear(x[mine], weight[head].t(), bias[head])
    return out


def _leaves(attn: AbstractAttention) -> dict[str, tuple[Tensor, Tensor]]:
    w_k, w_v, b_k, b_v = attn.key_value_leaves()
    return {"q": (attn.W_Q, attn.b_Q), "k": (w_k, b_k), "v": (w_v, b_v)}


def finished_qkv(
    attn: AbstractAttention, q: Tensor, k: Tensor, v: Tensor, positions: Int[Tensor, " row"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw queries, keys, values ``[row, head, d_head]`` after QK-norm, clipping and rotary.

    Args:
        positions: Each row's position as rotary counts it (left padding shifts it).
    """
    q_norm, k_norm = attn.q_norm, attn.k_norm
    if q_norm is not None and k_norm is not None and not attn.norms_behind_rotary:
        q, k = q_norm.of_rows(q), k_norm.of_rows(k)
    clip = attn.cfg.clip_qkv
    if clip is not None:
        q, k, v = (x.clamp(-clip, clip) for x in (q, k, v))
    # Not by what the tables hold: a state dict may have brought those of a layer that rotates.
    if attn.rotates:
        attn.grow_tables(int(positions.max()) + 1)
        cos, sin = attn.rotary_cos[positions][None], attn.rotary_sin[positions][None]
        if cos.dtype != q.dtype:
            cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        adjacent = attn.cfg.rotary_adjacent_pairs
        q, k = (rotary(x[None], cos, sin, adjacent)[0] for x in (q, k))
    if q_norm is not None and k_norm is not None and attn.norms_behind_rotary:
        q, k = q_norm.of_rows(q), k_norm.of_rows(k)
    return q, k, v


def output_of_heads(
    attn: AbstractAttention, z: Float[Tensor, "row head d_head"]
) -> Float[Tensor, "row d_model"]:
    """Head outputs projected and summed, with the bias."""
    return linear(z.flatten(1), from_output_heads(attn.W_O), attn.b_O)


def result_of_heads(
    attn: AbstractAttention, z: Float[Tensor, "entry d_head"], heads: Int[Tensor, " entry"]
) -> Float[Tensor, "entry d_model"]:
    """What each entry's own head writes, ``z @ W_O[head]``."""
    out = z.new_empty(z.shape[0], attn.W_O.shape[2])
    for head in heads.unique().tolist():
        mine = (heads == head).nonzero()[:, 0]
        out[mine] = z[mine] @ attn.W_O[head]
    return out


# -- MLP -----------------------------------------------------------------------------------------


def mlp_output(
    mlp: CanBeUsedAsMLP, x: Float[Tensor, "row d_model"], edit: Edit | None = None
) -> Float[Tensor, "row d_model"]:
    """What an `MLP`, `GatedMLP` or `MoE` writes for rows of its normalised input.

    Args:
        edit: ``edit(site, activation)`` may write into the activation at ``mlp_pre``,
            ``mlp_pre_linear``, ``mlp_mid`` and ``mlp_post``, in the order of the forward. A
            mixture of experts has no such sites: its rows go to experts of their own.
    """
    if isinstance(mlp, MoE):
        return mlp.unhooked(x)
    edit = edit or _leave
    if isinstance(mlp, GatedMLP):
        joint = neighbours([mlp.W_gate.t(), mlp.W_in.t()])
        if joint is not None:
            pre, up = linear(x, joint).chunk(2, -1)
        else:
            pre, up = linear(x, mlp.W_gate.t()), linear(x, mlp.W_in.t())
        edit("mlp_pre", pre)
        if not mlp.cfg.is_layer_norm_activation():
            edit("mlp_pre_linear", up)
            post = torch.addcmul(mlp.b_in, mlp.act_fn(pre), up)
        else:
            post = _after_activation(mlp, pre, edit)
    else:
        assert isinstance(mlp, MLP)
        pre = linear(x, mlp.W_in.t(), mlp.b_in)
        edit("mlp_pre", pre)
        post = _after_activation(mlp, pre, edit)
    edit("mlp_post", post)
    return linear(post, mlp.W_out.t(), mlp.b_out)


def _after_activation(mlp: CanBeUsedAsMLP, pre: Tensor, edit: Edit) -> Tensor:
    post = mlp.act_fn(pre)
    if not mlp.cfg.is_layer_norm_activation():
        return post
    edit("mlp_mid", post)
    assert mlp.ln is not None
    return normalized(mlp.ln, post)


def _leave(site: str, activation: Tensor) -> None:
    """Edit nothing."""


# -- unembedding ---------------------------------------------------------------------------------


def logits_of(
    unembed: Unembed, x: Float[Tensor, "row d_model"], columns: Int[Tensor, " column"] | None
) -> Float[Tensor, "row column"]:
    """Logits of rows after the final norm, for some vocabulary columns or (None) all of them."""
    some = None if columns is None or unembed.columns is None else unembed.columns(columns)
    if some is not None:
        weight, bias = some
    else:
        weight, bias = unembed.W_U.t(), unembed.b_U
        if columns is not None:
            columns = columns.to(weight.device)
            weight, bias = weight[columns], bias[columns]
    return soft_cap(linear(x, weight, bias), unembed.cfg.output_logits_soft_cap)


# -- whether these pieces stand for the model's modules ------------------------------------------


# What our classes define, as it was when they were: a class, too, can have a method replaced.
_DEFINED = {
    (base, name): defined
    for kind in _PLAIN
    for base in kind.__mro__
    if base.__module__.startswith("fastlens.")
    for name, defined in vars(base).items()
    if callable(defined) or isinstance(defined, property)
}


@functools.cache
def methods_of(kind: type) -> frozenset[str]:
    """Names that an instance of a class must not have of its own, or a method is replaced."""
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))


def replaced_method() -> str | None:
    """The first method of our classes that is not as it was defined, or None."""
    for (kind, name), defined in _DEFINED.items():
        if vars(kind).get(name) is not defined:
            return f"{kind.__name__}.{name}"
    return None


def foreign_part(root: nn.Module) -> str | None:
    """The first module below ``root`` that is not one of ours, or has a method replaced; or None.

    A parametrized module counts as ours: its leaves are read by name like any other.
    """
    replaced = replaced_method()
    if replaced is not None:
        return f"{replaced} was replaced"
    waiting = list(_children("", root))
    while waiting:
        name, module = waiting.pop()
        kind = type(module)
        if kind is HookPoint:
            if "forward" in module.__dict__:
                return f"{name}.forward was replaced"
            continue
        is_parametrized = parametrize.is_parametrized(module)
        kind = kind.__mro__[1] if is_parametrized else kind
        # An identity stands for a norm; as an MLP or attention it is a user's.
        is_other = kind is nn.Identity and not name.rsplit(".", 1)[-1].startswith("ln")
        if kind not in _PLAIN or is_other:
            return f"{name} is a {kind.__name__}"
        own = methods_of(kind) & module.__dict__.keys()
        if own:
            return f"{name}.{min(own)} was replaced"
        waiting += _children(f"{name}.", module)
    return None


def _children(start: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():
        # What parametrizations compute is read as the module's leaves.
        if child is not None and name != "parametrizations":
            yield start + name, child
