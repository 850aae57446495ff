"""A plain forward and `run_with_cache`, beside Hugging Face's SDPA forward of the same weights.

    pytest benchmarks/test_forward.py --benchmark-only

Random weights, batch 1, float32. To see one's own change between two commits; the figures of
README are `forward.py`'s, which alternates.
"""

import pytest
import torch

from benchmarks.forward import HF, OURS, SHAPES, TINY, contenders
from benchmarks.forward import OURS_CACHE as RESIDUALS
from benchmarks.sweep_cases import Pair, of_shape

EVERYTHING = "fastlens, everything cached"


@pytest.fixture(scope="module", params=[0, 1], ids=["gpt2", "llama"])
def pair(request: pytest.FixtureRequest, only_checked: bool) -> Pair:
    """One model in both libraries."""
    return of_shape((TINY if only_checked else SHAPES)[request.param])


@pytest.mark.parametrize("tokens", [16, 128])
@pytest.mark.parametrize("who", [HF, OURS, RESIDUALS, EVERYTHING])
def test_forward(time_checked, only_checked, pair, who, tokens):
    """All logits, and the places that the name says."""
    hf, ours = pair
    prompt = torch.arange(min(tokens, 60) if only_checked else tokens)[None]
    runs = contenders(hf, ours, None, prompt)
    runs[EVERYTHING] = lambda: ours.run_with_cache(prompt)
    with torch.no_grad():
        expected = runs[HF]()
    time_checked(runs[who], expected, f"{hf.config.model_type}, {tokens} tokens")
