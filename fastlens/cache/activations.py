"""The mapping under `ActivationCache`: finding, moving and slicing activations by name."""

import logging
import re
from collections import Counter
from collections.abc import (
    ItemsView,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.act_names import get_act_name
from fastlens.cache.summary import held, place_of, ranges, summary_of
from fastlens.errors import HookNameError, LayerError, ShapeError, did_you_mean
from fastlens.hooks.derived import CacheDict, Derived, Entry, Source
from fastlens.ops.outlier_rows import Int8OutlierRows
from fastlens.slices import Slice, SliceInput, whole_numbers

_log = logging.getLogger(__name__)

AnySlice: TypeAlias = Slice | SliceInput
Self = TypeVar("Self", bound="Activations")


class CachedModel(Protocol):
    """What the cache asks of the model it came from; any object that has it will do.

    A cache used only as a mapping asks nothing.
    """

    cfg: Any
    blocks: Any
    ln_final: Any
    hook_dict: Mapping[str, Any]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Tensor:
        """Sum of the output biases before ``layer``."""
        ...

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """Unembedding vectors of tokens."""
        ...


class Activations:
    """Activations by hook name: what `ActivationCache` is before it does any arithmetic.

    Args: see `ActivationCache`.
    """

    def __init__(self, cache_dict: dict[str, Tensor], model: Any, has_batch_dim: bool = True):
        self.cache_dict = cache_dict
        self.model = cast(CachedModel, model)
        self.has_batch_dim = has_batch_dim

    # The only way to a tensor, here and for all other methods: an entry need not be one yet.
    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        """The stored activation.

        Raises: HookNameError (a KeyError) if it is not here, saying why if the model has the place.
        """
        name = self._full_name(key)
        if name not in self.cache_dict:
            raise self._missing(key, name)
        return self.cache_dict[name]

    def __contains__(self, key: object) -> bool:
        """Whether ``cache[key]`` would work, for any form of key."""
        if not isinstance(key, str | tuple):
            return False
        try:
            return self._full_name(key) in self.cache_dict
        except (LayerError, HookNameError):
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def keys(self) -> KeysView[str]:
        """Full hook names, in the order in which they fired."""
        return self.cache_dict.keys()

    def values(self) -> ValuesView[Tensor]:
        """The activations."""
        return ValuesView(cast(Mapping[str, Tensor], self))

    def items(self) -> ItemsView[str, Tensor]:
        """Pairs of full hook name and activation."""
        return ItemsView(cast(Mapping[str, Tensor], self))

    @property
    def has_embed(self) -> bool:
        """Whether the token embedding is here."""
        return "hook_embed" in self.cache_dict

    @property
    def has_pos_embed(self) -> bool:
        """Whether a position embedding is here."""
        return "hook_pos_embed" in self.cache_dict

    def _full_name(self, key: str | tuple[Any, ...]) -> str:
        if isinstance(key, str):
            return key if key in self.cache_dict else get_act_name(key)
        if not 1 <= len(key) <= 3 or not isinstance(key[0], str):
            raise HookNameError(
                f"no activation {key!r}: a key is a name, or (name, layer), or (name, layer, part)."
            )
        name: str = key[0]
        layer, part = (*key[1:], None, None)[:2]
        if layer is not None and not isinstance(layer, str) and layer < 0:
            n_layers = self.model.cfg.n_layers
            if layer < -n_layers:
                raise LayerError(f"no activation {key!r}: the model has {n_layers} layers.")
            layer += n_layers
        return get_act_name(name, layer, part)

    def _missing(self, key: Any, name: str) -> HookNameError:
        asked = repr(name) if key == name else f"{name!r} (from {key!r})"
        places = getattr(self.model, "hook_dict", None) or {}
        flag = getattr(self.model, "required_flag", lambda _: None)(name)
        what = f"{asked} is a place of this model, but not among the {len(self)} cached activations"
        if name.endswith("_grad") and name.removesuffix("_grad") in places:
            return HookNameError(
                f"{asked} is not cached: run_with_cache keeps gradients with incl_bwd=True."
            )
        calls = [key for key in self.cache_dict if re.sub(r"@\d+", "", key) == name]
        if calls:
            return HookNameError(
                f"{asked} was passed {len(calls)} times. Its activations are "
                f"{', '.join(map(repr, calls))}."
            )
        if name in places and flag and not getattr(self.model.cfg, flag):
            compute = " call cache.compute_head_results()," if name.endswith("hook_result") else ""
            return HookNameError(
                f"{what}: it fires only under cfg.{flag}. To have it,{compute} name it in "
                f"names_filter, or call model.set_{flag}(True) before the run."
            )
        if name in places:
            return HookNameError(
                f"{what}: they were chosen by names_filter, or the run did not pass there. "
                f"Add {name!r} to names_filter."
            )
        return HookNameError(
            f"no activation {asked} in this cache of {len(self)}."
            f"{did_you_mean(name, [*self.cache_dict, *places])}"
        )

    def __repr__(self) -> str:
        layers: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for name, activation in self._entries():
            place, layer = place_of(name)
            which = layers.setdefault((place, tuple(activation.shape)), [])
            which.extend([] if layer is None else [layer])
        batch = "with" if self.has_batch_dim else "without"
        size = f"{self.nbytes / 2**20:.1f} MiB"
        lines = [f"{type(self).__name__}: {len(self)} activations, {size}, {batch} a batch axis"]
        for (place, shape), which in layers.items():
            lines.append(f"  {place.replace('{}', ranges(which))} {list(shape)}")
        return "\n".join(lines)

    @property
    def nbytes(self) -> int:
        """Memory that the activations hold, in bytes; what entries share counts once.

        Entries that are computed when read cost nothing before.
        """
        tensors = [tensor for _, entry in self._entries() for tensor in held(entry)]
        storages = {(t.device, t.untyped_storage().data_ptr()): t for t in tensors}
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    def summary(self) -> str:
        """A table of what is here and what memory it holds, a line per place.

        Columns: the place and its layers; how many entries; shape of one; dtype it reads as; bytes
        held, where what places share counts at the first of them; and how: *stored*, *computed
        when read*, *packed* (int8), *on disk* (nothing is held), *shared* (the memory counts at
        another place). The last line is `nbytes`.
        """
        return summary_of(self._entries(), self.nbytes)

    def pattern_rows(
        self,
        layer: int,
        heads: Sequence[int] | None = None,
        query_pos: Sequence[int] | Tensor | None = None,
        scores: bool = False,
    ) -> Float[Tensor, "*batch head query_pos key_pos"]:
        """Some rows of one layer's attention pattern; nothing else of it is computed or kept.

        For patterns too large to hold: read them a head, or a few rows, at a time.

        Args:
            layer: Negative counts from the end.
            heads, query_pos: Indices, in the order wanted; None is all.
            scores: The scores before the softmax instead.
        """
        name = self._full_name(("attn_scores" if scores else "pattern", layer))
        if name not in self.cache_dict:
            raise self._missing(name, name)
        heads = None if heads is None else whole_numbers(heads, "heads")
        query_pos = None if query_pos is None else whole_numbers(query_pos, "query_pos")
        entry = self.cache_dict.entry(name) if isinstance(self.cache_dict, CacheDict) else None
        if isinstance(entry, Derived):
            part = entry.read_part(heads, query_pos)
            if part is not None:
                return part
        whole = self[name]
        if heads is not None:
            whole = whole[..., heads, :, :]
        return whole if query_pos is None else whole[..., query_pos, :]

    def _entries(self) -> list[tuple[str, Entry]]:
        """What stands in the cache, computed or not."""
        found = self.cache_dict
        return list(found.entries() if isinstance(found, CacheDict) else found.items())

    def to(self: Self, device: torch.device | str) -> Self:
        """Move all activations. Returns this cache, changed.

        Methods that read weights then copy those to the activations' device at each call.
        """
        moved: dict[Any, Entry] = {}
        kept = CacheDict()
        for name, entry in self._entries():
            kept.put(name, _moved(entry, torch.device(device), moved))
        self.cache_dict = kept
        return self

    def toggle_autodiff(self, mode: bool = False) -> None:
        """``torch.set_grad_enabled(mode)``, for the whole process; says so in the log."""
        _log.warning("Changed the global state, set autodiff to %s", mode)
        torch.set_grad_enabled(mode)

    def remove_batch_dim(self: Self) -> Self:
        """Drop the batch axis of a batch of one. Returns this cache, changed.

        Raises: ShapeError if the batch is larger.
        """
        if not self.has_batch_dim:
            _log.warning("Tried removing batch dimension after already having removed it.")
            return self
        batch = self._batch_size()
        if batch != 1:
            raise ShapeError(
                f"the batch axis can only be removed from a batch of one; this has {batch}. "
                "Choose one with apply_slice_to_batch_dim(i)."
            )
        kept = CacheDict()
        for name, entry in self._entries():
            if len(entry.shape) > 0 and entry.shape[0] == 1:
                entry = _first(entry)
            kept.put(name, entry)
        self.cache_dict = kept
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self: Self, batch_slice: AnySlice) -> Self:
        """A new cache of some of the batch; an int drops the axis.

        Ints and ranges give views of this cache's activations. Entries whose first axis is not the
        batch (flattened QK-norms, routed experts) stay whole.

        Raises: ShapeError if the batch axis was removed.
        """
        batch_slice = as_slice(batch_slice)
        if not self.has_batch_dim and batch_slice.mode != "identity":
            raise ShapeError("this cache has no batch axis to slice: it was removed.")
        batch = self._batch_size()
        choice, drops = batch_slice, batch_slice.mode == "int"
        if drops:
            index = int(batch_slice.indices()[0])
            if not -batch <= index < batch:
                raise ShapeError(f"example {index} of a batch of {batch}: counted from 0.")
            choice = Slice((index % batch, index % batch + 1))
        memo: dict[Any, Entry] = {}
        chosen = CacheDict()
        for name, entry in self._entries():
            some = _some_of_batch(entry, batch, choice, memo)
            chosen.put(name, _first(some) if drops and some is not entry else some)
        still_has_batch = self.has_batch_dim and batch_slice.mode != "int"
        return type(self)(chosen, self.model, has_batch_dim=still_has_batch)

    def _batch_size(self) -> int:
        """The commonest first axis: a few entries may not start with the batch."""
        sizes = Counter(entry.shape[0] for _, entry in self._entries() if len(entry.shape) > 0)
        return sizes.most_common(1)[0][0] if sizes else 1


