"""`BidirectionalAttention`: rotary attention of encoders, with windows that look both ways."""

from typing import Any

import torch
from torch import Tensor

from fastlens.components.attended import sum_of
from fastlens.components.attention import Attention
from fastlens.config import HookedTransformerConfig
from fastlens.kernels.masks import AttentionRule

# A window is computed so many query rows at a time, each with a mask of its own.
ROWS_PER_BLOCK = 512


class BidirectionalAttention(Attention):
    """Attention of an encoder: every token sees those before and after it.

    A local layer sees keys less than ``window_size`` positions away, on both sides. Positions are
    columns of the batch whatever the mask, as in Hugging Face's encoders: rotary attention depends
    on distances alone, so padding changes nothing.

    Args:
        frequencies: Angles a position of each pair of rotary channels, where a checkpoint states
            them; by default those of the config.

    Cost: a local layer takes memory and time in proportion to the text's length times the window.
    Where scores or pattern are looked at, they are made whole.
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any],
        attn_type: str = "global",
        layer_id: int | None = None,
    ):
        self.frequencies: Tensor | None = None
        super().__init__(cfg, attn_type, layer_id)

    def set_frequencies(self, frequencies: Tensor) -> None:
        """Take the rotary frequencies that a checkpoint states, ``[d_head / 2]``."""
        self.frequencies = frequencies.detach().cpu().clone()
        sin, cos = self._tables(self.rotary_cos.shape[0], self.rotary_cos.dtype)
        self.rotary_sin, self.rotary_cos = (
            table.to(self.rotary_cos.device) for table in (sin, cos)
        )

    @property
    def rule(self) -> AttentionRule:
        """Without a window: a rule's hides keys on one side only. See `_attended`."""
        return super().rule._replace(window=None)

    def _tables(self, n_ctx: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.frequencies is None:
            return super()._tables(n_ctx, dtype)
        precise = torch.promote_types(torch.float32, dtype)
        angles = torch.arange(n_ctx, dtype=precise)[:, None] * self.frequencies.to(precise)
        angles = torch.cat([angles, angles], 1)
        return angles.sin().to(dtype), angles.cos().to(dtype)

    def _rotated(
        self, q: Tensor, k: Tensor, offset: int, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return super()._rotated(q, k, offset, None)

    def _heads_looked_at(self) -> tuple[int, ...] | None:
        heads = super()._heads_looked_at()
        # A mask of all pairs is no more than what is looked at.
        return None if self.attn_type == "local" and (heads or self.tap is not None) else heads

    def _attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offset: int,
        attention_mask: Tensor | None,
        added: list[Tensor],
    ) -> Tensor:
        n_queries, n_keys, window = q.shape[1], k.shape[1], self.cfg.window_size
        if self.attn_type == "global" or window is None or max(n_queries, n_keys) <= window:
            return super()._attended(q, k, v, offset, attention_mask, added)
        if self._heads_looked_at() is None:
            added = [*added, self._window(q, range(n_queries), range(n_keys), offset)]
            return super()._attended(q, k, v, offset, attention_mask, added)
        key_mask = None if attention_mask is None else attention_mask.bool()
        parts = []
        for start in range(0, n_queries, ROWS_PER_BLOCK):
            rows = range(start, min(n_queries, start + ROWS_PER_BLOCK))
            first = max(0, offset + rows.start - window + 1)
            keys = range(min(first, n_keys), min(n_keys, offset + rows.stop + window - 1))
            here, seen = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
            biases = [bias[..., seen] for bias in added]
            biases = [bias if bias.shape[2] == 1 else bias[:, :, here] for bias in biases]
            bias = sum_of([*biases, self._window(q, rows, keys, offset)], len(rows))
            mask = None if key_mask is None else key_mask[:, seen]
            inputs = q[:, here], k[:, seen], v[:, seen]
            parts.append(self._fused(*inputs, self.rule, 0, mask, bias))
        return self.hook_z(parts[0] if len(parts) == 1 else torch.cat(parts, 1))

    def _window(self, like: Tensor, rows: range, keys: range, offset: int) -> Tensor:
        """Minus infinity for keys outside the window of each row, else zero."""
        assert self.cfg.window_size is not None
        device = like.device
        queries = torch.arange(offset + rows.start, offset + rows.stop, device=device)
        columns = torch.arange(keys.start, keys.stop, device=device)
        far = (columns[None, :] - queries[:, None]).abs() >= self.cfg.window_size
        bias = torch.zeros(far.shape, dtype=like.dtype, device=device)
        return bias.masked_fill(far, -torch.inf)[None, None]
