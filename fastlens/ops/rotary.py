"""Rotary position embedding."""

from jaxtyping import Float
from torch import Tensor

from fastlens.ops.dispatch import kernel_for


def rotary(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "#batch pos rotary_dim"],
    sin: Float[Tensor, "#batch pos rotary_dim"],
    adjacent_pairs: bool = False,
) -> Float[Tensor, "batch pos head d_head"]:
    """Turn pairs of channels by an angle that grows with the position (Su et al. 2104.09864).

    Args:
        x: Queries or keys. Channels beyond ``rotary_dim`` pass unchanged.
        cos, sin: Rows of the tables for these positions; both halves of ``rotary_dim`` (or both
            members of a pair) hold the same angle.
        adjacent_pairs: Pairs are channels (0, 1), (2, 3) ... as in GPT-J; otherwise (0, d/2),
            (1, d/2 + 1) ... as in GPT-NeoX and Llama.

    Numerics: in the dtype of x. Differentiable in x.
    """
    return kernel_for("rotary", x.device.type, x.dtype)(x, cos, sin, adjacent_pairs)
