"""How much memory there is, and how users say how much of it may be taken."""

import ctypes
import functools
import mmap
import re
import sys
from pathlib import Path
from typing import Any

import torch

from fastlens.errors import ConfigError

# What is taken for granted where the system does not say.
UNKNOWN_BYTES = 2 * 2**30
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that can be taken on a device now without swapping."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_available(), _left_to_container()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else UNKNOWN_BYTES


def resident_bytes() -> int:
    """Memory of this process that is in RAM, mapped file pages included, in bytes.

    Where the system does not tell (no /proc): the most that it ever was.
    """
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def used_bytes(device: torch.device | str = "cpu") -> int:
    """What this process holds on a device now: `resident_bytes`, or tensors on a GPU."""
    device = torch.device(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def return_freed() -> None:
    """Give memory that was freed back to the system, which the C library else keeps for later."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _c_library() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


def bytes_of(amount: int | str) -> int:
    """``"2GiB"``, ``"500 MB"`` or a number, in bytes.

    Raises: ConfigError for anything else, or less than one byte.
    """
    if isinstance(amount, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", amount)
        if found is None or found[2].upper() not in _UNITS:
            raise ConfigError(
                f"memory {amount!r} is no amount. Write bytes as a number, or as '500MB', '2GiB'."
            )
        amount = int(float(found[1]) * _UNITS[found[2].upper()])
    if amount < 1:
        raise ConfigError(f"memory must be at least one byte; got {amount}.")
    return int(amount)


def said_bytes(n: int | float) -> str:
    """A number of bytes for people: ``"1.5 GiB"``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} bytes" if unit == "bytes" else f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} TiB"


def _available() -> int | None:
    """What Linux says is free or can be freed."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text(encoding="ascii"))
    return None if found is None else int(found[1]) * 1024


def _left_to_container() -> int | None:
    """What a control group leaves; None without a limit."""
    root = Path("/sys/fs/cgroup")
    limit, used = root / "memory.max", root / "memory.current"
    try:
        most = limit.read_text(encoding="ascii").strip()
        if most == "max":
            return None
        held = int(used.read_text(encoding="ascii"))
        stat = (root / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    # Files that were read are given up before anything else is.
    found = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
    return max(0, int(most) - held + (0 if found is None else int(found[1])))
