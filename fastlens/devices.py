"""Which device is taken when none is named, and moving a model together with its config."""

import warnings
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn as nn
from torch import Tensor

from fastlens.errors import ConfigError
from fastlens.settings import ALLOW_MPS

_warned: set[str] = set()
# torch 2.8 on MPS: `F.linear` is wrong for tensors that are not contiguous (pytorch#161640).
_WRONG_ON_MPS = ((2, 8),)


@runtime_checkable
class ModelWithCfg(Protocol):
    """A model that `move_to_and_update_config` can move."""

    cfg: Any

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        ...

    def to(self, device_or_dtype: torch.device | str | torch.dtype) -> Any:
        """The model, moved or cast."""
        ...


AnyModel = TypeVar("AnyModel", bound=ModelWithCfg)


def get_device() -> str:
    """``"cuda"`` where there is one, else ``"cpu"``.

    Apple's GPU is taken only where TRANSFORMERLENS_ALLOW_MPS=1 asks for it: torch's results there
    have been silently wrong (TransformerLens issue 1178).
    """
    if torch.cuda.is_available():
        return "cuda"
    mps = torch.backends.mps
    return "mps" if ALLOW_MPS.is_on() and mps.is_available() and mps.is_built() else "cpu"


def device_of(place: int | str | torch.device) -> torch.device:
    """A device with its number: ``0`` and ``"cuda"`` are ``cuda:0``.

    Raises: what `torch.device` raises for what is none.
    """
    if isinstance(place, bool):
        raise TypeError(f"{place!r} is no device.")
    device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


def block_device(
    index: int, n_layers: int, n_devices: int, first: torch.device | str | None
) -> torch.device:
    """The device of a layer where layers are spread in equal runs; the CPU is always one.

    Args:
        first: The first of the devices; the others have the numbers after it.
    """
    device = torch.device(first or "cpu")
    if device.type == "cpu":
        return device
    return torch.device(device.type, (device.index or 0) + index * n_devices // n_layers)


def warn_if_mps(device: torch.device | str) -> None:
    """Warn, once a process, that results on Apple's GPU may be silently wrong.

    TRANSFORMERLENS_ALLOW_MPS=1 switches that warning off, but not the one for torch 2.8, whose
    linear layers are known to be wrong there.
    """
    if torch.device(device).type != "mps":
        return
    if _torch_version() in _WRONG_ON_MPS:
        _warn_once(
            "wrong",
            f"torch {torch.__version__} computes linear layers on MPS wrongly (pytorch issue "
            "161640): generated text and attention are corrupt. Use torch 2.9 or newer.",
        )
    if not ALLOW_MPS.is_on():
        _warn_once(
            "doubtful",
            f"torch {torch.__version__} on MPS may compute silently wrong results. Compare with "
            "the CPU; TRANSFORMERLENS_ALLOW_MPS=1 switches this warning off.",
        )


def move_to_and_update_config(
    model: AnyModel, device_or_dtype: torch.device | str | torch.dtype, print_details: bool = True
) -> AnyModel:
    """Move or cast a model, not through its own ``to``, and keep its config in step.

    ``cfg.device`` names the device with its number, if one was given; ``cfg.dtype`` is set where
    there is such a field.

    Args:
        print_details: Say what is done, in TransformerLens' words.

    Raises: ConfigError for a dtype in the place of ``print_details``; what torch raises for a
        device or dtype that cannot be had, and the config is then as it was.
    """
    if isinstance(print_details, torch.dtype):
        raise ConfigError(
            f"a model was to be moved to {device_or_dtype} and cast to {print_details} at once. "
            f"Do one after the other: model.to({str(device_or_dtype)!r}).to({print_details})."
        )
    is_dtype = isinstance(device_or_dtype, torch.dtype)
    field, value = "dtype", device_or_dtype
    said = "Changing model dtype to"
    if not is_dtype:
        warn_if_mps(device_or_dtype)
        field, value = "device", str(torch.device(device_or_dtype))
        said = "Moving model to device: "
    if print_details:
        print(said, value)  # noqa: T201 - TransformerLens prints here
    nn.Module.to(model, device_or_dtype)  # type: ignore[arg-type]
    if not is_dtype or hasattr(model.cfg, field):
        setattr(model.cfg, field, value)
    return model


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _warn_once(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, UserWarning, stacklevel=3)
