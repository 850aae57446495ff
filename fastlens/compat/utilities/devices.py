"""Choosing devices, by TransformerLens' path; TransformerLens 2 had those of `multi_gpu` here."""

from fastlens.compat.utilities.multi_gpu import (
    AvailableDeviceMemory,
    calculate_available_device_cuda_memory,
    determine_available_memory_for_available_devices,
    get_best_available_cuda_device,
    get_best_available_device,
    get_device_for_block_index,
    sort_devices_based_on_available_memory,
)
from fastlens.devices import ModelWithCfg, get_device, move_to_and_update_config, warn_if_mps

__all__ = [
    "AvailableDeviceMemory",
    "ModelWithCfg",
    "calculate_available_device_cuda_memory",
    "determine_available_memory_for_available_devices",
    "get_best_available_cuda_device",
    "get_best_available_device",
    "get_device",
    "get_device_for_block_index",
    "move_to_and_update_config",
    "sort_devices_based_on_available_memory",
    "warn_if_mps",
]
