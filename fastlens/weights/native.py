"""fastlens' own folder: ``fastlens.json`` (config) and ``model.safetensors`` (TL's names)."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, SourceError
from fastlens.weights.fold import group_of
from fastlens.weights.tensor_files import SafetensorsReader, Shape

CONFIG_FILE, WEIGHTS_FILE = "fastlens.json", "model.safetensors"
# Of this machine or this session, not of the model.
_NOT_SAVED = ("device", "n_devices", "n_params", "seed", "init_weights", "tokenizer_prepends_bos")
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip


def is_native(folder: Path) -> bool:
    """Whether a folder was written by `save_native`."""
    return (folder / CONFIG_FILE).is_file()


def save_native(
    folder: Path,
    cfg: HookedTransformerConfig,
    parameters: Iterable[tuple[str, Tensor]],
    tokenizer: Any = None,
) -> None:
    """Write a model's folder. Each file appears whole or not at all.

    Cost: one contiguous copy of one tensor at a time.
    Raises: SourceError if the folder cannot be written.
    """
    fields = {
        field.name: getattr(cfg, field.name)
        for field in dataclasses.fields(cfg)
        if field.name not in _NOT_SAVED
    }
    fields["dtype"] = str(cfg.dtype).removeprefix("torch.")
    text = json.dumps(fields, indent=1, default=_plain) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / WEIGHTS_FILE, dict(parameters))
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
        # Last: without it the folder is not taken for a model.
        _replace(folder / CONFIG_FILE, [text.encode()])
    except OSError as error:
        raise SourceError(
            f"the model cannot be saved to {folder}: {error}. Give a folder that can be written."
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) or hasattr(value, "item"):
        return value.item()
    raise TypeError(f"config value {value!r} cannot be written as JSON")


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, written tensor by tensor and renamed into place."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        if tensor.dtype not in _DTYPE_NAMES:
            raise SourceError(f"{name} has dtype {tensor.dtype}; float dtypes are saved.")
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _replace(path, _file_parts(text, tensors.values()))


def _file_parts(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().data


def _replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class NativeTensors:
    """Config and tensors of a folder that `save_native` wrote.

    Raises: SourceError or ConfigError for a broken one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            self.fields["dtype"] = getattr(torch, self.fields["dtype"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{folder / CONFIG_FILE} is not a model's config ({error}). Save the model again."
            ) from error
        if not (folder / WEIGHTS_FILE).is_file():
            raise SourceError(f"{folder} has {CONFIG_FILE} but no {WEIGHTS_FILE}. Save it again.")
        self.reader = SafetensorsReader([folder / WEIGHTS_FILE])
        self.shapes: dict[str, Shape] = self.reader.shapes

    def group(
        self, name: str, dtype: torch.dtype | None, without: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """One group's tensors, but for those in ``without``."""
        keys = [key for key in self.shapes if group_of(key) == name and key not in without]
        return {key: self.reader.read(key, dtype) for key in keys}
