"""`WeightStream`: a model's weights read group by group when asked for, and let go again."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import EditedError, MemoryLimitError
from fastlens.memory import said_bytes
from fastlens.weights.blocks import Blocks
from fastlens.weights.fold import VOCABULARY_PART, group_of, process_group
from fastlens.weights.load import HALF, check_fit, fill_rest, store, unread
from fastlens.weights.on_demand import AwayParameter, Layout, OnDemand, StreamedParameter
from fastlens.weights.source import Source
from fastlens.weights.tensor_files import CHUNK_BYTES


class StreamedGroup:
    """Parameters that are read together: one layer's, the unembedding with its norm, and so on.

    Attributes:
        name: Of the group in `fold.group_of`; of the parts of "embed", each one's own.
        part_of: That group.
        without: What else is in that, and not read.
        layout: How they lie in memory.
        meta: Their shapes and places in memory, by full name.
        is_here: Whether they are in memory.
        why_kept: Why they are no longer what the file says, or None.
    """

    def __init__(self, name: str, part_of: str, stream: "WeightStream"):
        self.name = name
        self.part_of = part_of
        self.without: frozenset[str] = frozenset()
        self.is_here = False
        self.why_kept: str | None = None
        self.layout: Layout
        self._stream = stream
        self._members: list[tuple[OnDemand, str, str]] = []
        self.meta: dict[str, nn.Parameter] = {}
        # Parameters that somebody may still hold after they were let go, and their versions.
        self._away: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._versions: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return self.layout.nbytes

    def add(self, entries: OnDemand, name: str, key: str) -> None:
        """One more parameter: its module's dict, its name there, its full name."""
        self._members.append((entries, name, key))
        self.meta[key] = entries.held(name)
        entries.put(name, AwayParameter(self.meta[key], requires_grad=False))

    def settle(self) -> None:
        """All are added."""
        self.layout = Layout(self.meta)

    def bring(self) -> None:
        """Put the parameters into their modules' dicts."""
        if self.is_here:
            self._stream.note(self)
        else:
            self._stream.bring(self)

    def keep(self, why: str) -> None:
        """Bring them, and never let them go."""
        self.bring()
        self.why_kept = self.why_kept or why

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the modules these tensors."""
        for entries, name, key in self._members:
            parameter = self._still_held(key)
            if parameter is None:
                parameter = StreamedParameter(tensors[key], requires_grad=False)
                parameter.fastlens_group = self
            else:
                # The same numbers, next to their neighbours again.
                torch.Tensor.data.__set__(parameter, tensors[key])  # type: ignore[attr-defined]
            entries.put(name, parameter)
            self._versions[key] = parameter._version
        self._away.clear()
        self.is_here = True

    def _still_held(self, key: str) -> Any:
        """The parameter of before, if somebody kept it: then it is the same object again."""
        if key not in self._away:
            return None
        reference, version = self._away[key]
        parameter = reference()
        if parameter is not None and parameter._version != version:
            raise EditedError(
                f"{key} was written to after its layer had left memory, so the model has not seen "
                f"it. Write to the model's own ({key}) instead: that keeps the layer in memory."
            )
        return parameter

    def check_away(self) -> None:
        """Raises: EditedError if somebody wrote to parameters that had been let go."""
        for key in self._away:
            self._still_held(key)

    def edits(self) -> int:
        """How often the parameters were written to in place."""
        held = ((entries.held(name), key) for entries, name, key in self._members)
        return sum(p._version - self._versions[key] for p, key in held)

    def is_free(self) -> bool:
        """Whether they can be read again as they are, so need not be kept."""
        if self.why_kept is None and self.edits():
            self.why_kept = "they were written to in place"
        return self.why_kept is None

    def remove(self) -> None:
        """Let the parameters go."""
        for entries, name, key in self._members:
            parameter = entries.held(name)
            self._away[key] = (weakref.ref(parameter), parameter._version)
            entries.put(name, AwayParameter(self.meta[key], requires_grad=False))
        self.is_here = False

    def storages(self) -> Iterator[tuple[int, Tensor]]:
        """(address, a tensor there) of each block of memory."""
        seen = set()
        for entries, name, _ in self._members:
            tensor = entries.held(name)
            address = tensor.untyped_storage().data_ptr()
            if address not in seen:
                seen.add(address)
                yield address, tensor


class WeightStream:
    """Reads a model's weights when they are asked for, and the next layer's while one computes.

    Args:
        model: Built with its parameters on the meta device.
        source: Where the weights come from; read again and again.
        flags: What `fold.possible_flags` allowed.
        device: Where weights go.
        allowed: Called with the bytes that weights hold now; gives those that they may hold.

    Attributes:
        groups: By name, in the order of a forward; the embedding and unembedding come last.
        bytes_read: Of weights, in memory, since the beginning.
        read_as: What weights are read in; 16-bit ones that are processed are rounded at the end.
        transient: Bytes that reading a group takes beside the group, at most.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        flags: Mapping[str, bool],
        device: torch.device,
        allowed: Callable[[int], int],
    ):
        self.cfg: HookedTransformerConfig = model.cfg  # type: ignore[assignment]
        self.bytes_read = 0
        self._source = source
        self._flags = dict(flags)
        self._device = device
        is_half = self.cfg.dtype in HALF and any(flags.values())
        self.read_as = torch.float32 if is_half else self.cfg.dtype
        self._allowed = allowed
        self._lock = threading.RLock()
        self._coming: tuple[StreamedGroup, Future[dict[str, Tensor]]] | None = None
        self._worker: ThreadPoolExecutor | None = None
        # Most recently used last.
        self._used: list[StreamedGroup] = []
        self._owners: dict[int, tuple[StreamedGroup, int]] = {}
        self._blocks = Blocks(device)
        if source.unchecked_shapes is not None:
            parameters = dict(model.named_parameters())
            check_fit(parameters, source.unchecked_shapes, self.cfg)
        self.groups = self._placed(model)
        self.transient = self._transient()

    def _placed(self, model: nn.Module) -> dict[str, StreamedGroup]:
        found: dict[str, StreamedGroup] = {}
        for path, module in model.named_modules():
            own = [name for name, p in module._parameters.items() if p is not None]
            if not own:
                continue
            prefix = f"{path}." if path else ""
            # A module's parameters all belong to one group.
            part_of = group_of(prefix + own[0])
            # Learned positions do not bring the embedding, which is large.
            name = path.split(".")[0] if part_of == "embed" else part_of
            group = found.setdefault(name, StreamedGroup(name, part_of, self))
            entries = OnDemand(module._parameters, group)
            module.__dict__["_parameters"] = entries
            for one in own:
                group.add(entries, one, prefix + one)
        for group in found.values():
            group.settle()
            others = [one for one in found.values() if one.part_of == group.part_of]
            group.without = frozenset(k for one in others if one is not group for k in one.meta)
        layers = [name for name in found if name.startswith("blocks.")]
        layers.sort(key=lambda name: int(name.split(".")[1]))
        return {name: found[name] for name in (*layers, *(n for n in found if n not in layers))}

    @property
    def layers(self) -> Sequence[StreamedGroup]:
        """The layers' groups, in order."""
        return [group for name, group in self.groups.items() if name.startswith("blocks.")]

    @property
    def held(self) -> int:
        """Bytes of weights in memory or on their way, and of memory kept for the next."""
        coming = 0 if self._coming is None else self._coming[0].nbytes
        return (
            coming
            + self._blocks.nbytes
            + sum(group.nbytes for group in self.groups.values() if group.is_here)
        )

    def _transient(self) -> int:
        """Bytes that reading a group takes beside the group, at most."""
        beside = [
            self._source.beside(group.part_of, self.cfg, self.read_as, group.meta, group.without)
            for group in self.groups.values()
        ]
        # Folding a bias, or a mean, makes one product as large as a weight.
        largest = max(group.layout.largest for group in self.groups.values())
        is_layer_norm = str(self.cfg.normalization_type).startswith("LN")
        # Tokens' vectors in several precisions.
        some = 32 * VOCABULARY_PART * self.cfg.d_model
        return max(beside) + (largest if is_layer_norm else 0) + max(2 * CHUNK_BYTES, some)

    # -- coming and going --------------------------------------------------------------------

    def note(self, group: StreamedGroup) -> None:
        """A group that is here was used."""
        if self._used and self._used[-1] is group:
            return
        with self._lock:
            if group in self._used:
                self._used.remove(group)
            self._used.append(group)
            self._fetch_next(group)

    def bring(self, group: StreamedGroup) -> None:
        """Read a group, or wait until it is read.

        Raises: MemoryLimitError if it does not fit; SourceError if it cannot be read.
        """
        with self._lock:
            if group.is_here:
                return
            coming, self._coming = self._coming, None
            if coming is not None and coming[0] is group:
                tensors = coming[1].result()
            else:
                if coming is not None:
                    # Not wanted after all; its memory must be free before more is taken.
                    coming[1].exception()
                    del coming
                self._make_room(group, must=True)
                tensors = self._read(group, self._blocks.take(group.layout.kinds()))
            group.install(tensors)
            for number, (address, _) in enumerate(group.storages()):
                self._owners[address] = (group, number)
            self.bytes_read += group.nbytes
            self.note(group)

    def let_go(self, keep: int = 0) -> None:
        """Free weights until at most ``keep`` bytes of them are in memory; edited ones stay."""
        with self._lock:
            self._drop_coming()
            for group in reversed(list(self.groups.values())):
                if self.held <= keep:
                    return
                if group.is_here and group.is_free():
                    self._remove(group)
                    self._blocks.drop()

    def close(self) -> None:
        """Free everything; the model is gone."""
        with self._lock:
            self._drop_coming()
            for group in self.groups.values():
                if group.is_here:
                    self._remove(group)
            self._blocks.drop()
            if self._worker is not None:
                self._worker.shutdown(wait=False)

    def _drop_coming(self) -> None:
        coming, self._coming = self._coming, None
        if coming is not None:
            coming[1].exception()

    def _remove(self, group: StreamedGroup) -> None:
        blocks = []
        for address, tensor in group.storages():
            self._owners.pop(address, None)
            blocks.append(tensor.detach())
            del tensor
        group.remove()
        self._blocks.give_back(blocks)
        if group in self._used:
            self._used.remove(group)

    def _make_room(self, group: StreamedGroup, must: bool) -> bool:
        """Let others go, the latest used first: those before it will be wanted again sooner."""
        current = None if must or not self._used else self._used[-1]
        kinds = group.layout.kinds()

        def short() -> int:
            taken = self.held + group.nbytes - self._blocks.fitting(kinds)
            return taken - self._allowed(self.held)

        while short() > 0:
            free = [one for one in reversed(self._used) if one is not current and one.is_free()]
            if not free:
                break
            self._remove(free[0])
        if short() > 0 and self._blocks.nbytes:
            self._blocks.drop()
        missing = short()
        if missing <= 0:
            return True
        if must:
            kept = [one.name for one in self.groups.values() if one.is_here]
            edited = f" Edited weights stay in memory: {', '.join(kept)}." if kept else ""
            raise MemoryLimitError(
                f"{group.name} takes {said_bytes(group.nbytes)}, of which {said_bytes(missing)} do "
                f"not fit into max_memory beside what else is in memory. Raise max_memory by "
                f"{missing:,} bytes, free activations that are no longer needed, or run under "
                f"torch.no_grad().{edited}"
            )
        return False

    def _fetch_next(self, group: StreamedGroup) -> None:
        """Begin to read the layer that follows, if there is room for it."""
        following = self._following(group)
        if following is None or following.is_here or self._coming is not None:
            return
        if self._make_room(following, must=False):
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="fastlens-weights")
            blocks = self._blocks.take(following.layout.kinds())
            self._coming = following, self._worker.submit(self._read, following, blocks)

    def _following(self, group: StreamedGroup) -> StreamedGroup | None:
        layers = self.layers
        if group not in layers:
            return None
        at = layers.index(group)
        # Backwards, where the one used before was the next one.
        before = self._used[-2] if len(self._used) > 1 else None
        step = -1 if at + 1 < len(layers) and before is layers[at + 1] else 1
        return layers[at + step] if 0 <= at + step < len(layers) else None

    # -- reading -----------------------------------------------------------------------------

    def _read(self, group: StreamedGroup, blocks: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """A group as the model wants it: read, processed, laid out in these blocks."""
        # Whatever the caller's modes are, what is read stays an ordinary tensor.
        with torch.inference_mode(False), torch.no_grad():
            processed = any(self._flags.values())
            places = group.layout.place(blocks)
            # On a GPU they are unpacked and processed.
            device = None if self._device.type == "cpu" else self._device
            tensors = self._source.group(
                *(group.part_of, self.cfg, self.read_as, places),
                without=group.without,
                device=device,
            )
            if processed:
                consume = self._source.gives_copies
                tensors = process_group(
                    group.part_of, tensors, self.cfg, consume=consume, **self._flags
                )
            filled = store(places, tensors)
            fill_rest(places, filled, unread(self.cfg))
            return places

    # -- gradients ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def graph_without_weights(self) -> Iterator[None]:
        """In the block, autograd remembers which weights it will need, and keeps none alive."""
        if not torch.is_grad_enabled():
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Any:
        owner = self._owners.get(tensor.untyped_storage().data_ptr())
        if owner is None or not owner[0].is_here:
            return tensor
        group, number = owner
        place = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
        return group, number, place, group.edits()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        group, number, place, edits = packed
        group.bring()
        if group.edits() != edits:
            raise EditedError(
                f"weights of {group.name} were written to between the forward and the backward "
                f"pass. Run the forward again."
            )
        for at, (_, tensor) in enumerate(group.storages()):
            if at == number:
                return tensor.detach().as_strided(*place)
        raise AssertionError(f"{group.name} has no block of memory {number}")
