"""The documentation builds without a warning, and the reference names everything public."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fastlens

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    page = (tmp_path / "site" / "api" / "models.html").read_text()
    assert "run_with_cache" in page and "from_pretrained" in page


def test_every_public_name_is_in_the_reference():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    for name in fastlens.__all__:
        assert name in pages, name


def test_the_page_of_missing_names_is_up_to_date():
    tool = runpy.run_path(str(ROOT / "tools" / "missing_names.py"))
    assert tool["PAGE"].read_text(encoding="utf-8") == tool["page"]()
