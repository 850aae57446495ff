"""The activations of one run, and the methods that take the run apart."""

from fastlens.cache.activation_cache import ActivationCache

__all__ = ["ActivationCache"]
