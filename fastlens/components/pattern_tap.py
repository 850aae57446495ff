"""Cache entries of a layer's scores and pattern, made of its queries and keys."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlens.components.attended import Attended
from fastlens.hooks.capture import (
    CaptureSpec,
    capture,
    cast_to,
    check_heads,
    fill,
    keep,
    owned,
    without_batch,
)
from fastlens.hooks.derived import CacheDict, Derived, Rows, Stored
from fastlens.hooks.point import HookPoint
from fastlens.ops.attention_pattern import attention_pattern
from fastlens.ops.attention_sinks import pattern_from


class PatternTap:
    """Puts what a cache is to have of one layer's scores and pattern there; attention stays fused.

    Whole entries are computed when they are read, if keeping queries and keys costs less than
    keeping the entries. Chosen heads and positions are computed at once, and nothing else is.

    Args:
        cache: Where entries go; in a plain dict all of them are computed at once.
        points: ``hook_attn_scores``, ``hook_pattern`` or both, by hook name, in that order.
        sources: Hook names under which queries and keys, as attention reads them, are captured
            anyway; None where no hook point sees them.
        lazy: Entries may be computed when they are read.
    """

    def __init__(
        self,
        cache: dict[str, Tensor],
        points: dict[str, HookPoint],
        spec: CaptureSpec,
        sources: tuple[str, str] | None,
        lazy: bool = True,
    ):
        self.cache = cache
        self.points = points
        self.spec = spec
        self.sources = sources
        self.lazy = lazy

    def fused(self, attended: Attended) -> None:
        """Entries from queries and keys."""
        cache = self.cache if self.lazy and isinstance(self.cache, CacheDict) else None
        # Writes to inference tensors go unnoticed.
        lazy = self.spec.keeps_all and not attended.q.is_inference()
        for name, point in self.points.items():
            if cache is not None and lazy and self._pays(cache, attended):
                cache.repeated = cache.repeated or name in cache
                self._put_derived(cache, name, point, attended)
            else:
                fill(self.cache, name, self._computed(name, point, attended))

    def materialised(self, scores: Tensor, pattern: Tensor) -> None:
        """Entries from what attention made itself."""
        for name, point in self.points.items():
            made = scores if name.endswith("hook_attn_scores") else pattern
            fill(self.cache, name, capture(made, point, self.spec))

    def _pays(self, cache: CacheDict, attended: Attended) -> bool:
        """Whether queries and keys take less memory than the entries they stand for."""
        q, k = attended.q, attended.k
        if self._captured(cache, q, k) is not None:
            return True
        batch, n_queries, n_heads = q.shape[:3]
        entry = batch * n_heads * n_queries * k.shape[1]
        bias = attended.bias
        added = 0 if bias is None else bias.untyped_storage().nbytes()
        kept = q.dtype if self.spec.dtype is None else self.spec.dtype
        return q.nbytes + k.nbytes + added < entry * len(self.points) * kept.itemsize

    def _captured(self, cache: CacheDict, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
        """Queries and keys as the cache holds them, with a batch axis; None if it does not."""
        if self.sources is None:
            return None
        found = [cache.entry(name) for name in self.sources if name in cache]
        tensors = [entry for entry in found if isinstance(entry, Tensor)]
        if len(tensors) < 2:
            return None
        q_kept, k_kept = (t[None] if t.ndim == 3 else t for t in tensors)
        # With a KV cache only the new keys pass a hook.
        if (q_kept.shape, k_kept.shape) != (q.shape, k.shape) or cache.repeated:
            return None
        # Moved elsewhere, they are copies of what passed; here they must be what attention read.
        same = (q_kept.data_ptr(), k_kept.data_ptr()) == (q.data_ptr(), k.data_ptr())
        # But not if they were rounded.
        moved = q_kept.device != q.device and self.spec.dtype is None
        return (q_kept, k_kept) if same or moved else None

    def _put_derived(
        self, cache: CacheDict, name: str, point: HookPoint, attended: Attended
    ) -> None:
        q, k = self._captured(cache, attended.q, attended.k) or (attended.q, attended.k)
        device = q.device if self.spec.device is None else torch.device(self.spec.device)
        q, k = q.to(device), k.to(device)
        dtype = q.dtype
        if self.spec.dtype is not None:
            # Packing would only lose: nothing is stored.
            dtype = q.dtype if self.spec.dtype == torch.int8 else self.spec.dtype
            q, k = (kept for kept in map(owned, (q, k)) if isinstance(kept, Tensor))
        rule, offset = attended.rule, attended.offset
        bias, key_mask = attended.bias, attended.key_mask
        named = self.sources or (f"{name} (queries)", f"{name} (keys)")
        sources: dict[str, Tensor] = dict(zip(named, (q, k), strict=True))
        if bias is not None:
            sources["what was added to the scores"] = bias.to(device)
        if key_mask is not None:
            # It may be the caller's own.
            sources["the padding"] = key_mask.clone().to(device)
        # A leaf may be edited later.
        sinks = None if attended.sinks is None else attended.sinks.clone().to(device)

        def values(
            sources: Sequence[Tensor], heads: Sequence[int] | None = None, rows: Rows = None
        ) -> Tensor:
            attended = Attended(
                *(sources[0], sources[1], rule, offset),
                None if key_mask is None else sources[-1],
                None if bias is None else sources[2],
                sinks,
            )
            found = _of_rows(attended, heads, rows, name.endswith("hook_attn_scores"))
            return cast_to(without_batch(found, point, self.spec), dtype)

        def whole(*sources: Tensor) -> Tensor:
            return values(sources)

        def part(*arguments: Any) -> Tensor:
            *sources, heads, rows = arguments
            return values(sources, heads, rows)

        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        shape = shape[1:] if self.spec.remove_batch_dim else shape
        cache.put(name, Derived(name, whole, sources, shape, dtype, part))

    def _computed(self, name: str, point: HookPoint, attended: Attended) -> Stored:
        spec, q = self.spec, attended.q
        heads = spec.heads_at(point)
        if heads is not None:
            check_heads(heads, q.shape[2], name)
        rows = None
        if spec.pos_slice.mode != "identity":
            # An int that is out of range is an error in attention_pattern.
            rows = torch.from_numpy(spec.pos_slice.indices(q.shape[1]).copy())
        with torch.no_grad():
            found = _of_rows(attended, heads, rows, name.endswith("hook_attn_scores"))
        if spec.pos_slice.mode == "int":
            found = found.squeeze(2)
        return keep(without_batch(found, point, spec), spec)


def _of_rows(
    attended: Attended, heads: Sequence[int] | None, rows: Rows, wants_scores: bool
) -> Tensor:
    """Scores or pattern of chosen heads and query rows."""
    sinks = attended.sinks
    found = attention_pattern(
        attended.q,
        attended.k,
        attended.rule,
        heads,
        rows,
        offset=attended.offset,
        key_mask=attended.key_mask,
        bias=attended.bias,
        scores=wants_scores or sinks is not None,
    )
    if wants_scores or sinks is None:
        return found
    return pattern_from(found, (sinks if heads is None else sinks[list(heads)])[:, None])
