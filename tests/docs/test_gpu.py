"""docs/gpu.md holds what its tool computes, and says what was not done."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_numbers", ROOT / "tools" / "gpu_numbers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return loaded()


@pytest.fixture
def text(tool):
    return tool.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["gpus", "roofline"])
def test_tables_by_formula_are_up_to_date(tool, text, name):
    assert tool.written(text, name) == getattr(tool, name)(), "run `python tools/gpu_numbers.py`"


def test_what_was_not_done_is_said_first(text):
    head = text.split("\n## ")[0]
    assert "**not run on a GPU**" in head and "none was measured" in head


def test_every_kernel_in_csrc_has_a_case(tool):
    listed = {case.cuda.name.partition("<")[0] for case in tool.cases() if case.cuda is not None}
    found = set()
    for source in tool.CSRC.glob("*.cu"):
        found |= set(re.findall(r"__global__ void (\w+)\(", source.read_text(encoding="utf-8")))
    assert listed == found


def test_every_triton_kernel_is_in_the_page(text, tool):
    """By the sources' text: no triton is needed."""
    found = set()
    for path in (ROOT / "fastlens" / "kernels" / "jit").glob("*.py"):
        found |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.M))
    rows = re.findall(r"^\| `(\w+)` \|", tool.written(text, "shipped"), re.M)
    assert found and set(rows) == found, "run `python tools/gpu_numbers.py`"


def test_blocks_and_threads_are_those_of_the_sources(tool):
    """The sizes by which grids of csrc/ are computed."""
    source = {path.name: path.read_text(encoding="utf-8") for path in tool.CSRC.glob("*.cu")}
    for file, constant in (
        ("patch_sites.cu", "kSitesPerBlock = 4"),
        ("patch_sites.cu", "kPacksPerThread = 4"),
        ("capture.cu", "kRowsPerBlock = 4"),
        ("capture.cu", "kNumbersPerThread = 4"),
        ("capture.cu", "kQuantizeThreads = 128"),
        ("dequantize.cu", "kBlocksAtOnce = 8"),
        ("dequantize.cu", "kThreads = 256"),
    ):
        assert f"constexpr int {constant};" in source[file], constant


def test_a_page_without_its_marks_is_refused(tool):
    with pytest.raises(SystemExit, match="lacks"):
        tool.written("no marks", "gpus")
    begin, end = tool.marks("gpus")
    page = f"above\n{begin}\n\nold\n\n{end}\nbelow\n"
    new = tool.with_table(page, "gpus")
    assert tool.written(new, "gpus") == tool.gpus() and tool.with_table(new, "gpus") == new
    assert new.startswith("above\n") and new.endswith("\nbelow\n")


def test_numbers_are_short(tool):
    assert tool.quantity(1.61e9, "") == "1.61 G" and tool.quantity(12, "B") == "12 B"
    assert tool.microseconds(1.234e-6) == "1.23" and tool.microseconds(441e-6) == "441"
