"""Every kernel of the ops beside the reference and PyTorch's own function, at a model's sizes.

    pytest benchmarks/test_ops.py --benchmark-only

Float32 on the CPU: attention and LayerNorm at GPT-2 small's sizes, RMSNorm and rotary at those of
SmolLM2-135M. Kernels are found by their registry, so a new one is timed once its file is there.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule, visibility
from fastlens.ops.dispatch import kernels

TOKENS = (16, 64, 256, 1024)
TORCH, REFERENCE = "plain torch", "reference"


@pytest.fixture(params=TOKENS)
def tokens(request: pytest.FixtureRequest, only_checked: bool) -> int:
    """How many there are in a prompt."""
    return min(request.param, 64) if only_checked else request.param


def each_contender(op: str, *others: str) -> pytest.MarkDecorator:
    """Over the kernels that serve the CPU, and others."""
    cpu = torch.device("cpu")
    served = [k.name for k in kernels()[op] if k.refuses(cpu, torch.float32) is None]
    names = [*(f"fastlens: {name}" for name in served), REFERENCE, *others]
    return pytest.mark.parametrize("who", names)


def of_fastlens(op: str, who: str) -> Callable[..., torch.Tensor]:
    """A kernel by its name, or the reference."""
    named = {f"fastlens: {kernel.name}": kernel.fn for kernel in kernels()[op]}
    return getattr(reference, op) if who == REFERENCE else named[who]


@each_contender("attention", TORCH)
@pytest.mark.parametrize("kind", ["causal", "window", "masked"])
def test_attention(time_checked, kind, tokens, who):
    """A window of a quarter of the tokens; masked: three prompts, two of them shorter.

    PyTorch is handed the mask ready made, and fastlens makes it in every call.
    """
    n_heads, d_head, batch = 12, 64, 3 if kind == "masked" else 1
    q, k, v = torch.randn(3, batch, tokens, n_heads, d_head)
    rule = AttentionRule(scale=d_head**0.5, window=tokens // 4 if kind == "window" else None)
    mask = None
    if kind == "masked":
        lengths = torch.tensor([tokens, tokens // 2, tokens - 3])
        mask = torch.arange(tokens) < lengths[:, None]
    if who == TORCH:
        order = torch.arange(tokens)
        seen = None if kind == "causal" else visibility(rule, order, order, mask)

        def run() -> torch.Tensor:
            turned = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*turned, attn_mask=seen, is_causal=seen is None)
            return out.transpose(1, 2)
    else:
        attention = of_fastlens("attention", who)

        def run() -> torch.Tensor:
            return attention(q, k, v, rule, 0, mask)

    expected = reference.attention(q, k, v, rule, 0, mask)
    time_checked(run, expected, f"attention, {kind}, {tokens} tokens")


@each_contender("layer_norm", TORCH)
def test_layer_norm(time_checked, tokens, who):
    """With gain and bias."""
    x, w, b = torch.randn(1, tokens, 768), torch.randn(768), torch.randn(768)
    if who == TORCH:
        run = lambda: F.layer_norm(x, (768,), w, b, 1e-5)  # noqa: E731
    else:
        norm = of_fastlens("layer_norm", who)
        run = lambda: norm(x, w, b, 1e-5)  # noqa: E731
    time_checked(run, reference.layer_norm(x, w, b, 1e-5), f"LayerNorm, {tokens} tokens")


@each_contender("rms_norm", TORCH)
def test_rms_norm(time_checked, tokens, who):
    """With gain."""
    x, w = torch.randn(1, tokens, 576), torch.randn(576)
    if who == TORCH:
        run = lambda: F.rms_norm(x, (576,), w, 1e-5)  # noqa: E731
    else:
        norm = of_fastlens("rms_norm", who)
        run = lambda: norm(x, w, 1e-5)  # noqa: E731
    time_checked(run, reference.rms_norm(x, w, 1e-5), f"RMSNorm, {tokens} tokens")


@each_contender("rotary")
@pytest.mark.parametrize("adjacent", [False, True], ids=["halves", "adjacent"])
def test_rotary(time_checked, adjacent, tokens, who):
    """All channels of nine heads."""
    x = torch.randn(1, tokens, 9, 64)
    pairs = torch.arange(tokens)[:, None] * 1e5 ** -torch.linspace(0, 1, 32)
    angles = pairs.repeat_interleave(2, -1) if adjacent else pairs.repeat(1, 2)
    tables = (angles.cos()[None], angles.sin()[None])
    rotary = of_fastlens("rotary", who)
    group = f"rotary, {'adjacent' if adjacent else 'halves'}, {tokens} tokens"
    time_checked(
        lambda: rotary(x, *tables, adjacent), reference.rotary(x, *tables, adjacent), group
    )
