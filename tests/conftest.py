"""What holds for every test: no network, one thread, fixed seeds, and no state left behind."""

import os

# Before torch or huggingface_hub is imported: both read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import ipaddress
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests import checking

# Before fastlens is imported: its modules are decorated while they load.
checking.install()

torch.set_num_threads(1)

# The same examples in every run, and no verdict that depends on how busy the machine is.
settings.register_profile("fastlens", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("fastlens")


class NetworkBlocked(RuntimeError):
    """A test that is not marked ``hub`` tried to reach the network."""


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):
        return True  # AF_UNIX: a path
    host = address[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "")


def _guard(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, address: Any) -> Any:
        if not _is_local(address):
            raise NetworkBlocked(f"a test asked for a connection to {address!r}: mark it `hub`")
        return connect(self, address)

    return guarded


def _guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
    if host is not None and not _is_local((host,)):
        raise NetworkBlocked(f"a test asked for the address of {host!r}: mark it `hub`")
    return _REAL["getaddrinfo"](host, *args, **kwargs)


_REAL: dict[str, Any] = {
    "connect": socket.socket.connect,
    "connect_ex": socket.socket.connect_ex,
    "getaddrinfo": socket.getaddrinfo,
}


def _block_network(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(socket.socket, "connect", _guard(_REAL["connect"]))
    patch.setattr(socket.socket, "connect_ex", _guard(_REAL["connect_ex"]))
    patch.setattr(socket, "getaddrinfo", _guarded_lookup)


@pytest.fixture(scope="session", autouse=True)
def network_blocked() -> Iterator[None]:
    """No connection leaves the machine, in fixtures of any scope too."""
    with pytest.MonkeyPatch.context() as patch:
        _block_network(patch)
        yield


@pytest.fixture(autouse=True)
def network_for_hub_tests(
    request: pytest.FixtureRequest, network_blocked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gives the network back to a test marked ``hub``."""
    if request.node.get_closest_marker("hub") is not None:
        monkeypatch.setattr(socket.socket, "connect", _REAL["connect"])
        monkeypatch.setattr(socket.socket, "connect_ex", _REAL["connect_ex"])
        monkeypatch.setattr(socket, "getaddrinfo", _REAL["getaddrinfo"])


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Seeds before each test; torch's global switches put back after it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype is torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that ``torch.empty`` and its kin return is NaN (integers: the largest value).

    Code that reads what it never wrote then shows, instead of passing on a zeroed page.
    """

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            with torch.no_grad():
                return tensor if tensor.is_meta else _poison(tensor)

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
