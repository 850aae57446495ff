"""The wave: all runs of a chunk in one pass over the layers.

At each layer the rows of the base run, of the other prompt and of every run under way go through
norms, projections and MLP as one matrix product each, so weights are read once; runs whose first
patch is in the layer join there. See `fastlens.patching.pack` for how rows are found, and
`fastlens.patching.plan` for which runs are here at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.patching.codes import PlacedCodes
from fastlens.patching.frame import BLOCKS, Blocks, Frame
from fastlens.patching.pack import Pack
from fastlens.patching.plan import COUNTED
from fastlens.patching.sources import Source
from fastlens.patching.uses import ChunkUse
from fastlens.patching.wave_layer import WaveLayer


@dataclass(frozen=True)
class Stem:
    """What the base runs and the other prompt start from, and what masks and positions are theirs.

    Attributes:
        residual: The stream that enters block 0, base examples then other ones.
        shortformer: Positions added to what queries and keys read, or None.
        key_mask: False where a key is padding, or None.
        rotary_pos: Each token's row in the rotary tables.
    """

    residual: Float[Tensor, "stems pos d_model"]
    shortformer: Float[Tensor, "stems pos d_model"] | None
    key_mask: Bool[Tensor, "stems pos"] | None
    rotary_pos: Int[Tensor, "stems pos"]


@dataclass
class Final:
    """Where the wave ends: the stream after the last block, of the rows whose logits are read.

    Attributes:
        x: Packed rows.
        table: Row of each branch at each position; -1 where nothing is kept.
        n_stems: Branches before the chunk's own: base runs, then the other prompts.
        counts: Rows that the products saw, base runs included, as `plan.COUNTED`.
    """

    x: Float[Tensor, "row d_model"]
    table: Int[Tensor, "branch pos"]
    n_stems: int
    counts: Int[Tensor, "layer counted"]


@dataclass
class Wave:
    """What all chunks of a sweep share, and the base runs' stream as far as it was made.

    Attributes:
        model: A model of plain fastlens modules.
        frame: What the plan was made for.
        stem: Base runs and other prompts at the embedding.
        sources: What `PlannedPatch.value` counts.
        n_all_pos: Positions of the prompts; ``frame.n_pos`` may be fewer.
        codes: What `PlannedPatch.codes` counts.
        blocks: How much some products hold at a time.
    """

    model: Any
    frame: Frame
    stem: Stem
    sources: list[Source]
    n_all_pos: int
    codes: Sequence[PlacedCodes] = ()
    blocks: Blocks = BLOCKS
    _stems: "ChunkState | None" = None

    @property
    def n_stems(self) -> int:
        """Branches of base runs and other prompts, which come first."""
        return self.stem.residual.shape[0]

    def run(self, use: ChunkUse, first_layer: int = 0) -> Final:
        """All branches of one chunk to the end.

        Args:
            use: Who patches what.
            first_layer: Where the first run joins; before it the base runs go alone, once for
                chunks that are made in the order in which they join.
        """
        layers = range(first_layer, self.frame.n_layers)
        state = self.begun(use, first_layer)
        for layer in layers:
            state.advance(self.model.blocks[layer])
        return state.final()

    def begun(self, use: ChunkUse, layer: int) -> "ChunkState":
        """A chunk where ``layer`` begins: only base runs and other prompts have rows of their own.

        The stream is that of the base runs alone, never that of another chunk on its way: the rows
        beside them would show in their last bits, and so would which chunks a resumed sweep has
        found finished.
        """
        if not layer:
            return ChunkState.at_the_embedding(self, use)
        stems = self.stems_at(layer)
        state = ChunkState.at_the_embedding(self, use)
        state.layer = layer
        state.x = stems.x[stems.pack.table[: self.n_stems][stems.pack.own[: self.n_stems]]]
        return state

    def stems_at(self, layer: int) -> "ChunkState":
        """Base runs and other prompts alone, where ``layer`` begins."""
        if self._stems is None or self._stems.layer > layer:
            nobody = ChunkUse(np.zeros((0, self.frame.batch), np.int64), np.zeros(0, np.int64))
            self._stems = ChunkState.at_the_embedding(self, nobody)
        while self._stems.layer < layer:
            self._stems.advance(self.model.blocks[self._stems.layer])
        return self._stems

    def forget_stems(self) -> None:
        """Free the base runs' stream; the next chunk makes it again."""
        self._stems = None


