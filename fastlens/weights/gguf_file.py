"""Reading GGUF, llama.cpp's file format: metadata, tensor table, dequantised tensors.

The header is parsed here rather than by the gguf package, whose reader makes an object for each of
a tokenizer's hundred thousand entries (160 MB and two seconds for SmolLM2). Quantised blocks are
unpacked by that package.
"""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.errors import MissingDependencyError, SourceError
from fastlens.kernels.reference_packed import FORMATS
from fastlens.ops.dequantize import dequantize
from fastlens.weights.files import CHUNK_BYTES, WeightFiles
from fastlens.weights.tensor_files import Shape, fresh, read_as, read_into, read_rows

MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
# Value types: struct format; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
# An array longer than this is a vocabulary; only its length is kept.
_LONG_ARRAY = 1024


class GgufReader:
    """Metadata and tensors of one GGUF file.

    ``metadata`` maps keys to values (arrays of strings and long arrays to their lengths);
    ``shapes`` has each tensor's shape in torch's order.

    Raises: SourceError for a file that is truncated, corrupt or of an unknown version;
        MissingDependencyError when a quantised tensor is read without the gguf package.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.shapes: dict[str, Shape] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self.files = WeightFiles([path])
        size = path.stat().st_size
        with path.open("rb") as file:
            try:
                self._read_header(file)
            except (struct.error, ArithmeticError, ValueError, KeyError, MemoryError) as error:
                raise SourceError(
                    f"{path} has a header that breaks off or is corrupt at byte {file.tell()} of "
                    f"{size} ({error}). Fetch the file again."
                ) from error
        for name, (kind, start) in self._places.items():
            end = start + self._row_bytes(name, kind) * math.prod(self.shapes[name][:-1])
            if end > size:
                raise SourceError(
                    f"{path} is truncated: {name} ends at byte {end}, the file has {size}. "
                    f"Fetch it again."
                )

    def _read_header(self, file: BinaryIO) -> None:
        if file.read(4) != MAGIC:
            raise SourceError(f"{self.path} does not begin with GGUF: it is another kind of file.")
        version, n_tensors, n_keys = _unpack(file, "IQQ")
        if version not in (2, 3):
            raise SourceError(f"{self.path} is GGUF version {version}; versions 2 and 3 are read.")
        for _ in range(n_keys):
            key = _string(file)
            self.metadata[key] = _value(file, _unpack(file, "I")[0])
        entries = []
        for _ in range(n_tensors):
            name = _string(file)
            n_axes = _unpack(file, "I")[0]
            axes = _unpack(file, f"{n_axes}Q")
            kind, offset = _unpack(file, "IQ")
            # The fastest axis comes first in GGUF.
            entries.append((name, tuple(reversed(axes)), kind, offset))
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        data = -(-file.tell() // alignment) * alignment
        for name, shape, kind, offset in entries:
            self.shapes[name] = shape
            self._places[name] = (kind, data + offset)

    def _row_bytes(self, name: str, kind: int) -> int:
        columns = self.shapes[name][-1] if self.shapes[name] else 1
        if kind in _PLAIN:
            return columns * _PLAIN[kind].itemsize
        block, block_bytes = _block(self.path, name, kind)
        if columns % block:
            raise SourceError(
                f"{self.path} is corrupt: {name} has rows of {columns}, which is no multiple of "
                f"its block of {block}. Fetch it again."
            )
        return columns // block * block_bytes

    def read(
        self, name: str, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """One tensor, dequantised a few rows at a time, in float32 or as stored by default."""
        kind, start = self._places[name]
        shape = self.shapes[name]
        what = f"{self.path}: {name}"
        with self.files.open(self.path) as file:
            file.seek(start)
            if kind in _PLAIN:
                return read_as(file, shape, _PLAIN[kind], dtype or _PLAIN[kind], what, out)
            out = fresh(shape, dtype or torch.float32) if out is None else out
            self._dequantize(file, name, kind, out)
            return out

    def read_on(self, name: str, dtype: torch.dtype | None, device: torch.device) -> Tensor:
        """One tensor on a device, where `ops.dequantize` unpacks it if it knows the format.

        Cost: the packed bytes cross to the device, not the numbers. Not run on a GPU.
        """
        kind, start = self._places[name]
        packed_as = None if kind in _PLAIN else _gguf_package().GGMLQuantizationType(kind).name
        if packed_as not in FORMATS:
            return self.read(name, dtype).to(device)
        shape = self.shapes[name]
        packed = torch.empty(*shape[:-1], self._row_bytes(name, kind), dtype=torch.uint8)
        with self.files.open(self.path) as file:
            file.seek(start)
            read_into(file, packed, f"{self.path}: {name}")
        return dequantize(packed.to(device), packed_as, dtype=dtype or torch.float32)

    def read_rows(
        self, name: str, rows: Int[Tensor, " row"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "row d"]:
        """Some rows of a matrix, dequantised; ``rows`` rise."""
        kind, start = self._places[name]
        with self.files.open(self.path) as file:
            raw = read_rows(file, start, self._row_bytes(name, kind), rows, f"{self.path}: {name}")
        if kind in _PLAIN:
            return raw.view(_PLAIN[kind]).to(dtype or _PLAIN[kind])
        return _unpacked(raw, kind, self.shapes[name][1]).to(dtype or torch.float32)

    def _dequantize(self, file: Any, name: str, kind: int, out: Tensor) -> None:
        shape, row_bytes = self.shapes[name], self._row_bytes(name, kind)
        rows = out.view(-1, shape[-1])
        # Few at a time: gguf makes several copies of them on the way.
        step = max(1, CHUNK_BYTES // 16 // (shape[-1] * 4))
        for first in range(0, rows.shape[0], step):
            part = rows[first : first + step]
            raw = torch.empty(part.shape[0], row_bytes, dtype=torch.uint8)
            read_into(file, raw, f"{self.path}: {name}")
            part.copy_(_unpacked(raw, kind, shape[-1]))


def _unpacked(raw: Tensor, kind: int, columns: int) -> Tensor:
    """Rows of quantised bytes as float32."""
    gguf = _gguf_package()
    if not raw.numel():
        return torch.empty(raw.shape[0], columns)
    # As one long row: gguf works on sixteen rows at a time, which are short here.
    flat = raw.view(1, -1).numpy()
    values = gguf.quants.dequantize(flat, gguf.GGMLQuantizationType(kind))
    return torch.from_numpy(values).view(-1, columns)


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            "reading quantised GGUF tensors needs the gguf package, which is not installed. "
            "Run: pip install 'fastlens-interp[gguf]'"
        ) from error
    return gguf


def _block(path: Path, name: str, kind: int) -> tuple[int, int]:
    """Elements and bytes of one quantised block."""
    gguf = _gguf_package()
    try:
        return gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise SourceError(
            f"{path}: {name} is stored as GGML type {kind}, which the installed gguf package does "
            f"not know. Upgrade gguf, or convert the file."
        ) from None


def _unpack(file: BinaryIO, kinds: str) -> tuple[Any, ...]:
    layout = struct.Struct("<" + kinds)
    return layout.unpack(file.read(layout.size))


def _string(file: BinaryIO) -> str:
    length = _unpack(file, "Q")[0]
    raw = file.read(length)
    if len(raw) < length:
        raise struct.error("a string is longer than the file")
    return raw.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])[0]
    item, length = _unpack(file, "IQ")
    if item in (_STRING, _ARRAY):
        for _ in range(length):
            _value(file, item)
        return length
    if length > _LONG_ARRAY:
        file.seek(length * struct.calcsize("<" + _SCALARS[item]), 1)
        return length
    return list(_unpack(file, f"{length}{_SCALARS[item]}"))
