"""Blocks of memory that weights lie in, used again for the next layer's.

To touch new memory for the first time costs several times what filling it from the system's file
cache does.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fastlens.weights.tensor_files import fresh

# Of a storage that only one tensor looks into, and the question itself.
_ALONE = 2


class Blocks:
    """Memory that is lent out and comes back.

    Attributes:
        device: Where it is.
        nbytes: Of what is here and lent to nobody.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._spare: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Of what is here and lent to nobody."""
        return sum(block.nbytes for spare in self._spare.values() for block in spare)

    def fitting(self, kinds: Mapping[int, tuple[int, torch.dtype]]) -> int:
        """Bytes of ``kinds`` that `take` would not have to get new."""
        wanted = list(kinds.values())
        return sum(
            min(wanted.count(kind), len(self._spare.get(kind, ()))) * kind[0] * kind[1].itemsize
            for kind in set(wanted)
        )

    def take(self, kinds: Mapping[int, tuple[int, torch.dtype]]) -> dict[int, Tensor]:
        """Uninitialised blocks of (numbers, dtype), under the keys they were asked for by."""
        found = {}
        for key, (size, dtype) in kinds.items():
            spare = self._spare.get((size, dtype))
            if spare:
                found[key] = spare.pop()
            elif self.device.type == "cpu":
                found[key] = fresh((size,), dtype)
            else:
                found[key] = torch.empty(size, dtype=dtype, device=self.device)
        return found

    def give_back(self, blocks: Iterable[Tensor]) -> None:
        """Take blocks back; one that another tensor still looks into is left to that tensor."""
        for tensor in blocks:
            storage = tensor.untyped_storage()
            # A view that a user kept must never show another layer's weights.
            if torch._C._storage_Use_Count(storage._cdata) > _ALONE:
                continue
            size = storage.nbytes() // tensor.element_size()
            block = tensor.as_strided((size,), (1,), 0)
            self._spare.setdefault((size, tensor.dtype), []).append(block)

    def drop(self) -> None:
        """Free what is lent to nobody."""
        self._spare.clear()
