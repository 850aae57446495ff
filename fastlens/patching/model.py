"""What patching needs of a model. `HookedTransformer` has it; so does TransformerLens' own."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch.nn as nn
from torch.nn.modules.module import _has_any_global_hook

from fastlens.errors import SweepError


@runtime_checkable
class HookableModel(Protocol):
    """A hooked model of tokens to logits: `HookedEncoder`, for one."""

    cfg: Any
    hook_dict: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Logits."""
        ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Output of one forward with hooks."""
        ...


@runtime_checkable
class PatchableModel(Protocol):
    """A hooked language model that can start at a layer.

    ``model(residual, start_at_layer=l, stop_at_layer=m)`` runs blocks ``l .. m-1``;
    ``start_at_layer=n_layers`` is the final norm and the unembedding alone.
    """

    cfg: Any
    hook_dict: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Logits, or the residual stream where ``stop_at_layer`` says so."""
        ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Output and activations."""
        ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Output of one forward with hooks."""
        ...

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        """A context in which hooks are on."""
        ...

    def input_to_embed(self, *args: Any, **kwargs: Any) -> Any:
        """Residual stream before the first block, tokens, shortformer positions, mask."""
        ...

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens of a text."""
        ...

    def to_str_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens as strings."""
        ...

    def to_single_token(self, *args: Any, **kwargs: Any) -> Any:
        """The id of a text that is one token."""
        ...

    def modules(self) -> Any:
        """Every submodule, itself included."""
        ...


def check_patchable(model: Any) -> None:
    """Refuse a model that lacks what a sweep needs, before it fails half-way.

    Raises: SweepError that says what to do instead.
    """
    if not isinstance(model, PatchableModel):
        raise SweepError(
            f"a {type(model).__name__} cannot be swept: a sweep needs a model of one stack of "
            f"blocks that can start at any of them, as HookedTransformer. Patch its activations "
            f"with model.run_with_hooks."
        )


def modules_with_hooks(model: PatchableModel | nn.Module) -> list[str]:
    """Names of the modules that carry forward hooks now, whoever put them there."""
    assert isinstance(model, nn.Module)
    everywhere = ["every module (a global torch hook)"] if _has_any_global_hook() else []
    return everywhere + [
        name or type(model).__name__
        for name, module in walk(model)
        if module._forward_hooks or module._forward_pre_hooks
    ]


def walk(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of a tree without shared modules, several times as fast; parents first."""
    waiting = [("", root)]
    while waiting:
        name, module = waiting.pop()
        yield name, module
        start = f"{name}." if name else ""
        for key, child in reversed(module._modules.items()):
            if child is not None:
                waiting.append((start + key, child))
