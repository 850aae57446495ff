"""The documentation builds without a warning, and the reference names everything public."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fastlens

ROOT = Path(__file__).parents[2]

# Entries of the reference, among them what a class inherits.
_CACHE = "cache.activation_cache.ActivationCache"
_MODEL = "model.hooked_transformer.HookedTransformer"
SHOWN = {
    "cache.html": [
        *(f"{_CACHE}.{name}" for name in ("decompose_resid", "pattern_rows", "to", "nbytes")),
        *(f"{_CACHE}.{name}" for name in ("apply_slice_to_batch_dim", "remove_batch_dim", "keys")),
    ],
    "models.html": [
        *(f"{_MODEL}.{name}" for name in ("from_pretrained", "run_with_cache", "run_with_hooks")),
        "model.root.TransformerRoot.run_with_cache",
    ],
    "hooks.html": ["hooks.of_heads.OfHeads", "hooks.root.HookedRootModule.run_with_cache"],
}


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
    for page, names in SHOWN.items():
        text = (tmp_path / "site" / "api" / page).read_text()
        for name in names:
            assert f'id="fastlens.{name}"' in text, name


def test_every_public_name_is_in_the_reference():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    for name in fastlens.__all__:
        assert name in pages, name


def test_the_page_of_missing_names_is_up_to_date():
    tool = runpy.run_path(str(ROOT / "tools" / "missing_names.py"))
    assert tool["PAGE"].read_text(encoding="utf-8") == tool["page"]()
