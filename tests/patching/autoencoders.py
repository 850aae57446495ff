"""Autoencoders for tests: random weights in float64, about half of the features active."""

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """Rectified codes, and one matrix and a bias back."""

    def __init__(self, width: int, n_features: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, scale: float) -> nn.Parameter:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(values * scale)

        self.W_enc = drawn(width, n_features, scale=width**-0.5)
        self.W_dec = drawn(n_features, width, scale=2 * n_features**-0.5)
        self.b_enc = drawn(n_features, scale=0.1)
        self.b_dec = drawn(width, scale=0.1)
        self.encoded: list[int] = []

    def encode(self, x: Tensor) -> Tensor:
        self.encoded.append(x.shape[:-1].numel())
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.W_dec + self.b_dec


class Curved(Linear):
    """A decoder that is no matrix."""

    def decode(self, codes: Tensor) -> Tensor:
        return torch.tanh(super().decode(codes))


class TopK(Linear):
    """The largest eight codes of each row."""

    def encode(self, x: Tensor) -> Tensor:
        codes = super().encode(x)
        kept = codes.topk(8, -1)
        return torch.zeros_like(codes).scatter(-1, kept.indices, kept.values)


class Scaled(Linear):
    """Reads rows of about one norm, and gives each its own back: decoding goes by the last
    encoding."""

    def encode(self, x: Tensor) -> Tensor:
        self.norm = 1.0 + x.norm(dim=-1, keepdim=True)
        return super().encode(4 * x / self.norm)

    def decode(self, codes: Tensor) -> Tensor:
        out = super().decode(codes) * self.norm / 4
        del self.norm
        return out


class Heads(Linear):
    """Wants the heads of z apart, as SAELens' do that reshape."""

    hook_z_reshaping_mode = True

    def encode(self, x: Tensor) -> Tensor:
        self.d_head = x.shape[-1]
        return super().encode(x.flatten(-2))

    def decode(self, codes: Tensor) -> Tensor:
        return super().decode(codes).unflatten(-1, (-1, self.d_head))


class TopKOfBatch(Linear):
    """The largest codes of all rows together: no row's codes are its own."""

    def encode(self, x: Tensor) -> Tensor:
        codes = super().encode(x)
        kept = codes.flatten().topk(4 * x.shape[:-1].numel())
        return torch.zeros_like(codes.flatten()).scatter(0, *kept[::-1]).view_as(codes)
