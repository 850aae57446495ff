"""TransformerLens' six patch setters: copy one part of a clean activation into a corrupted one.

Each takes ``(corrupted_activation, index, clean_activation)``, writes into the corrupted activation
and returns it. ``index`` is ``[layer, ...]``; the layer is not looked at, since both activations
are of that layer already. One clean prompt serves for a whole batch of corrupted ones.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor

from fastlens.errors import PatchIndexError

CorruptedActivation: TypeAlias = Tensor
PatchedActivation: TypeAlias = Tensor
# An int in all that `generic_activation_patch` makes itself; a slice or a list selects several.
Index: TypeAlias = Sequence[Any]
Clean: TypeAlias = Float[Tensor, "..."]


def layer_pos_patch_setter(
    corrupted_activation: Float[Tensor, "batch pos ..."], index: Index, clean_activation: Clean
) -> Float[Tensor, "batch pos ..."]:
    """``index = [layer, pos]``: one position, for anything but scores and patterns.

    Raises: PatchIndexError (an AssertionError) for an index of another length.
    """
    _, pos = _checked(index, "layer", "pos")
    corrupted_activation[:, pos, ...] = clean_activation[:, pos, ...]
    return corrupted_activation


def layer_pos_head_vector_patch_setter(
    corrupted_activation: Float[Tensor, "batch pos head ..."],
    index: Index,
    clean_activation: Clean,
) -> Float[Tensor, "batch pos head ..."]:
    """``index = [layer, pos, head]``: one head at one position (q, k, v, z, result).

    Raises: PatchIndexError (an AssertionError) for an index of another length.
    """
    _, pos, head = _checked(index, "layer", "pos", "head")
    corrupted_activation[:, pos, head] = clean_activation[:, pos, head]
    return corrupted_activation


def layer_head_vector_patch_setter(
    corrupted_activation: Float[Tensor, "batch pos head ..."],
    index: Index,
    clean_activation: Clean,
) -> Float[Tensor, "batch pos head ..."]:
    """``index = [layer, head]``: one head at every position (q, k, v, z, result).

    Raises: PatchIndexError (an AssertionError) for an index of another length.
    """
    _, head = _checked(index, "layer", "head")
    corrupted_activation[:, :, head] = clean_activation[:, :, head]
    return corrupted_activation


def layer_head_pattern_patch_setter(
    corrupted_activation: Float[Tensor, "batch head query_pos key_pos"],
    index: Index,
    clean_activation: Clean,
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """``index = [layer, head]``: one head's whole pattern or scores.

    Raises: PatchIndexError (an AssertionError) for an index of another length.
    """
    _, head = _checked(index, "layer", "head")
    corrupted_activation[:, head, :, :] = clean_activation[:, head, :, :]
    return corrupted_activation


def layer_head_pos_pattern_patch_setter(
    corrupted_activation: Float[Tensor, "batch head query_pos key_pos"],
    index: Index,
    clean_activation: Clean,
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """``index = [layer, head, dest_pos]``: what one query of one head attends to.

    Raises: PatchIndexError (an AssertionError) for an index of another length.
    """
    _, head, query_pos = _checked(index, "layer", "head", "dest_pos")
    corrupted_activation[:, head, query_pos, :] = clean_activation[:, head, query_pos, :]
    return corrupted_activation


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted_activation: Float[Tensor, "batch head query_pos key_pos"],
    index: Index,
    clean_activation: Clean,
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """``index = [layer, head, dest_pos, src_pos]``: one entry of one head's pattern or scores.

    The row is not normalised again: a patched pattern need not sum to one.

    Raises: PatchIndexError (an AssertionError) for an index of another length.
    """
    _, head, query_pos, key_pos = _checked(index, "layer", "head", "dest_pos", "src_pos")
    chosen = (slice(None), head, query_pos, key_pos)
    corrupted_activation[chosen] = clean_activation[chosen]
    return corrupted_activation


def _checked(index: Index, *axes: str) -> Index:
    if len(index) != len(axes):
        raise PatchIndexError(
            f"the index {list(index)} has {len(index)} entries; this patch setter needs "
            f"[{', '.join(axes)}]. Use the setter that goes with your axes."
        )
    return index


class Selection(NamedTuple):
    """What a setter copies.

    Attributes:
        axes: For each entry of its index after the layer, the axis of the activation that the entry
            selects from, counted after the batch axis. Other axes are copied whole.
        of_pattern: Whether it is for ``[batch, head, query_pos, key_pos]``; else it is for
            ``[batch, pos, ...]``.
    """

    axes: tuple[int, ...]
    of_pattern: bool = False


SELECTIONS: dict[Callable[..., Any], Selection] = {
    layer_pos_patch_setter: Selection((0,)),
    layer_pos_head_vector_patch_setter: Selection((0, 1)),
    layer_head_vector_patch_setter: Selection((1,)),
    layer_head_pattern_patch_setter: Selection((0,), of_pattern=True),
    layer_head_pos_pattern_patch_setter: Selection((0, 1), of_pattern=True),
    layer_head_dest_src_pos_pattern_patch_setter: Selection((0, 1, 2), of_pattern=True),
}
_THEIR_MODULE = "transformer_lens.patching"


def selection_of(setter: Callable[..., Any]) -> Selection | None:
    """What one of our six setters or TransformerLens' copies; None for any other.

    Recognised as the very function: a wrapper around one of them keeps its name, and may do
    something else.
    """
    theirs = sys.modules.get(_THEIR_MODULE)
    for ours, selection in SELECTIONS.items():
        if setter is ours:
            return selection
        same_name = getattr(theirs, ours.__name__, None)
        if setter is same_name and getattr(setter, "__module__", None) == _THEIR_MODULE:
            return selection
    return None
