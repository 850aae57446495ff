"""A tiny model that reads text."""

import functools

from fastlens import HookedTransformer
from tests.configs import tiny
from tests.fixtures_tokens import gpt2_like
from tests.models import randomise


@functools.cache
def text_model() -> HookedTransformer:
    """GPT-2-like, with a byte-level BPE tokenizer that knows a few words. Do not change it."""
    model = HookedTransformer(tiny("gpt2", d_vocab=300), tokenizer=gpt2_like())
    randomise(model)
    return model.eval()
