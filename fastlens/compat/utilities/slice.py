"""Choices along one axis, by TransformerLens' path."""

from fastlens.compat.utilities.tensors import to_numpy
from fastlens.slices import Slice, SliceInput

__all__ = ["Slice", "SliceInput", "to_numpy"]
