"""xIELU, the activation with two trained slopes (Apertus)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class XIELU(nn.Module):
    """Expanded integral of the ELU (Huang and Schlag, 2411.13010).

    ``a_p x^2 + b x`` above zero, ``(expm1(min(x, eps)) - x) a_n + b x`` below, with
    ``a_p = softplus(alpha_p)`` and ``a_n = b + softplus(alpha_n)`` trained, as in Hugging Face.
    """

    beta: Tensor
    eps: Tensor

    def __init__(
        self,
        alpha_p_init: float = 0.8,
        alpha_n_init: float = 0.8,
        beta_init: float = 0.5,
        eps: float = -1e-6,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.alpha_p = nn.Parameter(_inverse_softplus(alpha_p_init).to(dtype))
        self.alpha_n = nn.Parameter(_inverse_softplus(alpha_n_init - beta_init).to(dtype))
        self.register_buffer("beta", torch.tensor(beta_init, dtype=dtype))
        # Rounded to float32 first, as in checkpoints.
        self.register_buffer("eps", torch.tensor(eps).to(dtype))

    def forward(self, input: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The activation, elementwise."""
        x = input
        positive = F.softplus(self.alpha_p)
        negative = self.beta + F.softplus(self.alpha_n)
        below = (torch.expm1(torch.minimum(x, self.eps)) - x) * negative + self.beta * x
        return torch.where(x > 0, positive * x * x + self.beta * x, below)


def _inverse_softplus(value: float) -> Tensor:
    return torch.log(torch.expm1(torch.tensor(value)))
