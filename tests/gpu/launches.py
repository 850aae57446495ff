"""What a launcher would launch, caught on its way to Triton: kernel, grid, arguments.

Every check without a GPU starts here, so that what is compiled and executed is what the launcher
of ``fastlens.kernels`` asks for and not a copy of it.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One call ``kernel[grid](*args, **kwargs)``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def signature(
        self, backend: str = "cuda"
    ) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[Any]]]:
        """Types, constants and what is promised of values, as Triton's JIT specialises them."""
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        promised: dict[tuple[int], list[Any]] = {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                types[name], constants[name] = "constexpr", value
                continue
            types[name] = _type(value)
            is_tensor = isinstance(value, torch.Tensor)
            number = value.data_ptr() if is_tensor else value
            promises: list[Any] = []
            if isinstance(number, int) and number % 16 == 0:
                promises.append(["tt.divisibility", 16])
            if backend == "hip" and is_tensor and value.untyped_storage().size() < 2**31:
                promises.append(["tt.pointer_range", 32])
            if promises:
                promised[(index,)] = promises
        return types, constants, promised

    def runtime_arguments(self) -> list[Any]:
        """Values the compiled kernel still takes, in order."""
        types, _, _ = self.signature()
        return [self.arguments[name] for name, kind in types.items() if kind != "constexpr"]

    def with_options(self, **options: int) -> "Launch":
        """The same with other warps or stages."""
        return replace(self, options={**self.options, **options})

    def with_constants(self, **constants: Any) -> "Launch":
        """The same with other block sizes; the grid is not adapted."""
        return replace(self, arguments={**self.arguments, **constants})


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


class _Catcher:
    def __init__(self, kernel: Any, act: Callable[[Launch], None]):
        self.kernel, self.act = kernel, act

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = [parameter.name for parameter in self.kernel.params]
            options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            arguments = dict(zip(names, args, strict=False)) | kwargs
            missing = set(names) ^ set(arguments)
            assert not missing and len(args) + len(kwargs) == len(names), missing
            self.act(Launch(self.kernel, grid, arguments, options))

        return launch


@contextlib.contextmanager
def instead_of_launching(act: Callable[[Launch], None], *modules: ModuleType) -> Iterator[None]:
    """Inside, every kernel of ``modules`` hands its launches to ``act``; nothing is launched."""
    from triton.runtime import JITFunction

    replaced = []
    for module in modules:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel") and isinstance(kernel, JITFunction):
                replaced.append((module, name, kernel))
                setattr(module, name, _Catcher(kernel, act))
    try:
        yield
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)


def all_modules() -> list[ModuleType]:
    """The modules that hold Triton kernels."""
    import importlib
    import pkgutil

    import fastlens.kernels.jit as package

    return [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
    ]


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    """What ``call`` would launch."""
    caught: list[Launch] = []
    with instead_of_launching(caught.append, *all_modules()):
        call()
    return caught
