"""Other values in a parameter, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastlens.errors import FastlensError


class SwapError(FastlensError, TypeError, ValueError):
    """What was given is no parameter, or its new values do not fit it."""


@contextmanager
def temporarily_swap_parameter(parameter: Any, new_value: Any) -> Iterator[nn.Parameter]:
    """Within the ``with`` block the parameter holds ``new_value``; afterwards, whatever happened,
    what it held before.

    The object stays the same, so hooks, optimizers and tied names keep it; ``grad`` is not touched.

    Args:
        new_value: A plain tensor of the same shape and dtype, on any device; it is copied.

    Raises: SwapError (a TypeError and a ValueError) for anything else.
    """
    if not isinstance(parameter, nn.Parameter):
        raise SwapError(f"parameter must be a torch.nn.Parameter; got {type(parameter).__name__}.")
    if isinstance(new_value, nn.Parameter) or not isinstance(new_value, Tensor):
        raise SwapError(f"new_value must be a plain torch.Tensor; got {type(new_value).__name__}.")
    for field in ("shape", "dtype"):
        found, wanted = getattr(new_value, field), getattr(parameter, field)
        if found != wanted:
            raise SwapError(
                f"new_value must have the {field} of the parameter, {wanted}; its {field} is "
                f"{found}."
            )
    before = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.copy_(new_value)
        yield parameter
    finally:
        with torch.no_grad():
            parameter.copy_(before)
