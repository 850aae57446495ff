"""The wave: all runs of a chunk in one pass over the layers.

At each layer the rows of the base run, of the other prompt and of every run under way go through
norms, projections and MLP as one matrix product each, so weights are read once; runs whose first
patch is in the layer join there. See `fastlens.patching.pack` for how rows are found, and
`fastlens.patching.plan` for which runs are here at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.patching.codes import PlacedCodes
from fastlens.patching.pack import Pack
from fastlens.patching.plan import COUNTED, Frame
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
        rotary_pos: Each token's position as rotary counts it.
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
    """One pass over the layers for one chunk.

    Attributes:
        model: A model of plain fastlens modules.
        frame: What the plan was made for.
        stem: Base runs and other prompts at the embedding.
        sources: What `PlannedPatch.value` counts.
        n_all_pos: Positions of the prompts; ``frame.n_pos`` may be fewer.
        streams: Layer -> the stems' own rows as they enter it.
        keep_streams: Whether to fill ``streams``, for chunks whose runs join at later layers.
        codes: What `PlannedPatch.codes` counts.
        pack: Which packed row is whose, as of now.
        n_stems: Branches of base runs and other prompts, which come first.
        stem_of: The stem whose masks and positions are a branch's.
        key_mask: Each branch's mask, False where a key is padding; or None.
        needed: Positions whose logits are read.
    """

    model: Any
    frame: Frame
    stem: Stem
    sources: list[Source]
    n_all_pos: int
    streams: dict[int, Tensor] = field(default_factory=dict)
    keep_streams: bool = False
    codes: Sequence[PlacedCodes] = ()
    pack: Pack = field(init=False)
    n_stems: int = field(init=False, default=0)
    stem_of: Int[Tensor, " branch"] = field(init=False)
    key_mask: Bool[Tensor, "branch pos"] | None = field(init=False, default=None)
    needed: Bool[Tensor, " pos"] = field(init=False)

    def run(self, use: ChunkUse, first_layer: int = 0) -> Final:
        """All branches of the chunk to the end.

        Args:
            use: Who patches what.
            first_layer: Where the first run joins; earlier layers are left out if their streams
                are kept.
        """
        frame, model = self.frame, self.model
        if self.keep_streams and not self.streams:
            self._fill_streams()
        layer = first_layer if first_layer in self.streams else 0
        x = self._start(use, layer)
        counts = torch.zeros(frame.n_layers, len(COUNTED), dtype=torch.long)
        for block in model.blocks[layer:]:
            x = WaveLayer(self, use, layer, block, counts[layer]).run(x)
            layer += 1
        return Final(x, self.pack.table, self.n_stems, counts)

    def _fill_streams(self) -> None:
        """The stems alone, layer by layer.

        Not taken from a chunk on the way: the rows beside them would show in their last bits, and
        so would which chunks a resumed sweep has found finished.
        """
        nobody = ChunkUse(np.zeros((0, self.frame.batch), np.int64), np.zeros(0, np.int64))
        x = self._start(nobody, 0)
        counts = torch.zeros(len(COUNTED), dtype=torch.long)
        for layer, block in enumerate(self.model.blocks[:-1], 1):
            x = WaveLayer(self, nobody, layer - 1, block, counts).run(x)
            stems = self.pack.table[: self.n_stems][self.pack.own[: self.n_stems]]
            self.streams[layer] = x[stems]

    def _start(self, use: ChunkUse, layer: int) -> Tensor:
        """The pack of base runs and other prompts, and their stream where ``layer`` begins."""
        frame, device = self.frame, self.stem.residual.device
        batch, n_pos = frame.batch, frame.n_pos
        self.n_stems = self.stem.residual.shape[0]
        own = torch.zeros(self.n_stems + len(use.example), n_pos, dtype=torch.bool, device=device)
        own[:batch] = True
        if frame.has_source:
            first = torch.tensor(frame.first_difference, device=device)
            own[batch : self.n_stems] = torch.arange(n_pos, device=device) >= first[:, None]
            if not frame.is_causal:
                own[batch : self.n_stems] = True
        examples = torch.arange(batch, device=device)
        of_stems = examples.repeat(self.n_stems // batch)
        example = torch.cat([of_stems, torch.from_numpy(use.example).to(device)])
        self.pack = Pack.of(example, own, batch)
        # Base branches share a row of masks and positions with the runs made from them.
        self.stem_of = torch.where(
            torch.arange(len(example), device=device) < self.n_stems,
            torch.arange(len(example), device=device),
            example,
        )
        mask = self.stem.key_mask
        self.key_mask = None if mask is None else mask[self.stem_of, :n_pos]
        self.needed = torch.zeros(n_pos, dtype=torch.bool, device=device)
        self.needed[list(frame.needed)] = True
        if layer:
            return self.streams[layer]
        return self.stem.residual[self.pack.branch, self.pack.pos]