@dataclass
class ChunkState:
    """One chunk where a layer begins: all that it needs to go on, in memory or out of it.

    Attributes:
        wave: What it shares with other chunks.
        use: Who patches what.
        layer: The next one.
        pack: Which packed row is whose.
        stem_of: The stem whose masks and positions are a branch's.
        key_mask: Each branch's mask, False where a key is padding; or None.
        needed: Positions whose logits are read.
        counts: Rows that the products saw so far, as `plan.COUNTED`.
    """

    wave: Wave
    use: ChunkUse
    layer: int
    pack: Pack
    stem_of: Int[Tensor, " branch"]
    key_mask: Bool[Tensor, "branch pos"] | None
    needed: Bool[Tensor, " pos"]
    counts: Int[Tensor, "layer counted"]
    _x: Tensor | None = None

    @classmethod
    def at_the_embedding(cls, wave: Wave, use: ChunkUse) -> "ChunkState":
        """Base runs and other prompts in front of the first layer."""
        frame, device, n_stems = wave.frame, wave.stem.residual.device, wave.n_stems
        batch, n_pos = frame.batch, frame.n_pos
        own = torch.zeros(n_stems + len(use.example), n_pos, dtype=torch.bool, device=device)
        own[:batch] = True
        if frame.has_source:
            first = torch.tensor(frame.first_difference, device=device)
            own[batch:n_stems] = torch.arange(n_pos, device=device) >= first[:, None]
            if not frame.is_causal:
                own[batch:n_stems] = True
        state = cls._of(wave, use, 0, Pack.of(_examples(wave, use), own, batch))
        state.x = wave.stem.residual[state.pack.branch, state.pack.pos]
        return state

    @classmethod
    def _of(cls, wave: Wave, use: ChunkUse, layer: int, pack: Pack) -> "ChunkState":
        frame, device = wave.frame, wave.stem.residual.device
        number = torch.arange(len(pack.example), device=device)
        # Base branches share a row of masks and positions with the runs made from them.
        stem_of = torch.where(number < wave.n_stems, number, pack.example)
        mask = wave.stem.key_mask
        key_mask = None if mask is None else mask[stem_of, : frame.n_pos]
        needed = torch.zeros(frame.n_pos, dtype=torch.bool, device=device)
        needed[list(frame.needed)] = True
        counts = torch.zeros(frame.n_layers, len(COUNTED), dtype=torch.long)
        return cls(wave, use, layer, pack, stem_of, key_mask, needed, counts)

    @property
    def x(self) -> Tensor:
        """The stream's packed rows."""
        assert self._x is not None, "a chunk was used after a layer of it had failed"
        return self._x

    @x.setter
    def x(self, rows: Tensor) -> None:
        self._x = rows

    @property
    def frame(self) -> Frame:
        """What the plan was made for."""
        return self.wave.frame

    @property
    def sources(self) -> list[Source]:
        """What `PlannedPatch.value` counts."""
        return self.wave.sources

    @property
    def codes(self) -> Sequence[PlacedCodes]:
        """What `PlannedPatch.codes` counts."""
        return self.wave.codes

    @property
    def n_all_pos(self) -> int:
        """Positions of the prompts."""
        return self.wave.n_all_pos

    @property
    def n_stems(self) -> int:
        """Branches of base runs and other prompts."""
        return self.wave.n_stems

    @property
    def stem(self) -> Stem:
        """Masks and positions."""
        return self.wave.stem

    @property
    def blocks(self) -> Blocks:
        """How much some products hold at a time."""
        return self.wave.blocks

    def advance(self, block: Any) -> None:
        """Through the next layer. After an error the chunk cannot go on: its rows may be edited."""
        layer, waiting = self.layer, [self.x]
        self._x = None
        # Handed over, so that the layer can free it.
        out = WaveLayer(self, self.use, layer, block, self.counts[layer]).run(waiting.pop())
        self._x = out
        self.layer += 1

    def final(self) -> Final:
        """The end, behind the last layer."""
        return Final(self.x, self.pack.table, self.n_stems, self.counts)

    def packed(self) -> dict[str, Tensor]:
        """What `unpacked` cannot work out: rows, whose they are, and counts."""
        whose = torch.stack([self.pack.branch, self.pack.pos]).int()
        return {"x": self.x, "whose": whose, "counts": self.counts}

    @classmethod
    def unpacked(
        cls, wave: Wave, use: ChunkUse, layer: int, tensors: Mapping[str, Tensor]
    ) -> "ChunkState":
        """The state that gave ``packed``, on the wave's device."""
        device = wave.stem.residual.device
        branch, pos = tensors["whose"].to(device).long()
        example, frame = _examples(wave, use), wave.frame
        state = cls._of(wave, use, layer, Pack.at(example, branch, pos, frame.n_pos, frame.batch))
        state.x = tensors["x"].to(device)
        state.counts = tensors["counts"].cpu()
        return state


def _examples(wave: Wave, use: ChunkUse) -> Tensor:
    """Of each branch."""
    device, batch = wave.stem.residual.device, wave.frame.batch
    of_stems = torch.arange(batch, device=device).repeat(wave.n_stems // batch)
    return torch.cat([of_stems, torch.from_numpy(use.example).to(device)])
