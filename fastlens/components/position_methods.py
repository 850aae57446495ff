"""`PositionMethods`: tables of rotary and ALiBi positions as methods of attention.

The library itself reads `rotary_tables` and `alibi_slopes`; these are for code that calls or
overrides TransformerLens' methods.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.components.rotary_tables import rotary_tables
from fastlens.config import HookedTransformerConfig
from fastlens.kernels.masks import alibi_slopes


class PositionMethods:
    """What TransformerLens' attention classes can say about positions."""

    cfg: HookedTransformerConfig
    attn_type: str

    def calculate_sin_cos_rotary(
        self,
        rotary_dim: int,
        n_ctx: int,
        base: float | int = 10000,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Float[Tensor, "n_ctx rotary_dim"], Float[Tensor, "n_ctx rotary_dim"]]:
        """(sin, cos) of the angles for positions ``0 .. n_ctx - 1``, scaled as the config says."""
        cfg = copy.copy(self.cfg)
        cfg.rotary_dim, cfg.rotary_base, cfg.rotary_base_local = rotary_dim, base, None
        return rotary_tables(cfg, n_ctx, dtype, self.attn_type == "local")

    def rotate_every_two(
        self, x: Float[Tensor, "... rotary_dim"]
    ) -> Float[Tensor, "... rotary_dim"]:
        """A quarter turn of every pair: ``(x0, x1)`` becomes ``(-x1, x0)``.

        Pairs are neighbours where ``cfg.rotary_adjacent_pairs``, else one half with the other.
        """
        if self.cfg.rotary_adjacent_pairs:
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

    @staticmethod
    def create_alibi_slope(
        n_ctx: int, device: str | torch.device | None = None
    ) -> Float[Tensor, "query key"]:
        """Minus the distance from query back to key; 0 for keys that come later."""
        positions = torch.arange(n_ctx, device=device)
        return (positions - positions[:, None]).clamp(max=0).float()

    @staticmethod
    def create_alibi_multipliers(
        n_heads: int, device: str | torch.device | None = None
    ) -> Float[Tensor, " head"]:
        """Each head's slope (Press et al. 2108.12409): ``2 ** (-8 (h + 1) / n_heads)``.

        Where ``n_heads`` is no power of two, the paper's interleaved series.
        """
        return alibi_slopes(n_heads, torch.device(device or "cpu"), torch.float32)

    @staticmethod
    def create_alibi_bias(
        n_heads: int, n_ctx: int, device: str | torch.device | None = None
    ) -> Float[Tensor, "head query key"]:
        """What ALiBi adds to the attention scores of each head."""
        slopes = PositionMethods.create_alibi_multipliers(n_heads, device)
        return slopes[:, None, None] * PositionMethods.create_alibi_slope(n_ctx, device)
