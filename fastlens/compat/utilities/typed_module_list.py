"""A list of modules that type checkers know the elements of."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch.nn as nn

T = TypeVar("T", bound=nn.Module)


class TypedModuleList(nn.ModuleList, Generic[T]):
    """``nn.ModuleList`` itself; ``TypedModuleList[Block]`` says that it holds blocks."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[T]: ...  # type: ignore[override]
