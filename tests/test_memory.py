"""How much memory there is, and amounts as people write them."""

import collections

import pytest
import torch

from fastlens import memory
from fastlens.errors import ConfigError
from fastlens.memory import UNKNOWN_BYTES, bytes_of, free_bytes, said_bytes


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (1, 1),
        (2**40, 2**40),
        ("123", 123),
        ("1B", 1),
        ("500 MB", 500_000_000),
        ("2GiB", 2 * 2**30),
        ("2gib", 2 * 2**30),
        (" 1.5 GB ", 1_500_000_000),
        ("0.5KiB", 512),
        ("3kb", 3000),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("7MiB", 7 * 2**20),
    ],
)
def test_amounts(amount, expected):
    assert bytes_of(amount) == expected
    assert isinstance(bytes_of(amount), int)


@pytest.mark.parametrize("amount", ["", "much", "2 gigs", "-1GB", "1,5GB", "GB", "1e9", "2GB free"])
def test_what_is_no_amount(amount):
    with pytest.raises(ConfigError, match="is no amount. Write bytes as a number, or as '500MB'"):
        bytes_of(amount)


@pytest.mark.parametrize("amount", [0, -5, "0GB", "0.1B"])
def test_less_than_a_byte(amount):
    with pytest.raises(ConfigError, match="at least one byte; got"):
        bytes_of(amount)


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**20, "1 MiB"),
        (3.25 * 2**30, "3.25 GiB"),
        (123.4 * 2**30, "123 GiB"),
        (2**40, "1 TiB"),
        (5000 * 2**40, "5e+03 TiB"),
    ],
)
def test_amounts_for_people(n, said):
    assert said_bytes(n) == said


@pytest.mark.parametrize("n", [1, 2**10, 3 * 2**20, 5 * 2**30, 7 * 2**40])
def test_what_is_said_can_be_read(n):
    assert bytes_of(said_bytes(n).replace(" bytes", "")) == n


# -- what is free --------------------------------------------------------------------------------


def test_some_memory_is_free():
    assert free_bytes("cpu") > 2**20
    assert free_bytes(torch.device("cpu")) > 0


@pytest.fixture
def system(monkeypatch):
    """A pretended Linux: paths -> contents. An absent path does not exist."""
    files = {}

    class Pretended:
        def __init__(self, path):
            self.path = str(path)

        def __truediv__(self, name):
            return Pretended(f"{self.path}/{name}")

        def is_file(self):
            return self.path in files

        def read_text(self, encoding=None):
            if self.path not in files:
                raise FileNotFoundError(self.path)
            return files[self.path]

    monkeypatch.setattr(memory, "Path", Pretended)
    return files


MEMINFO = "MemTotal: 16000 kB\nMemFree:  100 kB\nMemAvailable:  8000 kB\n"
GROUP = "/sys/fs/cgroup"


def test_what_linux_says(system):
    system["/proc/meminfo"] = MEMINFO
    assert free_bytes() == 8000 * 1024


def test_a_container_may_leave_less(system):
    system["/proc/meminfo"] = MEMINFO
    system[f"{GROUP}/memory.max"] = "3000000\n"
    system[f"{GROUP}/memory.current"] = "1000000\n"
    system[f"{GROUP}/memory.stat"] = "anon 600000\n"
    assert free_bytes() == 2_000_000
    # Files that were read count as used there, and can be given up.
    system[f"{GROUP}/memory.stat"] = "anon 600000\ninactive_file 300000\n"
    assert free_bytes() == 2_300_000
    system[f"{GROUP}/memory.max"] = "9000000000000\n"
    assert free_bytes() == 8000 * 1024
    system[f"{GROUP}/memory.max"] = "max\n"
    assert free_bytes() == 8000 * 1024


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/proc/meminfo", "MemTotal: 16000 kB\n"),
        (f"{GROUP}/memory.max", "3000000\n"),
        (f"{GROUP}/memory.max", "strange\n"),
    ],
)
def test_where_the_system_does_not_say(system, path, text):
    assert free_bytes() == UNKNOWN_BYTES
    system[path] = text
    assert free_bytes() == UNKNOWN_BYTES


def test_a_gpus_own_memory(monkeypatch):
    info = collections.namedtuple("Info", "free total")(5, 7)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: info)
    assert free_bytes("cuda:1") == 5
