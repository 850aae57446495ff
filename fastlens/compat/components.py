"""What TransformerLens has around its components, as classes with one static method, and types."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.components.mlp import CanBeUsedAsMLP, make_mlp
from fastlens.components.xielu import XIELU
from fastlens.config import HookedTransformerConfig
from fastlens.ops.activations import activation

# What TransformerLens' signatures call things.
SingleLoss: TypeAlias = Float[Tensor, ""]
LossPerToken: TypeAlias = Float[Tensor, "batch pos_minus_1"]
Loss: TypeAlias = SingleLoss | LossPerToken
RMSNormInput: TypeAlias = Float[Tensor, "batch pos length"] | Float[Tensor, "batch pos head length"]
DeviceType: TypeAlias = str | torch.device | None


@runtime_checkable
class TensorLike(Protocol):
    """What `FactoredMatrix` needs of a factor that is not a tensor."""

    @property
    def ndim(self) -> int:
        """Number of axes."""
        ...

    @property
    def shape(self) -> Any:
        """Lengths of the axes."""
        ...

    def size(self, dim: int) -> int:
        """Length of one axis."""
        ...

    def unsqueeze(self, dim: int) -> Any:
        """With one more axis, of length 1."""
        ...

    def squeeze(self, dim: int) -> Any:
        """Without an axis of length 1."""
        ...

    def broadcast_to(self, shape: Any) -> Any:
        """Repeated to a shape."""
        ...


class MLPFactory:
    """`fastlens.components.mlp.make_mlp` under TransformerLens' name."""

    @staticmethod
    def create_mlp(cfg: HookedTransformerConfig) -> CanBeUsedAsMLP:
        """The MLP the config asks for."""
        return make_mlp(cfg)


class ActivationFunctionFactory:
    """`fastlens.ops.activations.activation` under TransformerLens' name."""

    @staticmethod
    def pick_activation_function(cfg: HookedTransformerConfig) -> Callable[..., Any]:
        """The function ``cfg.act_fn`` names; for "xielu" a module with trained slopes.

        Raises: ConfigError (a ValueError) for an unknown name.
        """
        return XIELU() if cfg.act_fn == "xielu" else activation(cfg.act_fn)
