"""A GGUF file in Hugging Face's terms: config dict, tensor names, llama.cpp's reordering undone."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.errors import ConfigError, SourceError, WeightsError
from fastlens.weights.family import FAMILIES, Family, Gguf
from fastlens.weights.files import WeightFiles
from fastlens.weights.gguf_file import GgufReader
from fastlens.weights.tensor_files import Shape

# Metadata about the file, the tokenizer and the quantisation, not about the model.
_NOT_THE_MODEL = ("general.", "tokenizer.", "quantize.", "split.", "mradermacher.", "imatrix.")

# Keys with a default in llama.cpp that is Hugging Face's too.
_OPTIONAL = ("attention.head_count_kv", "rope.freq_base", "vocab_size")


class GgufTensors:
    """The tensors of a GGUF file under Hugging Face's names.

    Raises: WeightsError that lists every tensor name the family does not account for.
    """

    def __init__(self, reader: GgufReader, table: Gguf, config: dict[str, Any]):
        self._reader = reader
        self._table = table
        self._config = config
        self._theirs: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        unknown = []
        for theirs, shape in reader.shapes.items():
            known, ours = self._rename(theirs)
            if not known:
                unknown.append(f"{theirs} {list(shape)}")
            elif ours is not None:
                self._theirs[ours] = theirs
                self.shapes[ours] = tuple(self._undo(ours, torch.empty(shape, device="meta")).shape)
        if unknown:
            raise WeightsError(
                f"{reader.path} has tensors that are not accounted for: {', '.join(unknown[:20])}. "
                f"The model may compute something else than this architecture, so it is not loaded."
            )

    def _rename(self, theirs: str) -> tuple[bool, str | None]:
        stem, _, kind = theirs.rpartition(".")
        parts = stem.split(".")
        layer = parts[1] if parts[0] == "blk" and len(parts) > 1 else None
        if layer is not None:
            stem = ".".join([parts[0], "{l}", *parts[2:]])
        if stem not in self._table.names or kind not in ("weight", "bias"):
            return False, None
        ours = self._table.names[stem]
        return True, None if ours is None else f"{ours.format(l=layer)}.{kind}"

    def _undo_of(self, ours: str) -> Any:
        parts = ours.split(".")
        return self._table.undo.get(".".join("{l}" if p.isdigit() else p for p in parts))

    def _undo(self, ours: str, tensor: Tensor) -> Tensor:
        undo = self._undo_of(ours)
        return tensor if undo is None else undo(tensor, self._config)

    @property
    def files(self) -> WeightFiles:
        """The file, as it was when it was opened."""
        return self._reader.files

    def read(
        self, name: str, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """One tensor, dequantised and in Hugging Face's order."""
        # What is put in another order afterwards is another tensor.
        out = None if self._undo_of(name) is not None else out
        return self._undo(name, self._reader.read(self._theirs[name], dtype, out))

    def read_on(self, name: str, dtype: torch.dtype | None, device: torch.device) -> Tensor:
        """One tensor in Hugging Face's order, unpacked on a device."""
        return self._undo(name, self._reader.read_on(self._theirs[name], dtype, device))

    def read_rows(
        self, name: str, rows: Int[Tensor, " row"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "row d"] | None:
        """Some rows of a matrix; ``rows`` rise. None where llama.cpp reorders that matrix."""
        if self._undo_of(name) is not None:
            return None
        return self._reader.read_rows(self._theirs[name], rows, dtype)


def open_gguf(path: Path) -> tuple[Family, dict[str, Any], GgufTensors, dict[str, Any]]:
    """Family, Hugging Face config dict, tensors and metadata of a GGUF file.

    Raises: SourceError for a broken file, ConfigError for an architecture or metadata key that no
        family accounts for, WeightsError for a tensor that it does not.
    """
    reader = GgufReader(path)
    metadata = reader.metadata
    architecture = metadata.get("general.architecture")
    known = {name: (family, table) for family in FAMILIES for name, table in family.gguf.items()}
    if architecture not in known:
        raise ConfigError(
            f"{path} has the GGUF architecture {architecture!r}. fastlens can load "
            f"{', '.join(sorted(known))}. A new one is a table in fastlens/weights/families."
        )
    if metadata.get("split.count", 0) > 1:
        raise SourceError(
            f"{path} is one of {metadata['split.count']} parts. Merge them into one file first "
            f"(gguf-split --merge)."
        )
    family, table = known[architecture]
    config = _config(path, reader, family, table, architecture)
    return family, config, GgufTensors(reader, table, config), metadata


def _config(
    path: Path, reader: GgufReader, family: Family, table: Gguf, architecture: str
) -> dict[str, Any]:
    config: dict[str, Any] = {"architectures": [family.architectures[0]]}
    unknown = []
    for key, value in reader.metadata.items():
        inside = key.removeprefix(f"{architecture}.")
        if inside in table.config:
            config[table.config[inside]] = value
        elif not key.startswith(_NOT_THE_MODEL) and not _is_read(inside, table):
            unknown.append(f"{key}={value!r}")
    if unknown:
        raise ConfigError(
            f"{path} has metadata that the {family.name} family does not account for: "
            f"{', '.join(unknown)}. It may change what the model computes, so it is not loaded."
        )
    missing = [key for key, ours in table.config.items() if ours not in config]
    missing = [key for key in missing if key not in _OPTIONAL]
    if missing or "token_embd.weight" not in reader.shapes:
        wanted = [f"{architecture}.{key}" for key in missing] or ["token_embd.weight"]
        raise SourceError(f"{path} lacks {', '.join(wanted)}, without which it is no model.")
    vocabulary = next(theirs for theirs, (ours, _) in family.config.items() if ours == "d_vocab")
    config.setdefault(vocabulary, reader.shapes["token_embd.weight"][0])
    config["tie_word_embeddings"] = "output.weight" not in reader.shapes
    if table.derive is not None:
        config |= table.derive(reader)
    return config


def _is_read(key: str, table: Gguf) -> bool:
    prefixes = tuple(known for known in table.reads if known.endswith("."))
    return key in table.reads or key.startswith(prefixes)
