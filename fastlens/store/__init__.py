"""Activations on disk: a folder of shards, datasets of texts, batches for training."""

from fastlens.store.folder import Store
from fastlens.store.loader import ActivationLoader
from fastlens.store.text import capture_text

__all__ = ["ActivationLoader", "Store", "capture_text"]
