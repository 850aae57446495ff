"""Every environment variable fastlens reads, in one table."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """One environment variable: its name, default and meaning."""

    name: str
    default: str
    meaning: str

    def get(self) -> str:
        """The value now: read at each use, so tests and notebooks can change it."""
        return os.environ.get(self.name, self.default)

    def is_on(self) -> bool:
        """True for 1, true, yes, on (any case)."""
        return self.get().strip().lower() in ("1", "true", "yes", "on")


HF_TOKEN = Setting("HF_TOKEN", "", "token sent to the hub for gated models")
OFFLINE = Setting("HF_HUB_OFFLINE", "0", "1: never contact the hub, use only what is on disk")
CUDA = Setting("FASTLENS_CUDA", "", "1 builds the CUDA module at install, 0 does not (setup.py)")
TRITON = Setting(
    "FASTLENS_TRITON",
    "",
    "1, before an op first runs: use the Triton kernels on CUDA, which no one has run on a GPU",
)
ALLOW_MPS = Setting(
    "TRANSFORMERLENS_ALLOW_MPS", "", "1: take Apple's GPU if there is no other, without warning"
)

SETTINGS = (HF_TOKEN, OFFLINE, CUDA, TRITON, ALLOW_MPS)
