"""``transformer_lens.tools.analysis.projection_kernel``: how much two subspaces overlap.

The projection kernel of orthonormal bases U and V is ``|U.T V|^2`` (Frobenius), the sum of the
squared cosines of their principal angles: it does not depend on the bases chosen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.errors import ShapeError

AttentionRole = Literal["Q", "K", "V", "O"]
LayerOrder = Literal["forward", "all"]
HeadKind = Literal["query", "kv"]


@dataclass(frozen=True)
class SubspaceBasis:
    """The column space of a matrix.

    Attributes:
        basis: Orthonormal columns.
        singular_values: All of the matrix, falling.
        rank: Directions that were kept; ``measured_rank`` is how many are not null.
        rtol: Ratio to the largest singular value that counts as null; ``threshold`` is that value.
        input_shape: Of the matrix.
    """

    basis: Float[Tensor, "ambient rank"]
    singular_values: Float[Tensor, " spectrum"]
    rank: int
    measured_rank: int
    rtol: float
    threshold: float
    input_shape: tuple[int, int]

    @property
    def ambient_dim(self) -> int:
        """Dimension of the space around it."""
        return self.basis.shape[0]


@dataclass(frozen=True)
class ProjectionKernelResult:
    """The kernel, it over ``sqrt(rank_a rank_b)``, and the principal angles (radians)."""

    score: Float[Tensor, ""]
    normalized: Float[Tensor, ""]
    cosines: Float[Tensor, " principal_angle"]
    angles: Float[Tensor, " principal_angle"]
    rank_a: int
    rank_b: int
    ambient_dim: int


@dataclass(frozen=True)
class RandomSubspaceReference:
    """Mean and variance of the kernel of two independent random subspaces of one rank."""

    ambient_dim: int
    rank: int
    mean: float
    variance: float


@dataclass(frozen=True)
class AttentionHeadRef:
    """One head's weights in one role; ``kind`` says whether K and V heads are counted."""

    layer: int
    head: int
    role: AttentionRole
    kind: HeadKind

    @property
    def label(self) -> str:
        """``L3H7``."""
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True)
class HeadAffinityPair:
    """A source head, a target head, and their kernel."""

    source: AttentionHeadRef
    target: AttentionHeadRef
    score: float
    normalized: float


@dataclass(frozen=True)
class HeadAffinityResult:
    """Kernels of what heads write with what heads read.

    Attributes:
        scores, normalized: 0 where ``valid_mask`` is not set.
        source_layer_indices, target_layer_indices: The layers along those axes.
        source_ranks, target_ranks: Of each head's weights, before they were cut to ``source_rank``
            and ``target_rank``.
        rank, rtol: As asked for, and as used.
    """

    scores: Float[Tensor, "source_layer source_head target_layer target_head"]
    normalized: Float[Tensor, "source_layer source_head target_layer target_head"]
    valid_mask: Bool[Tensor, "source_layer source_head target_layer target_head"]
    source_role: AttentionRole
    target_role: AttentionRole
    source_layer_indices: tuple[int, ...]
    target_layer_indices: tuple[int, ...]
    source_head_kind: HeadKind
    target_head_kind: HeadKind
    source_ranks: Int[Tensor, "source_layer source_head"]
    target_ranks: Int[Tensor, "target_layer target_head"]
    source_rank: int
    target_rank: int
    rank: int | None
    rtol: float

    def top_pairs(self, k: int = 20, *, normalized: bool = False) -> list[HeadAffinityPair]:
        """The ``k`` strongest valid pairs, equal ones by source and then target."""
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k={k!r} must be a positive integer.")
        by = self.normalized if normalized else self.scores
        cells = sorted(self.valid_mask.nonzero().tolist(), key=lambda c: (-float(by[tuple(c)]), c))
        return [self._pair(*cell) for cell in cells[:k]]

    def _pair(self, a: int, head_a: int, b: int, head_b: int) -> HeadAffinityPair:
        layer_a, layer_b = self.source_layer_indices[a], self.target_layer_indices[b]
        return HeadAffinityPair(
            AttentionHeadRef(layer_a, head_a, self.source_role, self.source_head_kind),
            AttentionHeadRef(layer_b, head_b, self.target_role, self.target_head_kind),
            float(self.scores[a, head_a, b, head_b]),
            float(self.normalized[a, head_a, b, head_b]),
        )


