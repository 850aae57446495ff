"""What the benchmarks hand to other libraries is the same model, patched at the same places."""

import pytest
import torch

from benchmarks.forward import TINY
from benchmarks.peers import loops, smollm2, stacked
from benchmarks.sweep_cases import of_shape


def test_the_twin_has_the_weights():
    hf, ours = of_shape(TINY[1])
    twin = smollm2.hugging_face_twin(ours)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(twin(tokens).logits, hf(tokens).logits, atol=2e-6, rtol=0)
    assert not twin.training and twin.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("shape", TINY, ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    ("site", "by", "index"),
    [
        ("resid_pre", ("layer", "pos"), (1, 3)),
        ("z", ("layer", "head"), (0, 2)),
        ("z", ("layer", "pos", "head"), (1, 5, 3)),
    ],
)
def test_one_patch_in_both_libraries(shape, site, by, index):
    hf, ours = of_shape(shape)
    clean = torch.arange(6)[None]
    asked = (site, clean, clean + 40, loops.difference_of(11, 22))
    stacks = stacked.stacks_of([index, (0, *index[1:])], by, 2)
    theirs, mine = (
        stacked.hugging_face(hf, *asked, stacks),
        stacked.fastlens_hooks(ours, *asked, stacks),
    )
    torch.testing.assert_close(theirs, mine, atol=2e-6, rtol=0)
    with torch.no_grad():
        assert (theirs - asked[3](hf(clean + 40).logits)).abs().min() > 1e-5


def test_the_difference_is_the_last_positions():
    logits = torch.arange(12.0).view(1, 2, 6) ** 2
    assert loops.difference_of(5, 1)(logits) == 121.0 - 49.0
