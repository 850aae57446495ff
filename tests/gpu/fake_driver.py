"""A GPU driver that is not one: Triton's own launch path binds, specialises and compiles for it."""

from typing import Any

from tests.gpu.ahead_of_time import TARGETS, Target
from tests.gpu.launches import Launch


class FakeDriver:
    """What Triton asks a driver before it launches. It cannot load or launch anything."""

    def __init__(self, target: Target):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_target(self) -> Any:
        """The architecture asked for."""
        return self.target

    def get_current_device(self) -> int:
        """Always the first."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """The default one."""
        return 0


def warm_up(launch: Launch, target_name: str) -> Any:
    """The kernel that Triton would launch for these arguments, by its own rules.

    Once a process for one target: Triton keeps what it compiled by device number.
    """
    from triton.runtime import driver

    driver.set_active(FakeDriver(TARGETS[target_name]))
    return launch.kernel.warmup(**launch.arguments, **launch.options, grid=launch.grid)
