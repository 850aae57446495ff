"""The promises of DESIGN and CONTRIBUTING that a machine can check."""

import ast
import json
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastlens

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastlens"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]

MAX_CODE_LINES = 450

# Modules whose tests do not mirror their path: where they are tested, and why.
TESTED_ELSEWHERE: dict[str, str] = {
    "fastlens/__init__.py": "tests/test_architecture.py",  # public names and import cost
    "fastlens/__main__.py": "tests/cli/test_cli.py",  # run as a process
    "fastlens/compat/__main__.py": "tests/compat/test_finder.py",  # run as a process
    "fastlens/compat/missing.py": "tests/compat/test_surface.py",
    "fastlens/compat/names.py": "tests/compat/test_surface.py",
    "fastlens/patching/wave_layer.py": "tests/patching/test_wave.py",  # one layer of a wave
    "fastlens/kernels/kernel.py": "tests/kernels/test_kernels.py",  # a record, used by every test
}
# Kernels are tested from their registry, so that a new one is tested as soon as its file exists.
KERNEL_TESTS = "tests/kernels/test_kernels.py"

# What `fastlens.__all__` is. A change here changes the public interface: say it in CHANGELOG.
PUBLIC_NAMES = [
    "ActivationCache",
    "BertNextSentencePrediction",
    "FactoredMatrix",
    "HookPoint",
    "HookedEncoder",
    "HookedEncoderDecoder",
    "HookedModule",
    "HookedRootModule",
    "HookedTransformer",
    "HookedTransformerConfig",
    "OfHeads",
    "Scores",
    "TransformerLensKeyValueCache",
    "patching",
]

# Loaded when asked for, by the function that needs them.
LAZY_PACKAGES = {
    "gguf", "matplotlib", "pandas", "plotly", "transformer_lens", "transformers", "triton",
}  # fmt: skip
# In units of `import torch`. The star asks for every public name.
IMPORT_COST = {"import fastlens": 1.25, "from fastlens import *": 1.4}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}

each_module = pytest.mark.parametrize("path", MODULES, ids=NAMES)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def code_lines(path: Path) -> int:
    """Lines that hold code or a comment: all but blank ones and docstrings."""
    empty = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    with tokenize.open(path) as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type not in empty:
                lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(tree_of(path)))


def has_code(path: Path) -> bool:
    """Whether there is more than a docstring, imports and `__all__`."""

    def is_plain(node: ast.stmt) -> bool:
        if isinstance(node, ast.Assign):
            return [ast.unparse(target) for target in node.targets] == ["__all__"]
        return isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        )

    return not all(is_plain(node) for node in tree_of(path).body)


def is_kernel(path: Path) -> bool:
    """Whether the module ends in a `KERNEL` record, which the registry of kernels walks for."""
    targets = [node.targets for node in tree_of(path).body if isinstance(node, ast.Assign)]
    names = {ast.unparse(target) for group in targets for target in group}
    return path.parent == PACKAGE / "kernels" and "KERNEL" in names


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes of a module and public methods of those classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for node in body:
            if not isinstance(node, kinds) or node.name.startswith("_"):
                continue
            marks = {ast.unparse(mark).rsplit(".", 1)[-1] for mark in node.decorator_list}
            if marks & {"overload", "setter", "deleter"}:
                continue
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, f"{prefix}{node.name}.")

    return visit(tree.body, "")


SAMPLE = '''"""A module
of one class."""

import re

__all__ = ["Thing"]


class Thing:
    """Said."""

    # A comment counts.
    text = """two
lines"""

    def bare(self): ...

    def _private(self): ...

    @property
    def size(self):
        """Said."""
'''


