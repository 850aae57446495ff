"""Refusing to compute with weights that are stored quantised."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastlens.errors import FastlensError

_REMEDY = (
    "Load the model without quantization_config, or dequantised; a forward pass does not need it."
)


class UnreadableWeightError(FastlensError, NotImplementedError):
    """A weight whose stored numbers are not its values."""


def unreadable_weight_reason(weight: Any) -> str | None:
    """Why a weight is not a matrix of its own values, to stand behind "because"; None if it is.

    Readable are float16, bfloat16, float32 and float64 tensors that hold values.
    """
    if not isinstance(weight, Tensor):
        kind = type(weight)
        return f"it is a {kind.__module__}.{kind.__qualname__}, not a torch.Tensor"
    if weight.is_meta:
        return "it is on the meta device and holds no values"
    if not weight.is_floating_point():
        return f"its dtype is {weight.dtype}: numbers packed into integers"
    if weight.element_size() < 2:
        return f"its dtype is {weight.dtype}, whose values need the scales stored beside them"
    return None


def quantization_method(config: Any) -> str | None:
    """``quant_method`` of a Hugging Face config, or of its dict; None if it is not quantised."""
    found = _field(_field(config, "quantization_config"), "quant_method")
    # An enum of transformers, or its value.
    found = getattr(found, "value", found)
    return found if isinstance(found, str) else None


def _field(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def describe_quantization(owner: Any) -> str:
    """How a module's weight is quantised: its config's method, else its weight's class, else
    ``"an unknown quantization"``."""
    for holder in (owner, getattr(owner, "original_component", None)):
        method = quantization_method(getattr(holder, "config", None))
        if method is not None:
            return method
    weight = getattr(owner, "weight", None)
    name = "Tensor" if weight is None else type(weight).__name__
    return "an unknown quantization" if name in ("Tensor", "Parameter") else name


def require_readable_weight(
    weight: Any, *, operation: str, owner: Any = None, remedy: str | None = None
) -> Tensor:
    """The weight as it is, if its numbers are its values.

    Args:
        operation: What is to be done with it: "cannot ... because ...".
        owner: The module that has it; says how it is quantised.
        remedy: What to do instead.

    Raises: UnreadableWeightError (a NotImplementedError) otherwise.
    """
    reason = unreadable_weight_reason(weight)
    if reason is None:
        return weight
    if isinstance(weight, Tensor) and weight.is_meta:
        raise UnreadableWeightError(
            f"cannot {operation} because {reason}. Load the model with its weights, not offloaded."
        )
    method = "an unknown quantization" if owner is None else describe_quantization(owner)
    raise UnreadableWeightError(
        f"cannot {operation} because {reason} (quantization: {method}). {remedy or _REMEDY}"
    )
