"""``transformer_lens.tools.analysis.svd_circuits``: singular vectors of a head's QK and OV maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.factored_matrix import FactoredMatrix

Which = Literal["QK", "OV"]
MAPS = ("QK", "OV")
# Keeps ratios finite where a singular value is about zero.
SMALLEST = 1e-12


class DegenerateDirectionError(ValueError):
    """A single direction was asked for that is defined up to a rotation only, or is null."""


@dataclass
class RankReportRow:
    """One singular direction: column ``idx`` of U and V.

    Attributes:
        sigma: Singular value; ``sigma_ratio`` is it over the largest.
        is_degenerate: Not to be read alone: it shares a block with a neighbour, or is null.
        is_null: The ratio is below ``null_rtol``.
        block_id: Which block of close neighbours it is in.
    """

    idx: int
    sigma: float
    sigma_ratio: float
    is_degenerate: bool
    is_null: bool
    block_id: int


@dataclass
class HeadSVD:
    """One map of a head as ``U @ diag(S) @ V.T``, singular values falling.

    Attributes:
        which: ``"QK"`` or ``"OV"``.
        U, V: Columns are the singular vectors: of QK, what queries and keys look for; of OV, what
            is read and what is written.
        rank_report: A row for each direction.
        eps: Relative gap below which neighbours share a block.
        null_rtol: Ratio to the largest singular value below which a direction is null.
    """

    which: Which
    layer: int
    head: int
    U: Float[Tensor, "d_model rank"]
    S: Float[Tensor, " rank"]
    V: Float[Tensor, "d_model rank"]
    rank_report: list[RankReportRow]
    eps: float
    null_rtol: float

    def is_degenerate(self, i: int) -> bool:
        """Whether direction ``i`` means nothing alone."""
        return self.rank_report[i].is_degenerate

    def block_of(self, i: int) -> list[int]:
        """The directions in the block of ``i``, itself included."""
        block = self.rank_report[i].block_id
        return [row.idx for row in self.rank_report if row.block_id == block]

    def degenerate_blocks(self) -> list[list[int]]:
        """Blocks to read as a subspace, or to skip."""
        blocks = [list(rows) for _, rows in groupby(self.rank_report, lambda row: row.block_id)]
        return [[row.idx for row in rows] for rows in blocks if any(r.is_degenerate for r in rows)]

    def require_isolated(self, i: int) -> None:
        """Raises: DegenerateDirectionError, with why, unless ``i`` can be read alone."""
        row = self.rank_report[i]
        if not row.is_degenerate:
            return
        why = f"is not apart from its neighbours by a relative gap of eps={self.eps:g}"
        if row.is_null:
            why = (
                f"is numerically null (sigma_ratio {row.sigma_ratio:.2e} < null_rtol "
                f"{self.null_rtol:.2e})"
            )
        raise DegenerateDirectionError(
            f"direction {i} of {self.which} of L{self.layer}H{self.head} {why}, so its vector is "
            f"arbitrary. Take the block {self.block_of(i)} as a subspace, or skip it."
        )


@dataclass
class HeadDecomposition:
    """Both maps of a head; None where one was not asked for."""

    layer: int
    head: int
    QK: HeadSVD | None = None
    OV: HeadSVD | None = None


def decompose_head(
    model: Any,
    layer: int,
    head: int,
    *,
    which: Sequence[str] = MAPS,
    eps: float = 1e-2,
    null_rtol: float | None = None,
) -> HeadDecomposition:
    """SVD of a head's ``W_Q W_K.T`` and ``W_V W_O``, from weights alone, factored throughout.

    Args:
        which: ``"QK"``, ``"OV"`` or both, as a sequence.
        eps: Neighbours closer than this relative gap share a block, in which vectors are defined
            only up to a rotation.
        null_rtol: Ratio to the largest singular value that counts as zero; by default ``d_model``
            times the machine epsilon, as ``torch.linalg.matrix_rank``.

    Numerics: float64 stays, everything else is float32.
    Raises: ValueError for a head that is not there, or an empty or wrong ``which``.
    """
    for name, index, size in (
        ("layer", layer, model.cfg.n_layers),
        ("head", head, model.cfg.n_heads),
    ):
        if not 0 <= index < size:
            raise ValueError(f"{name}={index} must be in [0, {size}).")
    if isinstance(which, str) or not which or not set(which) <= set(MAPS):
        raise ValueError(f"which={which!r} must be a sequence of some of {MAPS}, such as ('QK',).")
    attn = model.blocks[layer].attn

    def weight(name: str) -> Tensor:
        # W_K and W_V have an entry for each query head, under grouped attention too.
        found = getattr(attn, name)[head].detach()
        return found if found.dtype == torch.float64 else found.float()

    result = HeadDecomposition(layer, head)
    for one in dict.fromkeys(which):
        if one == "QK":
            factored = FactoredMatrix(weight("W_Q"), weight("W_K").T)
        else:
            factored = FactoredMatrix(weight("W_V"), weight("W_O"))
        U, S, V = factored.svd()
        tolerance = len(U) * torch.finfo(S.dtype).eps if null_rtol is None else null_rtol
        report = _report(S.tolist(), eps, tolerance)
        setattr(result, one, HeadSVD(one, layer, head, U, S, V, report, eps, tolerance))  # type: ignore[arg-type]
    return result


def _report(values: Sequence[float], eps: float, null_rtol: float) -> list[RankReportRow]:
    top = max(values[0] if values else 0.0, SMALLEST)
    ratios = [value / top for value in values]
    blocks: list[list[int]] = []
    for i, value in enumerate(values):
        is_close = i > 0 and 1.0 - value / max(values[i - 1], SMALLEST) < eps
        both_null = i > 0 and ratios[i] < null_rtol and ratios[i - 1] < null_rtol
        if is_close or both_null:
            blocks[-1].append(i)
        else:
            blocks.append([i])
    return [
        RankReportRow(
            idx=i,
            sigma=values[i],
            sigma_ratio=ratios[i],
            is_degenerate=len(block) > 1 or ratios[i] < null_rtol,
            is_null=ratios[i] < null_rtol,
            block_id=number,
        )
        for number, block in enumerate(blocks)
        for i in block
    ]
