"""A table of what a cache holds, and in what form."""

import re
from collections.abc import Iterable, Sequence

from torch import Tensor

from fastlens.hooks.derived import Derived, Entry
from fastlens.ops.outlier_rows import Int8OutlierRows


def held(entry: Entry) -> Iterable[Tensor]:
    """The tensors that an entry keeps alive."""
    if isinstance(entry, Tensor):
        return [entry]
    return [*entry] if isinstance(entry, Int8OutlierRows) else entry.held()


def place_of(name: str) -> tuple[str, int | None]:
    """A hook name with ``{}`` for its layer, and the layer; None outside layers."""
    found = re.match(r"blocks\.(\d+)\.", name)
    place = re.sub(r"^blocks\.\d+\.", "blocks.{}.", name)
    return place, int(found[1]) if found else None


def ranges(layers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def summary_of(entries: Iterable[tuple[str, Entry]], total: int) -> str:
    """The table of `fastlens.ActivationCache.summary`; ``total`` bytes are its last line."""
    lines: dict[tuple[str, str, str, str], tuple[list[int], int, int]] = {}
    counted: set[tuple[str, int]] = set()
    n_entries = 0
    for name, entry in entries:
        nbytes, how = _new_bytes(entry, counted)
        place, layer = place_of(name)
        key = place, str(list(entry.shape)), str(entry.dtype).removeprefix("torch."), how
        layers, n, before = lines.setdefault(key, ([], 0, 0))
        layers.extend([] if layer is None else [layer])
        lines[key] = layers, n + 1, before + nbytes
        n_entries += 1
    rows = [("place", "entries", "shape", "dtype", "bytes", "how")]
    for (place, shape, dtype, how), (layers, n, nbytes) in lines.items():
        rows.append((place.format(ranges(layers)), str(n), shape, dtype, f"{nbytes:,}", how))
    rows.append(("total", str(n_entries), "", "", f"{total:,}", f"{total / 2**20:.1f} MiB"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = (1, 4)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _new_bytes(entry: Entry, counted: set[tuple[str, int]]) -> tuple[int, str]:
    """Memory that no entry before holds, and the form that it has."""
    nbytes, seen = 0, False
    for tensor in held(entry):
        storage = tensor.untyped_storage()
        key = str(tensor.device), storage.data_ptr()
        seen = seen or key in counted
        nbytes += 0 if key in counted else storage.nbytes()
        counted.add(key)
    # Entries of a store say themselves where they are.
    how = "packed" if isinstance(entry, Int8OutlierRows) else getattr(entry, "how", "stored")
    if isinstance(entry, Derived):
        return nbytes, how
    return nbytes, "shared" if seen and nbytes == 0 else how
