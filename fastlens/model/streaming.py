"""`Streaming`: how much memory a model whose weights are streamed may take, and who gets it."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, MemoryLimitError, StreamError
from fastlens.memory import bytes_of, return_freed, said_bytes, used_bytes
from fastlens.weights.embedding_rows import EmbeddingRows, UnembedColumns
from fastlens.weights.on_demand import parameters_on_meta
from fastlens.weights.source import Source
from fastlens.weights.stream import WeightStream

M = TypeVar("M")
OFFLOADS = ("disk", "cpu")
# What math libraries and threads take when they first run: code pages, stacks, buffers.
FIRST_USE_BYTES = 48 * 2**20


class Streaming:
    """Memory of one streamed model.

    ``max_memory`` is what this process may take beyond what it took when the model was opened; on a
    GPU, what its tensors may take (not run on a GPU). Activations come first: weights take what is
    left, at least one layer, and as many as fit.

    Attributes:
        limit: ``max_memory`` in bytes, or None: then two layers are in memory at a time.
        baseline: What the process held when the model was opened.
        stream: What reads the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        flags: Mapping[str, bool],
        limit: int | None,
        baseline: int,
    ):
        self.cfg: HookedTransformerConfig = model.cfg  # type: ignore[assignment]
        self.limit = limit
        self.baseline = baseline
        self._device = torch.device(self.cfg.device or "cpu")
        self._reserved: int | None = None
        self._at_load = 0
        self.stream = WeightStream(model, source, flags, self._device, self._for_weights)
        self._at_load = max(0, used_bytes(self._device) - baseline)
        needed = self.smallest_limit
        if limit is not None and limit < needed:
            raise MemoryLimitError(
                f"max_memory={limit:,} bytes ({said_bytes(limit)}) is too little for this model: "
                f"its largest layer, the one that follows and what reading them takes need "
                f"{needed:,} ({said_bytes(needed)}), activations not counted. Give more."
            )

    @property
    def block_bytes(self) -> list[int]:
        """Memory of each layer's weights."""
        return [group.nbytes for group in self.stream.layers]

    @property
    def fewest_bytes(self) -> int:
        """Of weights that are in memory at once, at least: two layers, or the unembedding."""
        return self._together + self.stream.transient

    @property
    def _together(self) -> int:
        largest = sorted(self.block_bytes)[-2:]
        return max(sum(largest), *(group.nbytes for group in self.stream.groups.values()))

    @property
    def smallest_limit(self) -> int:
        """The smallest ``max_memory`` with which anything can run."""
        return self.fewest_bytes + self._others(self.stream.held)

    def _others(self, held: int) -> int:
        """What is in memory and is not weights, and what libraries will take at first use."""
        others = max(0, used_bytes(self._device) - self.baseline - held)
        if self._device.type != "cpu":
            return others
        return max(others, self._at_load + FIRST_USE_BYTES)

    def _for_weights(self, held: int) -> int:
        """Bytes that weights may hold now, of which they hold ``held``."""
        if self.limit is None:
            return self._together
        least = self._together if self._reserved is None else self._reserved
        left = self._left(held)
        if left < least:
            return_freed()
            left = self._left(held)
        # What was reserved may not be in use yet, and what is in use may be more.
        return left if self._reserved is None else min(left, self._reserved)

    def _left(self, held: int) -> int:
        assert self.limit is not None
        return self.limit - self._others(held) - self.stream.transient

    def room(self) -> int:
        """Bytes that activations may take now, with the fewest weights in memory."""
        if self.limit is None:
            raise StreamError("there is no max_memory, so no limit to what activations may take.")
        return max(0, self.limit - self._others(self.stream.held) - self.fewest_bytes)

    @contextlib.contextmanager
    def reserve(self, n: int) -> Iterator[None]:
        """In the block, weights leave ``n`` bytes to activations, and autograd keeps none alive.

        Raises: MemoryLimitError if weights and ``n`` bytes do not fit into ``max_memory``.
        """
        if self.limit is None or self._reserved is not None:
            with self.stream.graph_without_weights():
                yield
            return
        room = self.room()
        if n > room:
            return_freed()
            room = self.room()
        held = self.stream.held
        if n > room:
            short = n - room
            raise MemoryLimitError(
                f"{said_bytes(n)} of activations were asked for, and max_memory="
                f"{said_bytes(self.limit)} leaves {said_bytes(room)} beside the weights. Give at "
                f"least max_memory={self.limit + short:,}, or fewer tokens at a time."
            )
        self._reserved = self._left(held) - n
        try:
            self.stream.let_go(keep=self._reserved)
            with self.stream.graph_without_weights():
                yield
        finally:
            self._reserved = None

    def traced(self, activation: Tensor) -> Tensor:
        """The activation, or where gradients are recorded a copy that they can be taken of.

        Weights that are streamed take no gradients, so the first activations begin the graph.
        """
        if not torch.is_grad_enabled() or activation.requires_grad:
            return activation
        # A copy of a leaf: hooks may write to it in place.
        return activation.detach().requires_grad_().clone()

    @contextlib.contextmanager
    def run(
        self,
        residual: Float[Tensor, "batch pos d_model"],
        n_layers: int,
        n_logits: int,
    ) -> Iterator[None]:
        """One forward: memory for its activations, and no weights kept alive for gradients.

        Args:
            n_layers: That it runs.
            n_logits: Rows of logits that it returns.
        """
        needed = self._forward_bytes(residual, n_layers, n_logits)
        with self.reserve(needed):
            yield

    def _forward_bytes(self, residual: Tensor, n_layers: int, n_logits: int) -> int:
        """An upper bound of what a fused forward takes beside what is in memory already."""
        cfg = self.cfg
        rows = residual.shape[0] * residual.shape[1]
        heads = cfg.n_heads + 2 * (cfg.n_key_value_heads or cfg.n_heads)
        widest = max(3 * heads * cfg.d_head, 3 * (cfg.d_mlp or 0))
        layer = rows * (5 * cfg.d_model + widest)
        numbers = layer
        if torch.is_grad_enabled():
            # Every layer's activations wait for the backward pass.
            numbers = layer * max(1, n_layers)
        return (numbers + 2 * n_logits * cfg.d_vocab_out) * cfg.dtype.itemsize


