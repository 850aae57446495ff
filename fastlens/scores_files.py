"""The files `Scores` are kept in, and writing files so that no reader sees half of one."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from fastlens.errors import SourceError

FORMAT = "fastlens.scores"
FORMAT_VERSION = 1
JSON_NAME = "scores.json"
TENSORS_NAME = "scores.safetensors"


def write_record(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``scores.json`` and ``scores.safetensors`` into a folder that exists.

    Each file appears whole or not at all, and the first names the second by its SHA-256.

    Args:
        record: What JSON can hold; tensors in it become lists, other things their text.

    Raises: SourceError if a file cannot be written.
    """
    data = dump_tensors({k: t.detach().cpu().contiguous() for k, t in tensors.items()})
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    whole = {**head, **record, "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(_plain(whole), indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / TENSORS_NAME, data)
    write_whole(folder / JSON_NAME, text.encode())


def read_record(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_record` wrote there.

    Raises: SourceError naming the file that is missing, torn or not ours.
    """
    path = folder / TENSORS_NAME
    record = _read_json(folder / JSON_NAME)
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != record.get("sha256"):
        raise SourceError(
            f"{path} is not the file {JSON_NAME} was written with: it is torn, or one of the "
            f"two was replaced. Save the scores again."
        )
    try:
        return record, load_tensors(data)
    except SafetensorError as error:
        raise SourceError(f"{path} is no safetensors file: {error}") from error


def writable_folder(folder: str | Path) -> Path:
    """The folder, made if needed, after a trial write; so long work can fail before it starts.

    Raises: SourceError if nothing can be written there.
    """
    folder = Path(folder).expanduser()
    trial = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise SourceError(
            f"cannot write into the folder {folder}: {error.strerror or error}. "
            f"Give a folder that you may write to."
        ) from error
    return folder


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the file and rename over it, so that no reader sees half of it.

    Raises: SourceError if it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise SourceError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def _plain(value: Any) -> Any:
    """The value as JSON types: tensors and arrays become lists, mappings get string keys."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    data = _read(path)
    try:
        record = json.loads(data)
    except ValueError as error:
        raise SourceError(f"{path} is torn or is not JSON: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise SourceError(f"{path} was not written by Scores.save.")
    if record.get("format_version") != FORMAT_VERSION:
        raise SourceError(
            f"{path} has format version {record.get('format_version')}; this fastlens reads "
            f"{FORMAT_VERSION}. Install the version that wrote it: {record.get('versions')}."
        )
    return record