def orthonormal_subspace(
    matrix: Float[Tensor, "ambient width"], *, rank: int | None = None, rtol: float | None = None
) -> SubspaceBasis:
    """An orthonormal basis of a matrix' columns: its leading left singular vectors.

    Args:
        rank: Keep this many; by default all that are not null.
        rtol: Ratio to the largest singular value that counts as null; by default the error of the
            decomposition or one rounding of the matrix' dtype, whichever is larger.

    Numerics: 16-bit matrices are widened to float32.
    Raises: ValueError for a matrix that is empty, not finite or null, or of lower rank than asked.
    """
    if matrix.ndim != 2 or 0 in matrix.shape or not bool(matrix.isfinite().all()):
        raise ValueError(
            f"matrix must be finite, [ambient, width] and not empty; got {list(matrix.shape)}."
        )
    shape = matrix.shape[0], matrix.shape[1]
    _check_rank(rank, min(shape))
    rtol = _tolerance(rtol, shape, matrix.dtype)
    left, values, _ = torch.linalg.svd(_wide(matrix), full_matrices=False)
    threshold = float(values[0]) * rtol
    measured = int((values > threshold).sum())
    kept = measured if rank is None else rank
    if not 0 < kept <= measured:
        raise ValueError(
            f"the matrix of shape {list(shape)} has rank {measured} (threshold {threshold:.3g}); "
            f"{'none' if rank is None else rank} can be kept."
        )
    return SubspaceBasis(left[:, :kept], values, kept, measured, rtol, threshold, shape)


def projection_kernel(
    subspace_a: SubspaceBasis, subspace_b: SubspaceBasis, *, check_orthonormal: bool = True
) -> ProjectionKernelResult:
    """The overlap of two subspaces, between 0 and the smaller rank.

    Raises: ValueError if they lie in different spaces or on different devices, or (with
        ``check_orthonormal``) a basis is not orthonormal.
    """
    a, b = subspace_a.basis, subspace_b.basis
    if a.shape[0] != b.shape[0] or a.device != b.device:
        raise ShapeError(
            f"the subspaces must lie in one space, on one device; they are {list(a.shape)} on "
            f"{a.device} and {list(b.shape)} on {b.device}."
        )
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = (_wide(basis.to(dtype)) for basis in (a, b))
    if check_orthonormal:
        tolerance = 10 * max(*a.shape, b.shape[1]) * torch.finfo(a.dtype).eps
        for name, basis in (("subspace_a", a), ("subspace_b", b)):
            one = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
            if not torch.allclose(basis.T @ basis, one, rtol=tolerance, atol=tolerance):
                raise ValueError(f"the columns of {name}.basis are not orthonormal.")
    overlap = a.T @ b
    rank_a, rank_b = a.shape[1], b.shape[1]
    score = _within(overlap.square().sum(), min(rank_a, rank_b))
    cosines = _within(torch.linalg.svdvals(overlap), 1)
    return ProjectionKernelResult(
        score=score,
        normalized=score / math.sqrt(rank_a * rank_b),
        cosines=cosines,
        angles=cosines.acos(),
        rank_a=rank_a,
        rank_b=rank_b,
        ambient_dim=a.shape[0],
    )


def random_projection_kernel_moments(ambient_dim: int, rank: int) -> RandomSubspaceReference:
    """What the kernel of two independent uniformly random subspaces is on average.

    Trained heads are neither independent nor uniform: it is a mark to look at, not a test.
    """
    _check_count("ambient_dim", ambient_dim, 2, math.inf)
    _check_count("rank", rank, 1, ambient_dim)
    d, r = ambient_dim, rank
    variance = 2 * r**2 * (d - r) ** 2 / (d**2 * (d - 1) * (d + 2))
    return RandomSubspaceReference(d, r, r**2 / d, variance)


