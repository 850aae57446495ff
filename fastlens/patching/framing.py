"""From a model and two prompts to what planner and wave need: masks, positions, differences."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fastlens.components.rotary_tables import table_rows
from fastlens.patching.frame import Frame, NullTest
from fastlens.patching.model import PatchableModel
from fastlens.patching.sites import n_neurons
from fastlens.patching.wave import Stem
from fastlens.tokens import get_offset_position_ids


def stem_of(
    model: PatchableModel,
    base: Int[Tensor, "batch pos"],
    other: Int[Tensor, "batch pos"] | None,
    mask: Int[Tensor, "batch pos"] | None,
) -> tuple[Stem, list[int]]:
    """Both prompts at the embedding, and each pair's first difference (the length if none)."""
    given = {} if mask is None else {"attention_mask": mask}
    parts = [
        model.input_to_embed(tokens, **given) for tokens in (base, other) if tokens is not None
    ]
    residual = torch.cat([part[0] for part in parts])
    shortformer = None if parts[0][2] is None else torch.cat([part[2] for part in parts])
    masks = [
        torch.ones_like(base) if part[3] is None else part[3].to(base.device) for part in parts
    ]
    positions = torch.cat([get_offset_position_ids(0, one) for one in masks])
    key_mask = None
    if any(part[3] is not None for part in parts):
        key_mask = torch.cat(masks).bool()
    if key_mask is None:
        positions = torch.arange(base.shape[1], device=base.device).expand(positions.shape)
    lengths = torch.cat([one.sum(1) for one in masks])
    rows = table_rows(model.cfg, positions, lengths)
    stem = Stem(residual, shortformer, key_mask, rows)
    if other is None:
        return stem, [base.shape[1]] * len(base)
    # With LongRoPE the length of a text, so what is behind them, decides how its tokens are turned.
    of_base, of_other = rows.chunk(2)
    differs = (base != other) | (masks[0] != masks[1]) | (of_base != of_other)
    first = torch.where(differs.any(1), differs.int().argmax(1), base.shape[1])
    return stem, first.tolist()


def frame_of(
    model: PatchableModel,
    first_difference: Sequence[int],
    needed: Sequence[int],
    columns: int,
    n_pos: int,
    *,
    has_source: bool,
    keeps_later: bool,
    nulls: Mapping[int, NullTest] | None = None,
    caches: Collection[int] = (),
) -> Frame:
    """The planner's view.

    Args:
        needed: Positions whose logits are read; rising.
        columns: How many vocabulary columns of them.
        n_pos: Tokens of the prompts.
        keeps_later: Whether positions behind the last needed one may matter after all: a given
            pattern can look ahead.
        nulls, caches: As in `Frame`.
    """
    cfg: Any = model.cfg
    is_causal = cfg.attention_dir == "causal"
    kept = n_pos if keeps_later or not is_causal else max(needed) + 1
    first = [min(one, kept) for one in first_difference]
    if not is_causal:
        # Every row sees every other: one difference makes all rows differ.
        first = [0 if one < n_pos else kept for one in first_difference]
    n_kv = cfg.n_key_value_heads or cfg.n_heads
    if cfg.ungroup_grouped_query_attention:
        n_kv = cfg.n_heads
    n_experts = getattr(cfg, "num_experts", None) or 0
    return Frame(
        n_layers=cfg.n_layers,
        n_pos=kept,
        first_difference=tuple(first),
        needed=tuple(needed),
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        n_kv_heads=n_kv,
        d_head=cfg.d_head,
        d_mlp=0 if cfg.attn_only else n_neurons(cfg),
        columns=columns,
        is_causal=is_causal,
        is_parallel=cfg.parallel_attn_mlp and not cfg.attn_only,
        is_attn_only=cfg.attn_only,
        is_gated=cfg.gated_mlp or n_experts > 0,
        has_source=has_source,
        nulls=nulls or {},
        caches=frozenset(caches),
        itemsize=cfg.dtype.itemsize,
        is_rotary=cfg.positional_embedding_type == "rotary",
        experts_width=_experts_width(cfg) if n_experts else 0,
        n_experts=n_experts,
        d_shared=getattr(cfg, "d_shared_expert", None) or 0,
    )


def _experts_width(cfg: Any) -> int:
    # TransformerLens' config knows no shared expert.
    routed = cfg.experts_per_token * cfg.d_mlp + (getattr(cfg, "d_shared_expert", None) or 0)
    return max(routed, getattr(cfg, "d_mlp_dense", None) or 0)
