"""A bias plus a matrix product, in one call of torch."""

import torch
from jaxtyping import Float
from torch import Tensor


def vanilla_addmm(
    input: Float[Tensor, "..."], mat1: Float[Tensor, "m n"], mat2: Float[Tensor, "n o"]
) -> Float[Tensor, "m o"]:
    """``input + mat1 @ mat2``, as `torch.addmm` rounds it; ``input`` is broadcast."""
    return torch.addmm(input, mat1, mat2)


def batch_addmm(
    bias: Float[Tensor, "..."],
    weight: Float[Tensor, "d_in d_out"],
    x: Float[Tensor, "*lead d_in"],
) -> Float[Tensor, "*lead d_out"]:
    """``bias + x @ weight`` for any leading axes, rounded as Hugging Face's ``Conv1D`` does."""
    product = vanilla_addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return product.view(*x.shape[:-1], weight.shape[-1])