def attention_head_subspace_affinity(
    model: Any,
    *,
    source_role: str = "O",
    target_role: str,
    layer_order: str = "forward",
    rank: int | None = None,
    rtol: float | None = None,
) -> HeadAffinityResult:
    """The kernel of what each head writes (O) with what each head reads (Q, K or V).

    TransformerLens has this for its bridge only. K and V heads are those that the model stores, not
    repeated for query heads.

    Args:
        layer_order: ``"forward"`` keeps pairs whose target is in a later layer; ``"all"`` all.
        rank: Directions to keep of every head; by default all, and none may be null.
        rtol: As in `orthonormal_subspace`.

    Raises: ValueError for roles or orders that do not exist, or weights of too low a rank.
    """
    for name, value, allowed in (
        ("source_role", source_role, ("O",)),
        ("target_role", target_role, ("Q", "K", "V")),
        ("layer_order", layer_order, ("forward", "all")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {allowed}.")
    sources = [block.attn.W_O.detach().transpose(1, 2) for block in model.blocks]
    targets = [_read_weights(block.attn, target_role) for block in model.blocks]
    dtype = max((w.dtype for w in (*sources, *targets)), key=lambda one: torch.finfo(one).eps)
    ambient, width_a = sources[0].shape[1:]
    width_b = targets[0].shape[2]
    tolerance = _tolerance(rtol, (ambient, max(width_a, width_b)), dtype)
    _check_rank(rank, min(ambient, width_a, width_b))
    rank_a, rank_b = (width if rank is None else rank for width in (width_a, width_b))
    a, ranks_a = _bases(sources, rank_a, tolerance)
    b, ranks_b = _bases(targets, rank_b, tolerance)
    # One target layer at a time: all overlaps together are large.
    scores = torch.stack(
        [torch.einsum("lhdr,kds->lhkrs", a, one).square().sum((-2, -1)) for one in b], 2
    )
    scores = _within(scores, min(rank_a, rank_b))
    layers = torch.arange(len(sources), device=scores.device)
    valid = torch.ones_like(scores, dtype=torch.bool)
    if layer_order == "forward":
        valid = valid & (layers[:, None] < layers[None])[:, None, :, None]
    scores = scores.masked_fill(~valid, 0.0)
    numbers = tuple(range(len(sources)))
    return HeadAffinityResult(
        scores=scores,
        normalized=scores / math.sqrt(rank_a * rank_b),
        valid_mask=valid,
        source_role="O",
        target_role=target_role,  # type: ignore[arg-type]
        source_layer_indices=numbers,
        target_layer_indices=numbers,
        source_head_kind="query",
        target_head_kind="query" if target_role == "Q" else "kv",
        source_ranks=ranks_a,
        target_ranks=ranks_b,
        source_rank=rank_a,
        target_rank=rank_b,
        rank=rank,
        rtol=tolerance,
    )


def _read_weights(attn: Any, role: str) -> Tensor:
    w_k, w_v, _, _ = attn.key_value_leaves()
    return {"Q": attn.W_Q, "K": w_k, "V": w_v}[role].detach()


def _bases(weights: Sequence[Tensor], rank: int, rtol: float) -> tuple[Tensor, Tensor]:
    """Bases ``[layer, head, d_model, rank]`` and measured ranks ``[layer, head]``."""
    found = [
        [orthonormal_subspace(_wide(head), rank=rank, rtol=rtol) for head in layer]
        for layer in weights
    ]
    bases = torch.stack([torch.stack([one.basis for one in heads]) for heads in found])
    ranks = torch.tensor([[one.measured_rank for one in heads] for heads in found])
    return bases, ranks.to(bases.device)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def _tolerance(rtol: float | None, shape: tuple[int, int], dtype: torch.dtype) -> float:
    if rtol is None:
        of_svd = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        return max(max(shape) * of_svd, torch.finfo(dtype).eps)
    if isinstance(rtol, bool) or not math.isfinite(rtol) or rtol < 0:
        raise ValueError(f"rtol={rtol!r} must be a finite number, not below zero.")
    return float(rtol)


def _check_rank(rank: int | None, largest: int) -> None:
    if rank is not None:
        _check_count("rank", rank, 1, largest)


def _check_count(name: str, value: int, smallest: int, largest: int | float) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count or not smallest <= value <= largest:
        raise ValueError(f"{name}={value!r} must be an integer from {smallest} to {largest}.")


def _within(values: Tensor, upper: int) -> Tensor:
    """Values that rounding put outside [0, upper], put back.

    Raises: ValueError if they are further out.
    """
    tolerance = 100 * torch.finfo(values.dtype).eps * max(upper, values.ndim and len(values), 1)
    if bool((values < -tolerance).any()) or bool((values > upper + tolerance).any()):
        raise ValueError(f"an overlap lies outside [0, {upper}]: a basis is not orthonormal.")
    return values.clamp(0.0, float(upper))
