"""Every public name of TransformerLens 3.9: is it here, with the same arguments and values?

`fastlens.compat.missing` lists by name, with a reason, what is not.
"""

import ast
import functools
import importlib
import inspect
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformer_lens")

from fastlens.compat.finder import ROOT
from fastlens.compat.missing import DIFFERENT, reason_for, reasons
from fastlens.compat.names import EXCEPTIONS, HOMES, MODULES, homes, names_of
from fastlens.factored_matrix import FactoredMatrix
from tests.close import assert_close_to
from tests.compat import surface
from tests.compat.calls import CALLS
from tests.compat.library import Library

pytestmark = pytest.mark.tl

TESTS = Path(__file__).parents[1]
OURS, THEIRS = Library(is_ours=True), Library(is_ours=False)

# Names whose values no test compares, and why.
NOT_COMPARED: dict[str, str] = {
    **dict.fromkeys(
        [
            f"{model}.{model}.{device}"
            for model in ("HookedTransformer", "HookedEncoder", "HookedEncoderDecoder")
            for device in ("cuda", "mps")
        ],
        "needs that device",
    ),
}
# Constants whose values differ, and why.
OTHER_VALUES: dict[str, str] = {
    **dict.fromkeys(
        ("OFFICIAL_MODEL_NAMES", "MODEL_ALIASES", "DEFAULT_MODEL_ALIASES"),
        "name what can be loaded here; compared in tests/compat/test_supported_models.py",
    ),
    "NEED_REMOTE_CODE_MODELS": "no model's own code is run here",
    "DTYPE_FROM_STRING": "has float64 too",
    **dict.fromkeys(
        """INVALID_HEAD_NAME_ERR CACHE_WITH_SEQ_LIST_ERR SEQ_LEN_ERR DET_PAT_NOT_SQUARE_ERR
        MIXED_CPU_GPU_ERROR""".split(),
        "a message, in words of its own",
    ),
}


# -- names and arguments ---------------------------------------------------------------------------


def passed_on_or_own(path: str) -> dict[str, Any]:
    """The public names of one real module that are not missing, where they are defined included."""
    return {
        name: value
        for name, value in surface.public_names(path).items()
        if reason_for(f"{path}.{name}".lstrip(".")) is None
        and reason_for(surface.canonical(value, name)) is None
    }


@pytest.mark.parametrize("path", surface.looked_at(), ids=lambda path: path or ROOT)
def test_a_module_has_the_same_names(path):
    assert path in MODULES, f"{ROOT}.{path} is not in fastlens.compat.names"
    lacking = sorted(set(passed_on_or_own(path)) - set(names_of(path)))
    assert not lacking, f"{ROOT}.{path} lacks {', '.join(lacking)}"
    for name in passed_on_or_own(path):
        assert OURS.static(f"{path}.{name}".lstrip(".")) is not None or name == "USE_DEFAULT_VALUE"


def test_every_name_of_the_tables_leads_somewhere():
    lost = []
    for path in MODULES:
        for name, (module, attribute) in names_of(path).items():
            if not hasattr(importlib.import_module(module), attribute):
                lost.append(f"{path}.{name} -> {module}:{attribute}")
    assert not lost, "\n".join(lost)
    used = {
        entry.rpartition("=")[2] or entry for names in MODULES.values() for entry in names.split()
    }
    assert set(homes()) <= used | {name.partition("=")[0] for name in used}
    assert {path for path, _ in EXCEPTIONS} <= set(MODULES) and HOMES


NAMES = dict(surface.things())


@pytest.mark.parametrize("name", [name for name in NAMES if reason_for(name) is None])
def test_a_thing_takes_the_same_arguments(name):
    value = NAMES[name]
    got = OURS.static(name)
    if surface.is_typing(value) and not inspect.isclass(value):
        return
    if inspect.isclass(value):
        assert inspect.isclass(got), f"{name} is {got!r}"
        lacking = set(surface.fields(value)) - set(surface.fields(got))
        assert not lacking, f"{name} lacks the fields {lacking}"
    want_signature = surface.signature(value)
    if want_signature is None or surface.is_protocol(value):
        return
    got_signature = surface.signature(got)
    assert got_signature is not None, f"{name} cannot be called"
    problems = surface.differences(want_signature, got_signature)
    allowed = DIFFERENT.get(name, {})
    found = {problem.partition("=")[0].partition(" ")[0] for problem in problems}
    assert found == set(allowed), f"{name}{got_signature}, not {want_signature}: {problems}"


def test_different_arguments_are_not_stale():
    assert set(DIFFERENT) <= set(NAMES)


@pytest.mark.parametrize("name", reasons())
def test_what_is_missing_is_missing(name):
    if not any(path == name or path.startswith(name + ".") for path in surface.all_paths()):
        surface.find(name)  # it must exist there
    for path in MODULES:
        assert path != name, f"{name} is listed as missing but is in MODULES"
    with pytest.raises(AttributeError):
        OURS.static(name)


# -- values ----------------------------------------------------------------------------------------


