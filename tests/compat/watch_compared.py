"""A pytest plugin: which of the functions on the lists called COMPARED do run, in both libraries.

``python -m pytest -p tests.compat.watch_compared FILES`` fails at the end if a test file lists a
name that none of its tests runs. Used by tests/compat/test_compared.py.
"""

import sys
import types
from typing import Any

import pytest

seen: dict[str, set[types.CodeType]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Watch every function that starts."""
    sys.setprofile(_note)


_current: set[types.CodeType] = set()


def _note(frame: types.FrameType, event: str, argument: Any) -> None:
    if event == "call":
        _current.add(frame.f_code)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Remember what ran in the tests of a file."""
    global _current
    _current = seen.setdefault(str(item.path), set())
    sys.setprofile(_note)
    return (yield)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Compare with the lists."""
    sys.setprofile(None)
    from tests.compat import surface, test_surface

    idle = []
    for name, file in test_surface.compared_elsewhere().items():
        ran = seen.get(str(test_surface.TESTS / file))
        if ran is None:
            continue
        path = test_surface.canonical_of(name)
        if surface.find(path) is None or path in test_surface.CALLS:
            continue
        for lens in (test_surface.THEIRS, test_surface.OURS):
            wanted = test_surface.codes(lens.static(path))
            if wanted and not wanted & ran:
                idle.append(f"{file}: {name} does not run in {lens}")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for line in idle:
        reporter.write_line(line)
    if idle:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