def test_the_measures_of_this_file(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(SAMPLE, encoding="utf-8")
    assert code_lines(path) == 10
    assert [name for name, _ in public_definitions(tree_of(path))] == [
        "Thing",
        "Thing.bare",
        "Thing.size",
    ]
    assert has_code(path)
    path.write_text(SAMPLE.partition("\n\nclass")[0], encoding="utf-8")
    assert not has_code(path)


@each_module
def test_a_module_stays_readable(path):
    assert code_lines(path) <= MAX_CODE_LINES, (
        f"{code_lines(path)} lines of code: split it (cap {MAX_CODE_LINES}, about 150 is good)"
    )


@each_module
def test_public_things_have_docstrings(path):
    tree = tree_of(path)
    if tree.body:
        assert ast.get_docstring(tree), f"{path.name} says nothing about what lives in it"
    bare = [name for name, node in public_definitions(tree) if not ast.get_docstring(node)]
    assert not bare, f"without a docstring: {', '.join(bare)}"


@each_module
def test_a_module_has_its_test_file(path):
    if not has_code(path) or is_kernel(path):
        return
    name = str(path.relative_to(ROOT))
    inside = path.relative_to(PACKAGE)
    stem = inside.parent.name if inside.stem == "__init__" else inside.stem.lstrip("_")
    expected = TESTED_ELSEWHERE.get(name) or f"tests/{inside.parent / f'test_{stem}.py'}"
    assert (ROOT / expected).is_file(), f"{name} needs {expected}"


def test_the_exceptions_are_not_stale():
    assert set(TESTED_ELSEWHERE) <= set(NAMES)
    assert any(is_kernel(path) for path in MODULES) and (ROOT / KERNEL_TESTS).is_file()


def test_names_say_what_is_inside():
    inside = [path.relative_to(PACKAGE) for path in MODULES]
    vague = [
        str(path)
        for path in inside
        if path.parts[0] != "compat" and VAGUE_NAMES & {path.stem, *path.parent.parts}
    ]
    assert not vague


def test_annotations_are_evaluated():
    """jaxtyping reads annotations as objects, which that import turns into strings."""
    for path in [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))]:
        imports = [node for node in tree_of(path).body if isinstance(node, ast.ImportFrom)]
        assert "__future__" not in {node.module for node in imports}, path


def test_public_names():
    assert fastlens.__all__ == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(fastlens, name) is not None
    assert set(PUBLIC_NAMES) <= set(dir(fastlens))


def test_the_version_is_the_same_everywhere():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{fastlens.__version__}"' in text
    assert f"## {fastlens.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# One interpreter imports torch, then fastlens: the same noise is in both times. Prints the CPU
# seconds of each and the packages that only the second one loaded.
PROBE = """
import json, sys, time
start = time.process_time()
import torch
middle, before = time.process_time(), set(sys.modules)
{statement}
end = time.process_time()
loaded = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})
print(json.dumps([middle - start, end - middle, loaded]))
"""


def probe(statement: str) -> tuple[float, set[str]]:
    """Cost of an import as a multiple of torch's, and the packages it adds to torch's."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE.format(statement=statement)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    torch_seconds, more_seconds, modules = json.loads(result.stdout.splitlines()[-1])
    return 1 + more_seconds / torch_seconds, set(modules)


@pytest.mark.parametrize("statement", IMPORT_COST)
def test_importing_fastlens_is_light(statement):
    """No heavy package is loaded, and the cost is that of torch (least of up to five runs).

    `import fastlens` loads its parts at first use, so every public name is asked for as well.
    """
    ratios = []
    while len(ratios) < 5 and (not ratios or min(ratios) > IMPORT_COST[statement]):
        ratio, loaded = probe(statement)
        ratios.append(ratio)
        assert "fastlens" in loaded
        assert not loaded & LAZY_PACKAGES
    assert min(ratios) <= IMPORT_COST[statement], (
        f"{statement} costs {min(ratios):.2f} x import torch"
    )


def tracked_files() -> list[Path]:
    """What git tracks or would track; without git, everything that is not a build output."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    if not names:
        hidden = re.compile(r"(^|/)(\.venv|\.git|build|dist|__pycache__|[^/]*\.egg-info)/")
        files = (str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file())
        names = [name for name in files if not hidden.search(name)]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_path_of_a_machine_is_written_down():
    # Spelled so that this file does not match itself.
    folders = "|".join(("work", "root", "home", "opt", "Users"))
    pattern = re.compile(rf"(?<![\w./~-])/(?:{folders})/[\w.-]")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_imports_go_down_only():
    """The floors of DESIGN section 2, as import-linter reads them from pyproject.toml."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as main; main()",
    ]
    result = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


# Pure functions over integers: a plan is made, tested and read without a tensor.
WITHOUT_TORCH = ("plan", "runs", "sites", "uses")


def test_the_planner_does_not_know_torch():
    import grimp

    graph = grimp.build_graph("fastlens", include_external_packages=True, cache_dir=None)
    for name in WITHOUT_TORCH:
        assert graph.find_shortest_chain(f"fastlens.patching.{name}", "torch") is None, name
