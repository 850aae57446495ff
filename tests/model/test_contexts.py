"""Long texts: contexts are the model's own, tables grow, and no mask is as large as a pattern."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlens import HookedTransformer
from tests.close import assert_close_to
from tests.configs import TINY_CONFIGS, tiny
from tests.models import ours, randomise
from tests.weights.checkpoints import hf_model

LONG = 1200
# Those whose positions are learned, and so end with the table.
LEARNED = [
    name
    for name, table in TINY_CONFIGS.items()
    if table.get("positional_embedding_type", "standard") in ("standard", "shortformer")
]
OTHERS = [name for name in TINY_CONFIGS if name not in LEARNED]


def tokens_of(n_pos, batch=1):
    return torch.randint(0, 50, (batch, n_pos), generator=torch.Generator().manual_seed(0))


class Largest(TorchDispatchMode):
    """The largest result of any operation, in numbers; views count as what they show."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            # What is expanded has no memory of its own.
            if isinstance(tensor, torch.Tensor) and 0 not in tensor.stride():
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(
    ("name", "padded"),
    [("gpt2", False), ("local", False), *((name, True) for name in TINY_CONFIGS)],
)
def test_no_tensor_is_as_large_as_a_mask(name, padded):
    model = HookedTransformer(tiny(name, n_ctx=LONG)).eval()
    randomise(model)
    tokens = tokens_of(LONG)
    mask = torch.ones_like(tokens)
    mask[:, : 3 if padded else 0] = 0
    with torch.no_grad(), Largest() as largest:
        model(tokens, attention_mask=mask if padded else None)
    # One block of 512 query rows of every head is the most that attention may hold.
    heads = model.cfg.n_heads
    assert largest.numel < LONG * LONG * heads // 2
    assert largest.numel <= max(512 * LONG * heads, LONG * model.cfg.d_mlp * 2)


@pytest.mark.parametrize("name", OTHERS)
def test_positions_beyond_n_ctx_are_computed(name):
    """Rotary tables grow; ALiBi needs none."""
    short = ours(name, n_ctx=16, dtype=torch.float64)
    long = ours(name, n_ctx=128, dtype=torch.float64)
    tokens = tokens_of(90)
    with torch.no_grad():
        # TransformerLens' unused position table has n_ctx rows.
        state = {k: v for k, v in short.state_dict().items() if "W_pos" not in k}
        long.load_state_dict(state, strict=False)
        assert_close_to(short(tokens), long(tokens), atol=1e-12)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_positions_end_with_a_sentence(name):
    with pytest.raises(IndexError, match="n_ctx"):
        ours(name)(tokens_of(65))


def test_a_text_longer_than_the_config_says_is_transformers():
    reference = hf_model("llama_grouped")
    model = HookedTransformer.from_pretrained_no_processing("x", hf_model=reference, verbose=False)
    tokens = tokens_of(200)
    assert model.cfg.n_ctx == 64
    with torch.no_grad():
        assert_close_to(model(tokens), reference(tokens).logits, atol=2e-5)
