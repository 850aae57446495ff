"""fastlens: TransformerLens' `HookedTransformer`, maintained and fast."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlens import patching as patching
    from fastlens.cache import ActivationCache as ActivationCache
    from fastlens.compat import utils as utils
    from fastlens.components.kv_cache import (
        TransformerLensKeyValueCache as TransformerLensKeyValueCache,
    )
    from fastlens.config import HookedTransformerConfig as HookedTransformerConfig
    from fastlens.factored_matrix import FactoredMatrix as FactoredMatrix
    from fastlens.hooks.of_heads import OfHeads as OfHeads
    from fastlens.hooks.point import HookPoint as HookPoint
    from fastlens.hooks.root import HookedRootModule as HookedRootModule
    from fastlens.model.bert_next_sentence_prediction import (
        BertNextSentencePrediction as BertNextSentencePrediction,
    )
    from fastlens.model.hooked_encoder import HookedEncoder as HookedEncoder
    from fastlens.model.hooked_encoder_decoder import HookedEncoderDecoder as HookedEncoderDecoder
    from fastlens.model.hooked_module import HookedModule as HookedModule
    from fastlens.model.hooked_transformer import HookedTransformer as HookedTransformer
    from fastlens.scores import Scores as Scores

__version__ = "0.1.0"

# Public name -> where it lives. Loaded at first use, so that `import fastlens` stays light.
_HOME = {
    "ActivationCache": "fastlens.cache",
    "BertNextSentencePrediction": "fastlens.model.bert_next_sentence_prediction",
    "FactoredMatrix": "fastlens.factored_matrix",
    "HookPoint": "fastlens.hooks.point",
    "HookedEncoder": "fastlens.model.hooked_encoder",
    "HookedEncoderDecoder": "fastlens.model.hooked_encoder_decoder",
    "HookedModule": "fastlens.model.hooked_module",
    "HookedRootModule": "fastlens.hooks.root",
    "HookedTransformer": "fastlens.model.hooked_transformer",
    "HookedTransformerConfig": "fastlens.config",
    "OfHeads": "fastlens.hooks.of_heads",
    "Scores": "fastlens.scores",
    "TransformerLensKeyValueCache": "fastlens.components.kv_cache",
    "patching": "fastlens",
    "utils": "fastlens.compat",
}

__all__ = [
    "ActivationCache",
    "BertNextSentencePrediction",
    "FactoredMatrix",
    "HookPoint",
    "HookedEncoder",
    "HookedEncoderDecoder",
    "HookedModule",
    "HookedRootModule",
    "HookedTransformer",
    "HookedTransformerConfig",
    "OfHeads",
    "Scores",
    "TransformerLensKeyValueCache",
    "patching",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastlens' has no attribute {name!r}")
    if _HOME[name] == "fastlens":
        return importlib.import_module(f"fastlens.{name}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
