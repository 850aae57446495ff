"""Defaults that a ``with`` block overrides, by TransformerLens' path."""

from fastlens.compat.utilities.attribute_utils import get_nested_attr, set_nested_attr
from fastlens.tokens import (
    USE_DEFAULT_VALUE,
    LocallyOverridenDefaults,
    override_or_use_default_value,
)

__all__ = [
    "USE_DEFAULT_VALUE",
    "LocallyOverridenDefaults",
    "get_nested_attr",
    "override_or_use_default_value",
    "set_nested_attr",
]
