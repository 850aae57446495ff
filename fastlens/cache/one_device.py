"""Reading a cache whose activations lie on several devices as if they lay on one."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from fastlens.cache.activations import Activations
from fastlens.hooks.derived import Derived

P = ParamSpec("P")
R = TypeVar("R")


class _Gathered(dict[str, Tensor]):
    """Activations by name, each copied to a device when it is read."""

    def __init__(self, held: dict[str, Tensor], device: torch.device):
        # Names only: values are read from what is held.
        super().__init__((name, torch.empty(0)) for name in held)
        self._held = held
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name].to(self._device)


def device_of_sums(cache: Activations) -> torch.device | None:
    """Where the cache's methods bring what they add up: ``cfg.device`` of its model.

    None where nothing has to be brought: the model's layers lie on one device, or the activations
    do (``run_with_cache(device=)``, ``cache.to``).
    """
    is_one = getattr(cache.model, "placement", None) is None
    if is_one or isinstance(cache.cache_dict, _Gathered):
        return None
    found: set[torch.device] = set()
    for _, entry in cache._entries():
        found |= {x.device for x in (entry.held() if isinstance(entry, Derived) else [entry])}
    if len(found) < 2:
        return None
    return torch.device(cache.model.cfg.device)


def sums_on_one_device(method: Callable[P, R]) -> Callable[P, R]:
    """A method that mixes layers reads them on one device; see `device_of_sums`.

    Tensors that the caller gives it are brought there too.
    """

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        cache = cast(Activations, args[0])
        device = device_of_sums(cache)
        if device is None:
            return method(*args, **kwargs)
        gathered = type(cache)(
            _Gathered(cache.cache_dict, device), cache.model, cache.has_batch_dim
        )

        def there(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        moved = {name: there(x) for name, x in kwargs.items()}
        return cast(Callable[..., R], method)(gathered, *map(there, args[1:]), **moved)

    return wrapper
