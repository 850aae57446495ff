"""The positions of a key-value cache, against TransformerLens."""

import pytest
import torch

from fastlens.compat.utilities.cache import get_pos_offset
from fastlens.components.kv_cache import TransformerLensKeyValueCache
from fastlens.config import HookedTransformerConfig
from tests.configs import tiny

COMPARED = ["transformer_lens.utilities.cache.get_pos_offset"]


@pytest.mark.tl
def test_as_transformer_lens(theirs):
    tl = theirs("cache")
    cfg = HookedTransformerConfig(**tiny("gpt2"))
    cache = TransformerLensKeyValueCache.init_cache(cfg, "cpu", 2)
    for entry in cache.entries:
        entry.append(torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 4, 8))
    for given, offset in ((None, 0), (cache, 5)):
        # TransformerLens' reads the same fields of its own cache; its annotation is not checked.
        assert get_pos_offset(given, 2) == tl.get_pos_offset(given, 2) == offset
