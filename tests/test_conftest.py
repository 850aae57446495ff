"""The guards of conftest.py do guard."""

import random
import socket
import warnings

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from fastlens.ops.norm import layer_norm
from tests.configs import TINY_CONFIGS, tiny
from tests.conftest import NetworkBlocked


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.invalid", 443), ("::2", 1, 0, 0)])
def test_connections_are_refused(address):
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    with socket.socket(family) as sock, pytest.raises(NetworkBlocked, match="mark it `hub`"):
        sock.connect(address)
    with pytest.raises(NetworkBlocked):
        socket.create_connection(("example.invalid", 443), timeout=1)


def test_loopback_is_allowed():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as client,
    ):
        assert client.getpeername() == server.getsockname()


DRAWS = []


@pytest.mark.parametrize("run", [1, 2])
def test_every_test_starts_from_the_same_seeds(run):
    del run
    DRAWS.append((torch.rand(()).item(), random.random(), np.random.rand()))
    assert DRAWS[-1] == DRAWS[0]
    assert DRAWS[0][0] == torch.rand((), generator=torch.Generator().manual_seed(0)).item()


def test_one_thread():
    assert torch.get_num_threads() == 1


def test_poisoned_memory_shows(poison_empty):
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.int64)).eq(2**63 - 1).all()
    assert torch.zeros(2).new_empty(4).isnan().all()
    assert torch.empty(2, requires_grad=True).isnan().all()
    assert torch.zeros(3).eq(0).all()


def test_memory_is_not_poisoned_unless_asked():
    assert torch.empty.__module__ != __name__
    assert "poison" not in getattr(torch.empty, "__qualname__", "")


def test_a_stray_warning_is_an_error():
    with pytest.raises(UserWarning, match="stray"):
        warnings.warn("stray", UserWarning, stacklevel=1)


def test_shapes_and_types_of_calls_are_checked():
    with pytest.raises(TypeCheckError):
        layer_norm(torch.ones(2, 3), torch.ones(4))
    with pytest.raises(TypeCheckError):
        layer_norm(torch.ones(2, 3), eps="1e-5")


def test_tiny_tables_are_copied_not_shared():
    local = tiny("local", n_layers=1)
    local["attn_types"].append("global")
    assert TINY_CONFIGS["local"]["attn_types"] == ["global", "local"]
    assert TINY_CONFIGS["local"]["n_layers"] == 2
