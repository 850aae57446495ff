"""The packaged toy model, which reads text, ours and TransformerLens' with the same weights."""

import dataclasses
import functools
import warnings
from typing import Any

from fastlens import HookedTransformer


def ours_toy(**options: Any) -> HookedTransformer:
    """A fresh ``toy-induction`` in float32 on the CPU."""
    return HookedTransformer.from_pretrained(
        "toy-induction", device="cpu", verbose=False, **options
    ).eval()


def theirs_of(model: HookedTransformer) -> Any:
    """TransformerLens' model with ``model``'s config, weights and tokenizer."""
    import transformer_lens

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformer_lens.HookedTransformerConfig
        known = {field.name for field in dataclasses.fields(config)}
        fields = {name: value for name, value in model.cfg.to_dict().items() if name in known}
        # Else it looks for that tokenizer on the hub.
        theirs = transformer_lens.HookedTransformer(
            config.from_dict({**fields, "tokenizer_name": None, "init_weights": False})
        )
        # set_tokenizer would load it again, from a folder that a tokenizer made here has not.
        theirs.tokenizer = model.tokenizer
        theirs.cfg.tokenizer_prepends_bos = model.cfg.tokenizer_prepends_bos
        theirs.load_state_dict(model.state_dict())
    return theirs.eval()


@functools.cache
def toy_pair() -> tuple[HookedTransformer, Any]:
    """One pair for all who only read it."""
    ours = ours_toy()
    return ours, theirs_of(ours)
