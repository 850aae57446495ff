"""One of the two libraries, as the calls of `tests/compat/calls` see it."""

import functools
import importlib
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastlens.compat.names import names_of
from tests import models
from tests.compat import surface
from tests.configs import tiny
from tests.toy import toy_pair


class Library:
    """Names by their path below `transformer_lens`, and tiny models with equal weights.

    ``lens("HookedTransformer.Output")`` is the class; ``lens.gpt2`` a model that all calls share;
    ``lens.fresh("gpt2")`` one that may be changed.
    """

    def __init__(self, is_ours: bool):
        self.is_ours = is_ours

    def __repr__(self) -> str:
        return "fastlens" if self.is_ours else "transformer_lens"

    def __call__(self, path: str) -> Any:
        value, rest = self._first(path)
        for part in rest:
            value = getattr(value, part)
        return value

    def static(self, path: str) -> Any:
        """What a path names, without asking properties for their value."""
        value, rest = self._first(path)
        for part in rest:
            value = inspect.getattr_static(value, part)
        return value

    def _first(self, path: str) -> tuple[Any, list[str]]:
        """What a module holds, and the members of it that are still to be found."""
        parts = path.split(".")
        for cut in range(len(parts) - 1, -1, -1):
            module, name = ".".join(parts[:cut]), parts[cut]
            if self.is_ours and name in names_of(module):
                home, attribute = names_of(module)[name]
                return getattr(importlib.import_module(home), attribute), parts[cut + 1 :]
            if not self.is_ours and module in surface.all_paths():
                found = vars(surface.theirs(module))
                if name in found:
                    return found[name], parts[cut + 1 :]
        raise AttributeError(f"{self} has no {path}")

    # -- models --------------------------------------------------------------------------------

    def fresh(self, name: str, **changes: Any) -> Any:
        """A model of its own; both libraries' have the same weights."""
        return (models.ours if self.is_ours else models.theirs)(name, **changes)

    @functools.cached_property
    def gpt2(self) -> Any:
        """Learned positions, LayerNorm, GELU."""
        return self.fresh("gpt2")

    @functools.cached_property
    def llama(self) -> Any:
        """Rotary positions, RMS norms, gated MLP, grouped heads."""
        return self.fresh("llama")

    @functools.cached_property
    def attn_only(self) -> Any:
        """No MLPs."""
        return self.fresh("attn_only")

    @property
    def toy(self) -> Any:
        """The packaged toy model, which reads text."""
        return toy_pair()[0 if self.is_ours else 1]

    def cfg(self, name: str = "gpt2", **changes: Any) -> Any:
        """A tiny config."""
        return self("config.HookedTransformerConfig")(**tiny(name, **changes))

    @functools.cached_property
    def cache(self) -> Any:
        """The shared GPT-2's activations on `tokens`."""
        return self.gpt2.run_with_cache(self.tokens)[1]

    # -- inputs --------------------------------------------------------------------------------

    tokens = models.prompts()
    corrupted = models.prompts(seed=1)
    residual = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(2))

    def random(self, *shape: int, seed: int = 3) -> torch.Tensor:
        """Values that are the same for both libraries."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """TransformerLens warns that its classes are deprecated."""
        with warnings.catch_warnings():
            if not self.is_ours:
                warnings.simplefilter("ignore")
            yield
