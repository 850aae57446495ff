"""Which weights can be read, against TransformerLens."""

import enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn

from fastlens.compat.utilities import quantization as ours

COMPARED = [
    "transformer_lens.utilities.quantization.describe_quantization",
    "transformer_lens.utilities.quantization.quantization_method",
    "transformer_lens.utilities.quantization.require_readable_weight",
    "transformer_lens.utilities.quantization.unreadable_weight_reason",
]


class Packed(nn.Parameter):
    """Like bitsandbytes' 4-bit parameters: a Parameter of packed integers."""


class Method(str, enum.Enum):
    FP8 = "fp8"


READABLE: list[Any] = [
    torch.zeros(2, dtype=t) for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
]
UNREADABLE: dict[str, Any] = {
    "not a torch.Tensor": object(),
    "meta device": torch.zeros(2, device="meta"),
    "torch.uint8": Packed(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False),
    "torch.float8_e4m3fn": torch.zeros(2, dtype=torch.float8_e4m3fn),
}
CONFIGS: list[Any] = [
    None,
    {},
    {"quantization_config": {"quant_method": "gptq"}},
    {"quantization_config": {"quant_method": 3}},
    SimpleNamespace(),
    SimpleNamespace(quantization_config=None),
    SimpleNamespace(quantization_config=SimpleNamespace(quant_method=Method.FP8)),
]


@pytest.fixture(scope="module")
def tl(theirs):
    return theirs("quantization")


@pytest.mark.tl
def test_what_can_be_read(tl):
    for weight in READABLE:
        assert ours.unreadable_weight_reason(weight) is tl.unreadable_weight_reason(weight) is None
        for library in (ours, tl):
            assert library.require_readable_weight(weight, operation="fold it") is weight


@pytest.mark.tl
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot(tl, kind):
    weight = UNREADABLE[kind]
    owner = SimpleNamespace(config=CONFIGS[-1], weight=weight)
    for library in (ours, tl):
        assert kind in library.unreadable_weight_reason(weight)
        with pytest.raises(NotImplementedError, match=f"cannot fold it because.*{kind}") as caught:
            library.require_readable_weight(
                weight, operation="fold it", owner=owner, remedy="Do not."
            )
        # What was never loaded is not quantised.
        is_meta = kind == "meta device"
        assert ("fp8" in str(caught.value)) == ("Do not." in str(caught.value)) == (not is_meta)


@pytest.mark.tl
def test_methods(tl):
    for config in CONFIGS:
        assert ours.quantization_method(config) == tl.quantization_method(config)
        owner = SimpleNamespace(config=config, weight=UNREADABLE["torch.uint8"])
        for holder in (owner, SimpleNamespace(original_component=owner), SimpleNamespace()):
            assert ours.describe_quantization(holder) == tl.describe_quantization(holder)
    assert ours.describe_quantization(nn.Linear(1, 1)) == "an unknown quantization"
