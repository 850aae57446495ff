"""`FactoredMatrix`: a low-rank matrix kept as the product of two thin ones."""

import warnings
from typing import Any, Union, overload

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from fastlens.errors import ShapeError


class FactoredMatrix:
    """The matrix ``A @ B``, never multiplied out unless asked.

    >>> OV = FactoredMatrix(torch.randn(12, 768, 64), torch.randn(12, 64, 768))
    >>> OV.shape, OV.svd()[1].shape, OV[3].norm().shape
    (torch.Size([12, 768, 768]), torch.Size([12, 64]), torch.Size([]))

    A head's QK and OV circuits are such matrices: ``d_model x d_model`` of rank ``d_head``
    (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). Leading axes are a
    batch of matrices; those of A and B are broadcast against each other.

    ``ldim`` and ``rdim`` are the sides of the product, ``mdim`` the axis between the factors,
    ``shape`` and ``ndim`` those of the product.

    Args:
        A, B: The factors. They are kept, not copied.

    Raises: ShapeError if the inner axes differ or the leading axes do not broadcast.
    """

    def __init__(
        self, A: Float[Tensor, "*lead_a ldim inner_a"], B: Float[Tensor, "*lead_b inner_b rdim"]
    ):
        if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2]:
            raise ShapeError(
                "the factors must be matrices that share the inner axis: A is "
                f"{tuple(A.shape)}, B is {tuple(B.shape)}."
            )
        self.ldim: int = A.shape[-2]
        self.mdim: int = A.shape[-1]
        self.rdim: int = B.shape[-1]
        self.has_leading_dims = A.ndim > 2 or B.ndim > 2
        try:
            lead = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except RuntimeError as error:
            raise ShapeError(
                f"the leading axes of the factors do not broadcast: A is {tuple(A.shape)}, B is "
                f"{tuple(B.shape)}."
            ) from error
        self.shape = torch.Size([*lead, self.ldim, self.rdim])
        # A leaf stays a leaf (and keeps its .grad) where nothing has to be repeated.
        self.A = A if A.shape[:-2] == lead else A.expand(*lead, self.ldim, self.mdim)
        self.B = B if B.shape[:-2] == lead else B.expand(*lead, self.mdim, self.rdim)
        self._svd: tuple[Any, tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def ndim(self) -> int:
        """Number of axes of the product."""
        return len(self.shape)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """``(A, B)``, broadcast to the same leading axes."""
        return self.A, self.B

    @property
    def AB(self) -> Float[Tensor, "*lead ldim rdim"]:
        """The product, multiplied out: ``ldim x rdim`` numbers for every leading index."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "*lead mdim mdim"]:
        """The product the other way round, small, with the same nonzero eigenvalues as ``AB``.

        Raises: ShapeError unless ``ldim == rdim``.
        """
        if self.ldim != self.rdim:
            raise ShapeError(f"BA needs a square product; this one is {self.ldim} x {self.rdim}.")
        return self.B @ self.A

    @property
    def T(self) -> "FactoredMatrix":
        """The transpose of the last two axes: factors ``B.mT`` and ``A.mT``."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @overload
    def __matmul__(self, other: Tensor) -> Union["FactoredMatrix", Tensor]: ...

    @overload
    def __matmul__(self, other: "FactoredMatrix") -> "FactoredMatrix": ...

    def __matmul__(
        self, other: Union["FactoredMatrix", Float[Tensor, "..."]]
    ) -> Union["FactoredMatrix", Float[Tensor, "..."]]:
        """Product with a vector (gives a tensor), a matrix or a FactoredMatrix (stays factored).

        The new inner axis is the smaller of the two candidates, so chains of products stay thin.
        """
        if isinstance(other, FactoredMatrix):
            left = self @ other.A
            assert isinstance(left, FactoredMatrix)
            return left @ other.B
        meets = other.shape[-2] if other.ndim > 1 else other.numel()
        if meets != self.rdim:
            raise ShapeError(
                f"cannot multiply {tuple(self.shape)} by {tuple(other.shape)} on the right: "
                f"{self.rdim} meets {meets}."
            )
        if other.ndim < 2:
            return (self.A @ (self.B @ other.unsqueeze(-1))).squeeze(-1)
        if self.mdim < self.rdim:
            return FactoredMatrix(self.A, self.B @ other)
        return FactoredMatrix(self.AB, other)

    def __rmatmul__(
        self, other: Float[Tensor, "..."]
    ) -> Union["FactoredMatrix", Float[Tensor, "..."]]:
        """``tensor @ self``: see `__matmul__`."""
        if other.shape[-1:] != (self.ldim,):
            raise ShapeError(
                f"cannot multiply {tuple(self.shape)} by {tuple(other.shape)} on the left: "
                f"{other.shape[-1] if other.ndim else 1} meets {self.ldim}."
            )
        if other.ndim < 2:
            return ((other.unsqueeze(-2) @ self.A) @ self.B).squeeze(-2)
        if self.mdim < self.ldim:
            return FactoredMatrix(other @ self.A, self.B)
        return FactoredMatrix(other, self.AB)

    def __mul__(self, scalar: int | float | Tensor) -> "FactoredMatrix":
        """Times a number or a tensor of one element; A carries it.

        Raises: ShapeError for a larger tensor (``@`` is the matrix product).
        """
        if isinstance(scalar, Tensor):
            if scalar.numel() != 1:
                raise ShapeError(
                    f"`*` takes a scalar, got a tensor of shape {tuple(scalar.shape)}. "
                    "Use @ for the matrix product."
                )
            # Extra axes of length one must not become leading axes of the product.
            scalar = scalar.reshape(1) if scalar.ndim else scalar
        return FactoredMatrix(self.A * scalar, self.B)

    def __rmul__(self, scalar: int | float | Tensor) -> "FactoredMatrix":
        """A number times the matrix."""
        return self * scalar

    def svd(
        self,
    ) -> tuple[
        Float[Tensor, "*lead ldim rank"],
        Float[Tensor, "*lead rank"],
        Float[Tensor, "*lead rdim rank"],
    ]:
        """``(U, S, V)`` with ``AB = U @ S.diag() @ V.T``; ``rank = min(ldim, mdim, rdim)``.

        S is in falling order; the signs of a column of U and of V are arbitrary, but agree. QR of
        the tall factors, then the SVD of the small product of the triangles: errors are a few
        roundings of the largest singular value. 16-bit factors are worked on, and answered, in
        float32. Computed once and kept until a factor changes.
        """
        key = self._state()
        if self._svd is None or self._svd[0] != key:
            self._svd = key, self._compute_svd()
        return self._svd[1]

    def _compute_svd(self) -> tuple[Tensor, Tensor, Tensor]:
        A, B = _distinct(self.A), _distinct(self.B)
        if self.mdim >= min(self.ldim, self.rdim):
            U, S, Vh = torch.linalg.svd(A @ B, full_matrices=False)
            return U, S, Vh.mT
        Qa, Ra = torch.linalg.qr(A)
        Qb, Rb = torch.linalg.qr(B.mT)
        U, S, Vh = torch.linalg.svd(Ra @ Rb.mT, full_matrices=False)
        return Qa @ U, S, Qb @ Vh.mT

    def _state(self) -> tuple[Any, ...]:
        """What a kept SVD depends on: the factors as they are now, and whether grads are taken."""
        versions = [None if x.is_inference() else x._version for x in self.pair]
        return id(self.A), id(self.B), *versions, torch.is_grad_enabled()

    @property
    def U(self) -> Float[Tensor, "*lead ldim rank"]:
        """Left singular vectors, the columns."""
        return self.svd()[0]

    @property
    def S(self) -> Float[Tensor, "*lead rank"]:
        """Singular values, largest first."""
        return self.svd()[1]

    @property
    def V(self) -> Float[Tensor, "*lead rdim rank"]:
        """Right singular vectors, the columns."""
        return self.svd()[2]

    @property
    def Vh(self) -> Float[Tensor, "*lead rdim rank"]:
        """Deprecated, and not what it says: V. TransformerLens' old name for it."""
        warnings.warn(
            "FactoredMatrix.Vh returns V, not its transpose. Use V, or V.mT for the transpose.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.V

    @property
    def eigenvalues(self) -> Complex[Tensor, "*lead mdim"]:
        """Eigenvalues of BA, which are those of AB up to zeros; complex, in no special order.

        16-bit factors are worked on in float32. Raises: ShapeError unless ``ldim == rdim``.
        """
        return torch.linalg.eigvals(_at_least_32_bits(self.BA))

    def norm(self) -> Float[Tensor, "*lead"]:
        """Frobenius norm of the product.

        ``|AB|^2 = sum((A.T A) * (B B.T))``: two small Gram matrices, in float64 for factors of 32
        bits or fewer, where it is more exact than the sum of squared singular values even if the
        product nearly cancels. Factors that are float64 already go through QR, which squares
        nothing. 16-bit factors are answered in float32.
        """
        A, B = _distinct(self.A), _distinct(self.B)
        if A.dtype == B.dtype == torch.float32 and A.device.type != "mps":
            A64, B64 = A.double(), B.double()
            squared = torch.einsum("...ij,...ji->...", A64.mT @ A64, B64 @ B64.mT)
            return squared.clamp_min(0).sqrt().to(A.dtype)
        if self.mdim < min(self.ldim, self.rdim):
            A, B = torch.linalg.qr(A).R, torch.linalg.qr(B.mT).R.mT
        return (A @ B).square().sum((-2, -1)).sqrt()

    def make_even(self) -> "FactoredMatrix":
        """The same matrix as ``(U sqrt(S)) @ (sqrt(S) V.T)``: factors of equal size, orthogonal."""
        U, S, V = self.svd()
        root = S.sqrt()
        return FactoredMatrix(U * root[..., None, :], root[..., :, None] * V.mT)

    def collapse_l(self) -> Float[Tensor, "*lead rank rdim"]:
        """``S V.T``: the product without its left rotation; inner products of columns are kept."""
        _, S, V = self.svd()
        return S[..., :, None] * V.mT

    def collapse_r(self) -> Float[Tensor, "*lead ldim rank"]:
        """``U S``: the product without its right rotation; inner products of rows are kept."""
        U, S, _ = self.svd()
        return U * S[..., None, :]

    def get_corner(self, k: int = 3) -> Float[Tensor, "..."]:
        """The first ``k`` entries along every axis of the product, for a look."""
        corner = self.A[..., :k, :] @ self.B[..., :, :k]
        return corner[(slice(k),) * corner.ndim]

    def unsqueeze(self, k: int) -> "FactoredMatrix":
        """A new leading axis of length one before axis ``k``.

        Raises: ShapeError if that would put it behind a side of the matrix.
        """
        lead = self.ndim - 2
        at = k + self.ndim + 1 if k < 0 else k
        if not 0 <= at <= lead:
            raise ShapeError(
                f"unsqueeze({k}) of {tuple(self.shape)} would not give a leading axis. Use 0 to "
                f"{lead}."
            )
        return FactoredMatrix(self.A.unsqueeze(at), self.B.unsqueeze(at))

    def __getitem__(self, idx: Any) -> "FactoredMatrix":
        """Index leading axes, then rows, then columns; the result is still factored.

        Leading axes are indexed as in torch. An int on rows or columns keeps its axis, with length
        one, since the result must stay a matrix. Rows and columns are each indexed by themselves
        (lists of both give the block, not pairs).

        Raises: ShapeError for too many indices, IndexError for one out of range.
        """
        lead, row, col = self._split_index(idx if isinstance(idx, tuple) else (idx,))
        A, B = self.A[lead], self.B[lead]
        return FactoredMatrix(A[..., row, :], B[..., :, col])

    def _split_index(self, idx: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any, Any]:
        n_lead = self.ndim - 2
        taken = sum(_axes_taken(part) for part in idx)
        if taken > self.ndim:
            raise ShapeError(f"{taken} indices for a FactoredMatrix of shape {tuple(self.shape)}.")
        parts = list(idx)
        dots = [i for i, part in enumerate(parts) if part is Ellipsis]
        if len(dots) > 1:
            raise IndexError("an index can only have a single ellipsis ('...')")
        at = dots[0] if dots else len(parts)
        parts[at : at + 1] = [slice(None)] * (self.ndim - taken)

        lead: list[Any] = []
        used = 0
        while parts and (used < n_lead or parts[0] is None):
            used += _axes_taken(parts[0])
            lead.append(parts.pop(0))
        if used != n_lead or len(parts) != 2 or any(_axes_taken(part) != 1 for part in parts):
            raise ShapeError(
                f"cannot index a FactoredMatrix of shape {tuple(self.shape)} so: new axes and "
                "masks belong to the leading axes, before rows and columns."
            )
        return tuple(lead), _keep_axis(parts[0], self.ldim), _keep_axis(parts[1], self.rdim)

    def __repr__(self) -> str:
        return f"FactoredMatrix: Shape({self.shape}), Hidden Dim({self.mdim})"


def composition_scores(
    left: FactoredMatrix, right: FactoredMatrix, broadcast_dims: bool = True
) -> Float[Tensor, "..."]:
    """How much of what ``left`` writes ``right`` reads: ``|left @ right| / (|left| |right|)``.

    Frobenius norms; from 0 to 1 (Elhage et al. 2021, "A Mathematical Framework for Transformer
    Circuits"). Cost: one product of the inner axes for every pair.

    Args:
        broadcast_dims: Every matrix of ``left`` with every one of ``right``: the leading axes of
            both, one after the other. False takes the leading axes to be the same.

    Raises: ShapeError unless ``left.rdim == right.ldim``.
    """
    if left.rdim != right.ldim:
        raise ShapeError(
            f"left writes {left.rdim} numbers, right reads {right.ldim}: {tuple(left.shape)} meets "
            f"{tuple(right.shape)}."
        )
    if broadcast_dims:
        left_axes, right_axes = left.ndim - 2, right.ndim - 2
        for _ in range(left_axes):
            right = right.unsqueeze(0)
        for axis in range(right_axes):
            left = left.unsqueeze(left_axes + axis)
    # Same norm as the whole product, but mdim x mdim a pair.
    product = left.collapse_l() @ right.collapse_r()
    return product.norm(dim=(-2, -1)) / left.norm() / right.norm()


def _at_least_32_bits(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _distinct(factor: Tensor) -> Tensor:
    """The factor in at least 32 bits, its repeats along leading axes taken once."""
    for axis in range(factor.ndim - 2):
        if factor.stride(axis) == 0:
            factor = factor.narrow(axis, 0, min(1, factor.shape[axis]))
    return _at_least_32_bits(factor)


def _axes_taken(part: Any) -> int:
    if part is None or part is Ellipsis:
        return 0
    is_mask = getattr(part, "dtype", None) in (torch.bool, bool)
    return part.ndim if is_mask else 1


def _keep_axis(part: Any, length: int) -> Any:
    """An int as a slice of length one; anything else unchanged."""
    if not hasattr(part, "__index__") or getattr(part, "ndim", 0):
        return part
    i = part.__index__()
    if not -length <= i < length:
        raise IndexError(f"index {i} is out of range for an axis of length {length}")
    return slice(i % length, i % length + 1)