def stream_limit(offload: str, max_memory: Any) -> int | None:
    """``max_memory`` in bytes.

    Raises: ConfigError for arguments that mean nothing.
    """
    if offload not in OFFLOADS:
        raise ConfigError(
            f"offload={offload!r} must be 'disk' (weights stay in their files) or 'cpu' (in "
            f"memory as the files have them, packed or in 16 bits)."
        )
    return None if max_memory is None else bytes_of(max_memory)


def streamed_model(
    build: Callable[[], M],
    source: Source,
    cfg: HookedTransformerConfig,
    flags: Mapping[str, bool],
    limit: int | None,
    offload: str,
) -> M:
    """A model whose weights come when they are asked for.

    Args:
        build: Makes the model, of whose parameters only shapes are kept.
        limit, offload: As `stream_limit` takes and gives them.

    Raises: StreamError for weights that cannot be read piece by piece; MemoryLimitError for too
        small a limit.
    """
    files = source.files
    if files is None:
        raise StreamError(
            "offload= and max_memory= read weights from safetensors or GGUF files again and "
            "again. These are in neither: they are in memory (hf_model=) or in .bin files, which "
            "transformers' save_pretrained writes as safetensors."
        )
    device = torch.device(cfg.device or "cpu")
    baseline = used_bytes(device)
    with parameters_on_meta():
        model = build()
    assert isinstance(model, nn.Module)
    _settle_tables(model, device)
    return_freed()
    if offload == "cpu":
        files.hold()
    streaming = Streaming(model, source, flags, limit, baseline)
    # Weights and what refers to them form circles, which would be found late.
    weakref.finalize(model, streaming.stream.close)
    model.streaming = streaming  # type: ignore[assignment]
    embedding = streaming.stream, source, flags
    model.embed.rows = EmbeddingRows.of(*embedding)  # type: ignore[union-attr]
    model.unembed.columns = UnembedColumns.of(*embedding)  # type: ignore[union-attr]
    return model


def _settle_tables(model: nn.Module, device: torch.device) -> None:
    """Layers that rotate alike share one pair of tables, on the device."""
    seen: list[Tensor] = []
    for module in model.modules():
        for name, table in module._buffers.items():
            if table is None:
                continue
            moved = table.to(device)
            same = (one for one in seen if one.shape == moved.shape and torch.equal(one, moved))
            module._buffers[name] = next(same, moved)
            if module._buffers[name] is moved and table.numel() > 1:
                seen.append(moved)


def refuse_streamed(model: Any, what: str, instead: str) -> None:
    """Raises: StreamError if the model's weights are streamed."""
    if getattr(model, "streaming", None) is not None:
        raise StreamError(
            f"{what} needs all weights in memory, and this model's are streamed "
            f"(offload= or max_memory= in from_pretrained). {instead}"
        )
