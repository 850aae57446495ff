"""Registries find modules by walking a package."""

import pytest

from fastlens.errors import FastlensError
from fastlens.registry import Registry


def test_entries_are_found_and_unknown_names_have_near_ones(tmp_path, monkeypatch):
    package = tmp_path / "found_things"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "alpha.py").write_text("THING = 'a'\n")
    (package / "beta.py").write_text("THING = 'b'\n")
    (package / "_private.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    things = Registry("found_things", "THING")
    assert things.names() == ["alpha", "beta"] and list(things) == ["a", "b"]
    assert things.get("beta") == "b"
    with pytest.raises(FastlensError, match="'alhpa'.*Nearest: 'alpha'"):
        things.get("alhpa")
    (package / "broken.py").write_text("NOTHING = 1\n")
    with pytest.raises(AttributeError, match="THING"):
        Registry("found_things", "THING").names()
