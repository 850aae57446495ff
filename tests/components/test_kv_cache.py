"""The KV cache: what is kept, in which shape, and that a frozen one keeps nothing."""

import torch

from fastlens.components.kv_cache import TransformerLensKeyValueCache
from fastlens.config import HookedTransformerConfig
from tests.configs import tiny


def cache(**changes):
    cfg = HookedTransformerConfig(**tiny("llama", **changes))
    return TransformerLensKeyValueCache.init_cache(cfg, "cpu", batch_size=2)


def test_entries_start_empty_at_the_kv_heads_in_the_models_dtype():
    empty = cache(dtype=torch.bfloat16)
    assert len(empty.entries) == 3
    assert empty[0].past_keys.shape == (2, 0, 2, 8) and empty[0].past_keys.dtype == torch.bfloat16
    assert cache(ungroup_grouped_query_attention=True)[0].past_keys.shape == (2, 0, 4, 8)


def test_append_keeps_unless_frozen():
    kept, new = cache(), torch.randn(2, 3, 2, 8)
    keys, _ = kept[1].append(new, new)
    assert keys.shape[1] == 3 and kept[1].past_values.shape[1] == 3
    kept.append_attention_mask(torch.ones(2, 3, dtype=torch.int))
    kept.freeze()
    keys, _ = kept[1].append(new, new)
    mask = kept.append_attention_mask(torch.ones(2, 3, dtype=torch.int))
    assert keys.shape[1] == 6 and kept[1].past_keys.shape[1] == 3
    assert mask.shape == (2, 6) and kept.previous_attention_mask.shape == (2, 3)
    kept.unfreeze()
    kept[1].append(new, new)
    assert kept[1].past_keys.shape[1] == 6


def test_what_is_held_follows_its_layer():
    cfg = HookedTransformerConfig(**tiny("gpt2"))
    cache = TransformerLensKeyValueCache.init_cache(cfg, "cpu", 1)
    new = torch.ones(1, 2, cfg.n_heads, cfg.d_head, device="meta")
    cache.freeze()
    keys, values = cache[0].append(new, new)
    assert keys.is_meta and values.is_meta and keys.shape[1] == 2
    # The empty past is there now, frozen or not.
    assert cache[0].past_keys.is_meta and cache[0].past_keys.shape[1] == 0
    assert not cache[1].past_keys.is_meta
