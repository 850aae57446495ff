"""Rows of many runs behind one another, and the table that says which row is whose.

Branch b at position t has the value of packed row ``table[b, t]``: its own where it differs from
the base run, the base run's row elsewhere. So keys of a prefix, queries of rows that attention will
change, and the rows a run starts from are all one gather.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from fastlens.kernels.spans import Span


@dataclass
class Pack:
    """Which packed row holds what.

    Attributes:
        example: Of each branch. The first branches are the base runs, one an example.
        table: Row of each branch's value at each position.
        own: Whether that row is the branch's own.
        branch, pos: Of each packed row.
    """

    example: Int[Tensor, " branch"]
    table: Int[Tensor, "branch pos"]
    own: Bool[Tensor, "branch pos"]
    branch: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]

    @classmethod
    def of(
        cls, example: Int[Tensor, " branch"], own: Bool[Tensor, "branch pos"], batch: int
    ) -> "Pack":
        """A pack of the rows in ``own``, branch by branch; the first ``batch`` ones are whole."""
        found = own.nonzero()
        rows = torch.arange(batch * own.shape[1], device=own.device).view(batch, -1)
        table = rows[example]
        table[own] = torch.arange(len(found), device=own.device)
        return cls(example, table, own, found[:, 0], found[:, 1])

    @classmethod
    def at(
        cls,
        example: Int[Tensor, " branch"],
        branch: Int[Tensor, " row"],
        pos: Int[Tensor, " row"],
        n_pos: int,
        batch: int,
    ) -> "Pack":
        """The pack whose rows are these, in this order; elsewhere a branch has its base run's."""
        table = torch.full((len(example), n_pos), -1, dtype=torch.long, device=example.device)
        table[branch, pos] = torch.arange(len(branch), device=example.device)
        own = table >= 0
        table = torch.where(own, table, table[:batch][example])
        return cls(example, table, own, branch, pos)

    def __len__(self) -> int:
        return self.branch.shape[0]

    def missing(self, wanted: Bool[Tensor, "branch pos"]) -> Int[Tensor, " row"]:
        """Make the wanted rows the branches' own, behind those there are.

        Returns: the packed rows that they start as copies of; empty if none was missing. Every
        tensor over the rows must be grown by them: ``cat([x, x[copied]])``.
        """
        new = (wanted & ~self.own).nonzero()
        branch, pos = new[:, 0], new[:, 1]
        copied = self.table[branch, pos]
        n_rows = len(self)
        self.table[branch, pos] = torch.arange(n_rows, n_rows + len(new), device=self.table.device)
        self.own[branch, pos] = True
        self.branch = torch.cat([self.branch, branch])
        self.pos = torch.cat([self.pos, pos])
        return copied

    def mask(
        self, branch: Int[Tensor, " entry"], pos: Int[Tensor, " entry"]
    ) -> Bool[Tensor, "branch pos"]:
        """These entries as a mask over the table."""
        mask = torch.zeros_like(self.own)
        mask[branch, pos] = True
        return mask


def spans_of(wanted: Bool[Tensor, "branch pos"]) -> list[Span]:
    """The wanted rows as runs of neighbouring positions, those of one extent together."""
    n_pos = wanted.shape[1]
    starts = (wanted & ~F.pad(wanted[:, :-1], (1, 0))).nonzero()
    stops = (wanted & ~F.pad(wanted[:, 1:], (0, 1))).nonzero()[:, 1] + 1
    code = starts[:, 1] * (n_pos + 1) + stops
    order = torch.argsort(code, stable=True)
    codes, sizes = torch.unique_consecutive(code[order], return_counts=True)
    branches = starts[order, 0].split(sizes.tolist())
    return [
        Span(branch, value // (n_pos + 1), value % (n_pos + 1))
        for branch, value in zip(branches, codes.tolist(), strict=True)
    ]


def regrouped(pack: Pack, spans: list[Span], batch: int) -> tuple[Pack, Int[Tensor, " row"]]:
    """The pack of the spans' rows in their order, and the old row of each new one.

    Base rows that no span holds are gone: no branch may need them any more.
    """
    device = pack.table.device
    branch = torch.cat([s.branches.repeat_interleave(s.stop - s.start) for s in spans])
    pos = torch.cat(
        [torch.arange(s.start, s.stop, device=device).repeat(len(s.branches)) for s in spans]
    )
    copied = pack.table[branch, pos]
    rows = torch.arange(len(branch), device=device)
    own = torch.zeros_like(pack.own)
    own[branch, pos] = True
    table = torch.full_like(pack.table, -1)
    table[branch, pos] = rows
    table = torch.where(own, table, table[:batch][pack.example])
    return Pack(pack.example, table, own, branch, pos), copied
