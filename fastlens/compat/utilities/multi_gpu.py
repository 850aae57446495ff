"""Choosing among several devices."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch

from fastlens.devices import block_device
from fastlens.errors import FastlensError

# Index of a CUDA device and the bytes left on it.
AvailableDeviceMemory: TypeAlias = list[tuple[int, int]]
MaxMemory: TypeAlias = dict[str | int, str | int]
DeviceMap: TypeAlias = str | dict[str, str | int]

MIXED_CPU_GPU_ERROR = (
    "device_map puts some modules on the CPU and some on GPUs, which accelerate does by keeping "
    "only placeholders of those on the CPU. Put all on GPUs (or give n_devices), or all on the CPU."
)


class DeviceError(FastlensError, OSError, ValueError):
    """A device, or a placement on several, that cannot be had."""


def calculate_available_device_cuda_memory(i: int) -> int:
    """Bytes of CUDA device ``i`` that this process' tensors do not take.

    What other processes take is not seen; `torch.cuda.mem_get_info` sees it.
    """
    return torch.cuda.get_device_properties(i).total_memory - torch.cuda.memory_allocated(i)


def determine_available_memory_for_available_devices(max_devices: int) -> AvailableDeviceMemory:
    """`calculate_available_device_cuda_memory` of the first ``max_devices`` devices."""
    return [(i, calculate_available_device_cuda_memory(i)) for i in range(max_devices)]


def sort_devices_based_on_available_memory(devices: AvailableDeviceMemory) -> AvailableDeviceMemory:
    """Those with most memory left first; the list given is not changed."""
    return sorted(devices, key=lambda device: device[1], reverse=True)


def get_best_available_cuda_device(max_devices: int | None = None) -> torch.device:
    """The CUDA device with most memory left, of the first ``max_devices`` or of all.

    Raises: DeviceError (an OSError) if there is none.
    """
    n_devices = torch.cuda.device_count() if max_devices is None else max_devices
    devices = determine_available_memory_for_available_devices(n_devices)
    if not devices:
        raise DeviceError("a CUDA device was asked for, but there is none. Use device='cpu'.")
    return torch.device("cuda", sort_devices_based_on_available_memory(devices)[0][0])


def get_best_available_device(cfg: Any) -> torch.device:
    """``cfg.device``; of ``cfg.n_devices`` CUDA devices the one with most memory left."""
    device = torch.device(cfg.device)
    if device.type == "cuda" and cfg.n_devices > 1:
        return get_best_available_cuda_device(cfg.n_devices)
    return device


def get_device_for_block_index(
    index: int, cfg: Any, device: torch.device | str | None = None
) -> torch.device:
    """The device of block ``index`` where ``cfg.n_layers`` are spread over ``cfg.n_devices``.

    Args:
        device: The first of them; ``cfg.device`` if None. The CPU is always one.
    """
    first = cfg.device if device is None else device
    return block_device(index, cfg.n_layers, cfg.n_devices, first)


def resolve_device_map(
    n_devices: int | None,
    device_map: DeviceMap | None,
    device: str | torch.device | None,
    max_memory: MaxMemory | None = None,
) -> tuple[DeviceMap | None, MaxMemory | None]:
    """``device_map`` and ``max_memory`` for Hugging Face's ``from_pretrained``.

    A ``device_map`` is returned as it is. More than one of ``n_devices`` gives ``"balanced"``, with
    the memory that is free on each; one or None, no map.

    Raises: DeviceError (a ValueError) if ``device`` is given too, for more CUDA devices than there
        are, or for a map that offloads to disk or mixes the CPU with GPUs.
    """
    if device_map is not None:
        if device is not None:
            raise DeviceError("device and device_map say the same thing: give one of them.")
        _check_device_map(device_map)
        return device_map, max_memory
    if n_devices is None or n_devices <= 1:
        return None, max_memory
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < n_devices:
        raise DeviceError(f"n_devices={n_devices}, but {found} CUDA devices exist.")
    if max_memory is None:
        return "balanced", {i: _free_cuda_memory(i) for i in range(n_devices)}
    return "balanced", dict(max_memory)


def _free_cuda_memory(i: int) -> int:
    try:
        return int(torch.cuda.mem_get_info(i)[0])
    except (AttributeError, RuntimeError):
        return calculate_available_device_cuda_memory(i)


def _check_device_map(device_map: DeviceMap) -> None:
    if isinstance(device_map, str):
        return
    for module, place in device_map.items():
        if isinstance(place, str) and place.lower() == "disk":
            raise DeviceError(
                f"device_map[{module!r}]={place!r}: weights on disk are not supported. Put the "
                "module on the CPU or a GPU."
            )
    if is_mixed_cpu_gpu(device_map.values()):
        raise DeviceError(MIXED_CPU_GPU_ERROR)


def is_mixed_cpu_gpu(values: Iterable[Any]) -> bool:
    """Whether both the CPU (``"cpu"``) and a GPU (a number, ``"cuda..."``) are among the places."""
    places = list(values)
    names = [place.lower() for place in places if isinstance(place, str)]
    on_gpu = any(isinstance(place, int) for place in places)
    return "cpu" in names and (on_gpu or any(name.startswith("cuda") for name in names))


def find_embedding_device(hf_model: Any) -> torch.device | None:
    """Where tokens must be for a Hugging Face model that is spread over devices; None if it is not.

    That is the device of its input embedding; if that has no parameters, the first of the map.
    """
    placed: Mapping[str, Any] | None = getattr(hf_model, "hf_device_map", None)
    if not placed:
        return None
    try:
        return next(hf_model.get_input_embeddings().parameters()).device
    except (AttributeError, NotImplementedError, StopIteration):
        first = next(iter(placed.values()))
        return torch.device("cuda", first) if isinstance(first, int) else torch.device(first)


def count_unique_devices(hf_model: Any) -> int:
    """How many devices a Hugging Face model is spread over; 1 if it is not."""
    placed = getattr(hf_model, "hf_device_map", None)
    return len({_place(place) for place in placed.values()}) if placed else 1


def _place(place: Any) -> str:
    return f"cuda:{place}" if isinstance(place, int) else str(place)
