"""A kernel module with one deliberate mistake, in the place of the right one."""

import contextlib
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


@contextlib.contextmanager
def mutated(name: str, right: str, wrong: str) -> Iterator[ModuleType]:
    """``fastlens.kernels.jit.<name>`` with ``right`` replaced by ``wrong``, once, in its source."""
    full = f"fastlens.kernels.jit.{name}"
    original = importlib.import_module(full)
    source = Path(original.__file__ or "").read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{source.count(right)} times in {full}: {right!r}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}_mutated.py"
        path.write_text(source.replace(right, wrong), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[full] = module
        package = importlib.import_module("fastlens.kernels.jit")
        setattr(package, name, module)
        try:
            yield module
        finally:
            sys.modules[full] = original
            setattr(package, name, original)