CONSTANTS = {
    name: value
    for name, value in NAMES.items()
    if surface.function_of(value) is None
    and not inspect.isclass(value)
    and not surface.is_typing(value)
    and reason_for(name) is None
    and name.rsplit(".", 1)[-1] not in OTHER_VALUES
    and surface.signature(value) is None
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_has_the_same_value(name):
    same(OURS.static(name), CONSTANTS[name], name)


def same(got: Any, want: Any, name: str) -> None:
    """Compare what two libraries gave, by value: their classes are not each other's."""
    if isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor), f"{name}: {type(got)}"
        assert got.shape == want.shape, f"{name}: {got.shape}, not {want.shape}"
        if want.dtype.is_floating_point:
            assert got.dtype == want.dtype, name
            largest = (
                float(want.detach().abs().nan_to_num(posinf=0, neginf=0).max())
                if want.numel()
                else 1
            )
            assert_close_to(got, want, atol=2e-5 * max(1.0, largest), name=name)
        else:
            assert_close_to(got, want, atol=0.0, name=name)
    elif isinstance(want, int | float) and not isinstance(want, bool):
        assert not isinstance(got, bool) and got == pytest.approx(want, abs=1e-5), name
    elif isinstance(want, np.ndarray | np.floating):
        assert_close_to(got, want, atol=1e-5, name=name)
    elif type(want).__name__ == "FactoredMatrix":
        assert isinstance(got, FactoredMatrix), name
        same((got.A, got.B), (want.A, want.B), name)
    elif type(want).__name__ == "DataFrame":
        assert got.equals(want), name
    elif isinstance(want, dict):
        assert sorted(map(str, got)) == sorted(map(str, want)), f"{name}: {list(got)}"
        for key in want:
            same(got[key], want[key], f"{name}[{key!r}]")
    elif isinstance(want, list | tuple | types.GeneratorType):
        got, want = list(got), list(want)
        assert len(got) == len(want), name
        for place, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            same(ours, theirs, f"{name}[{place}]")
    elif inspect.isroutine(want):
        assert callable(got), name
    elif want is None or isinstance(want, str | int | bool | set | torch.dtype | torch.device):
        assert got == want and isinstance(got, type(want)), f"{name}: {got!r}, not {want!r}"
    else:
        raise AssertionError(f"{name}: values of {type(want)} are not compared")


def codes(value: Any) -> set[types.CodeType]:
    """The code of a function as it was written, under all decorators."""
    function, found = surface.function_of(value), set()
    if inspect.isclass(value):
        for base in value.__mro__:
            for member in vars(base).values():
                function = surface.function_of(member)
                if function is not None and base.__module__.startswith((ROOT, "fastlens")):
                    found |= codes(function)
        return found
    while function is not None:
        found |= {function.__code__} if hasattr(function, "__code__") else set()
        function = getattr(function, "__wrapped__", None)
    return found


class Watch:
    """Which functions run meanwhile."""

    def __enter__(self) -> "Watch":
        self.seen: set[types.CodeType] = set()
        self._before = sys.getprofile()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self._before)

    def _note(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self.seen.add(frame.f_code)


def outcome(lens: Library, name: str) -> Any:
    """What a call gives, after checking that it ran the thing it is named for."""
    with Watch() as watch, warnings.catch_warnings():
        if not lens.is_ours:
            warnings.simplefilter("ignore")
        warnings.simplefilter("ignore", DeprecationWarning)
        result = CALLS[name](lens)
        if isinstance(result, types.GeneratorType):
            result = list(result)
    wanted = codes(lens.static(name))
    assert not wanted or wanted & watch.seen, f"the call of {name} does not run it in {lens}"
    return result


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_same(name):
    assert reason_for(name) is None
    want = outcome(THEIRS, name)
    same(outcome(OURS, name), want, name)


@functools.cache
def compared_elsewhere() -> dict[str, str]:
    """Names on a list called COMPARED of any test file -> that file."""
    found = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "COMPARED" not in text or path == Path(__file__):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMPARED":
                for name in _evaluated(path, node):
                    found[name] = str(path.relative_to(TESTS))
    return found


def _evaluated(path: Path, node: ast.Assign) -> list[str]:
    """The names a list has: literal, or made from other literals of the file."""
    try:
        return list(ast.literal_eval(node.value))
    except ValueError:
        module = importlib.import_module(
            "tests." + ".".join(path.relative_to(TESTS).with_suffix("").parts)
        )
        return list(module.COMPARED)


def canonical_of(name: str) -> str:
    """Where a thing that is listed under any of its paths is defined."""
    path = name.removeprefix(ROOT + ".")
    return surface.canonical(surface.find(path), path)


def test_lists_of_compared_names_are_true():
    """Each is a name of TransformerLens. That its test runs it: test_compared.py."""
    wrong = []
    for name, file in compared_elsewhere().items():
        try:
            canonical_of(name)
        except AttributeError:
            wrong.append(f"{file}: TransformerLens has no {name}")
    assert not wrong, "\n".join(wrong)


def test_every_name_has_a_call():
    wanted = [name for name in surface.callables() if reason_for(name) is None]
    done = {*CALLS, *map(canonical_of, compared_elsewhere()), *NOT_COMPARED}
    # A class is compared through its methods.
    done |= {name.rpartition(".")[0] for name in done}
    lacking = [name for name in wanted if name not in done]
    assert not lacking, f"{len(lacking)} names have no call:\n" + "\n".join(lacking)


def test_calls_and_exceptions_are_not_stale():
    known = set(surface.callables())
    assert not set(CALLS) - known and not set(NOT_COMPARED) - known
    assert not set(NOT_COMPARED) & set(CALLS)
