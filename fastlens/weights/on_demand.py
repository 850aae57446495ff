"""Parameters that are not in memory until somebody reads them.

A module keeps its parameters in a dict; `OnDemand` is such a dict that asks its group to come when
an entry is read. So whatever reads a weight, a forward, a sweep or a user, finds it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn as nn
from torch import Tensor

from fastlens.errors import StreamError


@runtime_checkable
class Group(Protocol):
    """Parameters that come and go together."""

    name: str

    def bring(self) -> None:
        """Put the parameters into their modules' dicts."""
        ...

    def keep(self, why: str) -> None:
        """Bring them, and never let them go: they are no longer what the file says."""
        ...


class Place(NamedTuple):
    """Where a parameter lies: in which block of memory, and how."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Layout:
    """How a group's parameters lie in memory: which of them share a block, and where.

    Attributes:
        dtypes: Of each parameter.
        sizes: Numbers in each block.
        places: By parameter name.
        nbytes: Of all blocks.
        largest: Bytes of the largest block.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.sizes: list[int] = []
        self.places: dict[str, Place] = {}
        numbers: dict[int, int] = {}
        self.dtypes = {name: p.dtype for name, p in parameters.items()}
        self.nbytes = self.largest = 0
        for name, parameter in parameters.items():
            storage = parameter.untyped_storage()
            key = storage._cdata
            if key not in numbers:
                numbers[key] = len(self.sizes)
                self.sizes.append(storage.nbytes() // parameter.element_size())
                self.nbytes += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
            self.places[name] = Place(
                numbers[key],
                tuple(parameter.shape),
                tuple(parameter.stride()),
                int(parameter.storage_offset()),
            )

    def place(self, blocks: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Each parameter as a view of its block of memory."""
        return {
            name: blocks[place.storage].as_strided(place.shape, place.stride, place.offset)
            for name, place in self.places.items()
        }

    def kinds(self) -> dict[int, tuple[int, torch.dtype]]:
        """(numbers, dtype) of each block."""
        return {
            place.storage: (self.sizes[place.storage], self.dtypes[name])
            for name, place in self.places.items()
        }


class StreamedParameter(nn.Parameter):
    """A parameter read from disk. Reaching for ``data`` keeps its group: it may be written to."""

    fastlens_group: Group | None

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The tensor without its history."""
        if getattr(self, "fastlens_group", None) is not None:
            assert self.fastlens_group is not None
            self.fastlens_group.keep("its .data was asked for")
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        if getattr(self, "fastlens_group", None) is not None:
            assert self.fastlens_group is not None
            self.fastlens_group.keep("its .data was set")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


# What may be asked of a weight that is away.
_KNOWN = frozenset(
    {
        *("shape", "dtype", "ndim", "requires_grad", "is_leaf", "is_meta", "grad", "layout"),
        *("nbytes", "itemsize", "names", "is_sparse", "is_quantized", "_backward_hooks"),
        *("size", "dim", "numel", "nelement", "stride", "element_size", "__len__", "__hash__"),
        *("is_floating_point", "is_complex", "ndimension", "_version"),
    }
)


class AwayParameter(nn.Parameter):
    """Stands for a weight that is not in memory: it has a shape and dtype, and refuses the rest.

    ``named_parameters`` and the like give it, as they are there to count and to list. Without a
    refusal, what is written to it would be lost in silence.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name not in _KNOWN:
            raise StreamError(
                f"{name} was asked of a weight that is not in memory, as named_parameters() and "
                f"parameters() list it while it is away. Read it by its place instead, such as "
                f"model.blocks[0].attn.W_Q: that brings its layer."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AwayParameter({list(self.shape)}, {self.dtype}, not in memory)"


class OnDemand(dict[str, Any]):
    """A module's parameters by name; reading one brings its group into memory.

    Iterating (``named_parameters``) brings nothing: what is away is an `AwayParameter`.
    """

    def __init__(self, entries: Mapping[str, Any], group: Group):
        super().__init__(entries)
        self._group = group

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if value is None:
            return None
        self._group.bring()
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As a dict's, bringing the group if the name is here."""
        if name not in self:
            return default
        return self[name]

    def __setitem__(self, name: str, value: Any) -> None:
        # Before it is replaced, or what comes later would replace it back.
        self._group.keep(f"{name} was replaced")
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._group.keep(f"{name} was removed")
        super().__delitem__(name)

    def put(self, name: str, value: Any) -> None:
        """Set an entry without keeping the group."""
        super().__setitem__(name, value)

    def held(self, name: str) -> Any:
        """The entry as it is, in memory or not."""
        return super().__getitem__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StreamError(
            "a model whose weights are streamed cannot be copied or pickled: its weights are in a "
            "file. Load it again with from_pretrained."
        )

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__reduce_ex__(2)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built in the block have parameters on the meta device; buffers are made as always.

    Those that share a block of memory share one there too.
    """
    before = nn.Module.register_parameter
    # Of the module under construction only: freed memory is given out again.
    shared: dict[int, tuple[Any, Tensor]] = {}
    owner: list[nn.Module] = []

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if owner != [module]:
                shared.clear()
                owner[:] = [module]
            storage = parameter.untyped_storage()
            if storage.data_ptr() not in shared:
                size = storage.nbytes() // parameter.element_size()
                block = torch.empty(size, dtype=parameter.dtype, device="meta")
                shared[storage.data_ptr()] = (storage, block)
            block = shared[storage.data_ptr()][1]
            view = block.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
            parameter = nn.Parameter(view, requires_grad=False)
        before(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = before  # type: ignore[method-assign]
