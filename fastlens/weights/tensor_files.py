"""Readers of checkpoint tensors: shapes first, then one tensor at a time, nothing kept.

Files are read through bounded buffers rather than mapped whole: mapped pages count as resident
memory until someone else needs it, which would double the peak of a load.
"""

import json
import math
import mmap
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastlens.errors import SourceError
from fastlens.weights.files import CHUNK_BYTES, WeightFiles, read_some

Shape = tuple[int, ...]

_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000


@runtime_checkable
class TensorReader(Protocol):
    """What a checkpoint looks like to the loader."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Every tensor's shape, by name."""
        ...

    def read(
        self, name: str, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """One tensor, in ``dtype`` (by default as stored), on the CPU or where it already is.

        Args:
            out: Contiguous memory of that shape and dtype, which may be filled and returned.
        """
        ...


def read_into(file: Any, out: Tensor, what: str) -> None:
    """Fill a contiguous tensor with the next bytes of a file."""
    if out.numel() == 0:
        return
    view = out.view(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        got = read_some(file, view[done:], what)
        if not got:
            raise SourceError(f"{what} ends too early. The file is truncated: fetch it again.")
        done += got


def fresh(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory that goes back to the system as soon as the tensor is gone.

    malloc would keep what it is given back, in pieces, and the peak of a load would creep up.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < mmap.PAGESIZE:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(shape)


def read_rows(
    file: Any, start: int, row_bytes: int, rows: Tensor, what: str
) -> UInt8[Tensor, "row bytes"]:
    """Some rows of a table of bytes; ``rows`` rise, and neighbours are read together."""
    out = torch.empty(len(rows), row_bytes, dtype=torch.uint8)
    numbers = rows.tolist()
    first = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            file.seek(start + numbers[first] * row_bytes)
            read_into(file, out[first:at], what)
            first = at
    return out


def read_as(
    file: Any,
    shape: Shape,
    stored: torch.dtype,
    dtype: torch.dtype,
    what: str,
    out: Tensor | None = None,
) -> Tensor:
    """The next tensor of a file in another dtype, converted chunk by chunk; into ``out``."""
    out = fresh(shape, dtype) if out is None else out
    if stored == dtype:
        read_into(file, out, what)
        return out
    flat = out.view(-1)
    step = CHUNK_BYTES // stored.itemsize
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        raw = torch.empty(part.numel(), dtype=stored)
        read_into(file, raw, what)
        part.copy_(raw)
    return out


class SafetensorsReader:
    """Tensors of one or several safetensors files.

    Args:
        files: The files.
        index: Tensor name -> file name, where a checkpoint is sharded; names in no index are not
            part of the checkpoint.

    Raises: SourceError that names the file for a truncated or corrupt one.
    """

    def __init__(self, files: Iterable[Path], index: Mapping[str, str] | None = None):
        self.shapes: dict[str, Shape] = {}
        self._places: dict[str, tuple[Path, torch.dtype, int]] = {}
        files = list(files)
        self.files = WeightFiles(files)
        for path in files:
            for name, entry in safetensors_header(path).items():
                if index is not None and index.get(name) != path.name:
                    continue
                stored, shape, start = entry
                self.shapes[name] = shape
                self._places[name] = (path, stored, start)
        index = index or {}
        absent = [f"{name} ({file})" for name, file in index.items() if name not in self.shapes]
        if absent:
            raise SourceError(
                f"the index lists {len(absent)} tensors that are not in their files: "
                f"{', '.join(absent[:5])}. Index and shards do not belong together: fetch them "
                f"again."
            )

    def read(
        self, name: str, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """One tensor; at most one chunk is in memory beside it."""
        path, stored, start = self._places[name]
        with self.files.open(path) as file:
            file.seek(start)
            what = f"{path}: {name}"
            return read_as(file, self.shapes[name], stored, dtype or stored, what, out)

    def read_rows(
        self, name: str, rows: Int[Tensor, " row"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "row d"]:
        """Some rows of a matrix; ``rows`` rise."""
        path, stored, start = self._places[name]
        row_bytes = self.shapes[name][1] * stored.itemsize
        with self.files.open(path) as file:
            raw = read_rows(file, start, row_bytes, rows, f"{path}: {name}")
        return raw.view(stored).to(dtype or stored)


def safetensors_header(path: Path) -> dict[str, tuple[torch.dtype, Shape, int]]:
    """Tensor name -> (dtype, shape, position in the file), checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise SourceError(
                f"{path} is not a whole safetensors file: it has {size} bytes, and its first 8 "
                f"announce a header of {length}. It is truncated or something else: fetch it again."
            )
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            return {name: _entry(path, name, e, 8 + length, size) for name, e in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(
                f"{path} has a corrupt safetensors header ({error}). Fetch the file again."
            ) from error


def _entry(
    path: Path, name: str, entry: dict[str, Any], data: int, size: int
) -> tuple[torch.dtype, Shape, int]:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise SourceError(
            f"{path}: {name} is stored as {entry['dtype']}, which is not read here. Convert it to "
            f"a plain float dtype, or load it with transformers and pass hf_model=."
        )
    stored = _SAFETENSORS_DTYPES[entry["dtype"]]
    if data + end > size:
        raise SourceError(
            f"{path} is truncated: {name} ends at byte {data + end}, the file has {size}. "
            f"Fetch it again."
        )
    if end - start != math.prod(shape) * stored.itemsize:
        raise SourceError(
            f"{path} is corrupt: {name} of shape {list(shape)} and {entry['dtype']} cannot take "
            f"{end - start} bytes. Fetch it again."
        )
    return stored, shape, data + start


class PickleReader:
    """Tensors of ``pytorch_model.bin`` files, read by torch's restricted unpickler only.

    A file from before torch 1.6 cannot be mapped: it is read once and kept whole.
    """

    def __init__(self, files: Iterable[Path]):
        self.shapes: dict[str, Shape] = {}
        self._files: dict[str, Path] = {}
        self._kept: dict[Path, dict[str, Tensor]] = {}
        for path in files:
            for name, tensor in self._open(path).items():
                self.shapes[name] = tuple(tensor.shape)
                self._files[name] = path

    def _open(self, path: Path) -> dict[str, Tensor]:
        if path in self._kept:
            return self._kept[path]
        is_mapped = True
        try:
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                # Files from before torch 1.6 are no zip archives and cannot be mapped.
                if "mmap can only be used" not in str(error):
                    raise
                is_mapped = False
                content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise SourceError(
                f"{path} cannot be read as a file of weights: {str(error).splitlines()[0]} It is "
                f"truncated, corrupt, or holds more than tensors; nothing of it was executed."
            ) from error
        if not isinstance(content, dict):
            raise SourceError(f"{path} holds a {type(content).__name__}, not a dict of tensors.")
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if not is_mapped:
            self._kept[path] = tensors
        return tensors

    def read(
        self, name: str, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """One tensor, copied out of a mapping that is closed again."""
        tensor = self._open(self._files[name])[name]
        if out is not None:
            return out.copy_(tensor)
        return tensor.to(dtype or tensor.dtype, copy=True).contiguous()


class LiveReader:
    """Tensors of a model in memory: views of its own parameters."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        absent = [name for name, tensor in tensors.items() if tensor.is_meta]
        if absent:
            raise SourceError(
                f"{len(absent)} tensors of hf_model are on the meta device, {absent[0]} among "
                f"them: it holds no weights. Load it without a device map or disk offload."
            )

    def read(
        self, name: str, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The parameter itself, or a copy in another dtype."""
        tensor = self._tensors[name]
        return tensor if dtype is None else tensor.to(dtype)


def folder_reader(folder: Path) -> TensorReader:
    """The reader for a folder in Hugging Face's layout, sharded or not.

    Raises: SourceError for a missing shard, or a folder with no weights.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index_file = folder / f"{stem}.{suffix}.index.json"
        single = folder / f"{stem}.{suffix}"
        if index_file.is_file():
            index = _index(index_file)
            files = [folder / name for name in sorted(set(index.values()))]
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise SourceError(
                    f"{index_file} names {len(files)} shards, of which {len(missing)} are missing: "
                    f"{', '.join(missing[:5])}. Fetch them into {folder}."
                )
        elif single.is_file():
            index, files = None, [single]
        else:
            continue
        return SafetensorsReader(files, index) if suffix == "safetensors" else PickleReader(files)
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return SafetensorsReader(loose)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise SourceError(
        f"{folder} has no weights that can be read. Wanted: model.safetensors or its index, or "
        f"pytorch_model.bin. Found: {found}."
    )


def _index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return dict(weight_map)
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is not a weights index ({error!r}). Fetch it again.") from error
