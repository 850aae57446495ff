"""Sites stacked in the batch by hand: what a user writes to be faster than one forward per site.

Of Hugging Face's model only the last position's logits are computed, and hooks work in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.loops import Metric

Index = tuple[int, ...]


@dataclass(frozen=True)
class Patches:
    """The patches of one layer in one stack.

    Attributes:
        rows: Row of the batch of each.
        pos, head: Where each stands; None for an axis that is patched whole.
    """

    rows: Tensor
    pos: Tensor | None
    head: Tensor | None

    def write(self, value: Tensor, clean: Tensor) -> None:
        """Put the clean values ``[1, pos, ...]`` into the batch's ``[row, pos, ...]``, in place."""
        if self.head is None:
            value[self.rows, self.pos] = clean[0, self.pos]
        elif self.pos is None:
            value[self.rows, :, self.head] = clean[0][:, self.head].transpose(0, 1)
        else:
            value[self.rows, self.pos, self.head] = clean[0, self.pos, self.head]


Stack = dict[int, Patches]


def stacks_of(indices: Sequence[Index], axes: Sequence[str], size: int) -> list[Stack]:
    """Sites in their order, ``size`` to a stack: layer -> patches."""
    found = []
    for start in range(0, len(indices), size):
        stack = indices[start : start + size]
        layers: dict[int, list[int]] = {}
        for row, index in enumerate(stack):
            layers.setdefault(index[0], []).append(row)

        def along(axis: str, rows: list[int], stack: Sequence[Index] = stack) -> Tensor | None:
            if axis not in axes:
                return None
            return torch.tensor([stack[row][axes.index(axis)] for row in rows])

        found.append(
            {
                layer: Patches(torch.tensor(rows), along("pos", rows), along("head", rows))
                for layer, rows in layers.items()
            }
        )
    return found


def size_of(stack: Stack) -> int:
    """How many sites are in it."""
    return sum(len(patches.rows) for patches in stack.values())


def reader(model: Any, site: str, layer: int) -> Any:
    """The module of a GPT-2 or Llama that takes the site as its input."""
    body = model.base_model
    is_gpt2 = hasattr(body, "h")
    block = body.h[layer] if is_gpt2 else body.layers[layer]
    if site == "resid_pre":
        return block
    return block.attn.c_proj if is_gpt2 else block.self_attn.o_proj


@torch.no_grad()
def hugging_face(
    model: Any,
    site: str,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric,
    stacks: Sequence[Stack],
) -> Tensor:
    """The metric of every site of a GPT-2 or Llama, one forward per stack.

    Cost: one forward of the clean prompt as well.
    """
    heads = (model.config.num_attention_heads, -1)

    def hooked(layer: int, act: Callable[[Tensor], None]) -> Any:
        def hook(module: Any, inputs: tuple) -> None:
            value = inputs[0]
            act(value if site == "resid_pre" else value.view(*value.shape[:2], *heads))

        return reader(model, site, layer).register_forward_pre_hook(hook)

    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        return lambda value: kept.__setitem__(layer, value.clone())

    layers = sorted({layer for stack in stacks for layer in stack})
    handles = [hooked(layer, keep(layer)) for layer in layers]
    # The clean prompt's logits are not needed.
    model.base_model(clean)
    for handle in handles:
        handle.remove()

    def write(patches: Patches, layer: int) -> Callable[[Tensor], None]:
        return lambda value: patches.write(value, kept[layer])

    found = []
    for stack in stacks:
        handles = [hooked(layer, write(patches, layer)) for layer, patches in stack.items()]
        logits = model(corrupted.expand(size_of(stack), -1), logits_to_keep=1).logits
        for handle in handles:
            handle.remove()
        found += [metric(row[None]) for row in logits]
    return torch.stack(found)


@torch.no_grad()
def fastlens_hooks(
    model: Any,
    site: str,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric,
    stacks: Sequence[Stack],
) -> Tensor:
    """The same with `run_with_hooks`; stacks of one are one forward per site."""
    place = "hook_resid_pre" if site == "resid_pre" else "attn.hook_z"
    _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith(place))

    def hook_of(patches: Patches, name: str) -> tuple[str, Callable]:
        def hook(value: Tensor, hook: Any) -> Tensor:
            patches.write(value, cache[name])
            return value

        return name, hook

    found = []
    for stack in stacks:
        logits = model.run_with_hooks(
            corrupted.expand(size_of(stack), -1),
            fwd_hooks=[hook_of(p, f"blocks.{layer}.{place}") for layer, p in stack.items()],
        )
        found += [metric(row[None]) for row in logits]
    return torch.stack(found)
