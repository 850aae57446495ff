"""Positions that a key-value cache holds."""

from fastlens.components.kv_cache import TransformerLensKeyValueCache

__all__ = ["TransformerLensKeyValueCache", "get_pos_offset"]


def get_pos_offset(past_kv_cache: TransformerLensKeyValueCache | None, batch_size: int) -> int:
    """How many positions are in the cache; 0 without one. ``batch_size`` is not looked at."""
    return 0 if past_kv_cache is None else past_kv_cache.entries[0].past_keys.shape[1]