def _first(entry: Entry) -> Entry:
    """The first and only example, without the batch axis."""
    if isinstance(entry, Derived):
        return entry.then(lambda activation: activation[0], entry.shape[1:])
    if isinstance(entry, Int8OutlierRows):
        # A row is packed as a whole.
        return entry.read()[0] if entry.ndim == 1 else entry.on(lambda tensor: tensor[0])
    return entry[0]


def _key(entry: Entry) -> Any:
    """The same for tensors that are one in memory: two names may hold the same activation."""
    if isinstance(entry, Derived | Int8OutlierRows):
        return id(entry)
    return entry.device, entry.data_ptr(), entry.dtype, entry.shape, entry.stride()


def _moved(entry: Entry, device: torch.device, moved: dict[Any, Entry]) -> Entry:
    """On that device; what entries share is copied once."""
    key = _key(entry)
    if key not in moved:
        if isinstance(entry, Derived):
            moved[key] = entry.on(lambda source: cast(Source, _moved(source, device, moved)))
        else:
            moved[key] = entry.to(device)
    return moved[key]


def _some_of_batch(entry: Entry, batch: int, choice: Slice, chosen: dict[Any, Entry]) -> Entry:
    """Some examples; an entry whose first axis is not the batch stays whole.

    What is computed from captured tensors is computed from those of the chosen examples.
    """
    if len(entry.shape) == 0 or entry.shape[0] != batch:
        return entry
    key = _key(entry)
    if key in chosen:
        return chosen[key]
    if isinstance(entry, Derived):
        shape = (len(choice.indices(batch)), *entry.shape[1:])
        found: Entry = entry.on(
            lambda source: cast(Source, _some_of_batch(source, batch, choice, chosen)), shape
        )
    elif isinstance(entry, Int8OutlierRows):
        # A row is packed as a whole.
        found = choice.apply(entry.read()) if entry.ndim == 1 else entry.on(choice.apply)
    else:
        found = choice.apply(entry)
    chosen[key] = found
    return found


def as_slice(choice: AnySlice) -> Slice:
    """The choice as a `Slice`; unlike `Slice.unwrap`, an int drops its axis."""
    return choice if isinstance(choice, Slice) else Slice(choice)
