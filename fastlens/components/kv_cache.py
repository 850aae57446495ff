"""Keys and values of earlier tokens, so that a continuation need not run them again."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.config import HookedTransformerConfig


@dataclass
class TransformerLensKeyValueCacheEntry:
    """One layer's keys (before rotary) and values, at the KV heads of grouped attention."""

    past_keys: Float[Tensor, "batch pos kv_head d_head"]
    past_values: Float[Tensor, "batch pos kv_head d_value"]
    frozen: bool = False

    @classmethod
    def init_cache_entry(
        cls,
        cfg: HookedTransformerConfig,
        device: torch.device | str | None,
        batch_size: int = 1,
    ) -> "TransformerLensKeyValueCacheEntry":
        """An entry of no positions, in the model's dtype."""
        heads = cfg.n_heads if cfg.n_key_value_heads is None else cfg.n_key_value_heads
        if cfg.ungroup_grouped_query_attention:
            heads = cfg.n_heads
        shape = (batch_size, 0, heads)
        return cls(
            torch.empty(*shape, cfg.d_head, device=device, dtype=cfg.dtype),
            torch.empty(*shape, cfg.d_value or cfg.d_head, device=device, dtype=cfg.dtype),
        )

    def append(
        self,
        new_keys: Float[Tensor, "batch new_pos kv_head d_head"],
        new_values: Float[Tensor, "batch new_pos kv_head d_value"],
    ) -> tuple[Tensor, Tensor]:
        """All keys and values, past and new; they are kept unless the entry is frozen.

        Past ones move to the device of the new ones, which is their layer's, and stay there.
        """
        if self.past_keys.device != new_keys.device:
            self.past_keys = self.past_keys.to(new_keys.device)
            self.past_values = self.past_values.to(new_keys.device)
        keys = torch.cat([self.past_keys, new_keys], 1)
        values = torch.cat([self.past_values, new_values], 1)
        if not self.frozen:
            self.past_keys, self.past_values = keys, values
        return keys, values


@dataclass
class TransformerLensKeyValueCache:
    """The entries of all layers and the padding mask of what they hold.

    Freeze it to run many continuations of one prefix without adding them.
    """

    entries: list[TransformerLensKeyValueCacheEntry]
    previous_attention_mask: Int[Tensor, "batch pos"]
    frozen: bool = False

    @classmethod
    def init_cache(
        cls,
        cfg: HookedTransformerConfig,
        device: torch.device | str | None,
        batch_size: int = 1,
    ) -> "TransformerLensKeyValueCache":
        """An empty cache for a model of this config."""
        entry = TransformerLensKeyValueCacheEntry.init_cache_entry
        return cls(
            [entry(cfg, device, batch_size) for _ in range(cfg.n_layers)],
            torch.empty((batch_size, 0), device=device, dtype=torch.int),
        )

    def freeze(self) -> None:
        """Stop keeping what forwards append."""
        self._set_frozen(True)

    def unfreeze(self) -> None:
        """Keep again what forwards append."""
        self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        self.frozen = frozen
        for entry in self.entries:
            entry.frozen = frozen

    def append_attention_mask(
        self, attention_mask: Int[Tensor, "batch new_pos"]
    ) -> Int[Tensor, "batch all_pos"]:
        """The mask of past and new tokens; it is kept unless the cache is frozen."""
        previous = self.previous_attention_mask
        updated = torch.cat([previous, attention_mask.to(previous.device)], -1)
        if not self.frozen:
            self.previous_attention_mask = updated
        return updated

    def __getitem__(self, idx: int) -> TransformerLensKeyValueCacheEntry:
        return self.entries[idx]
