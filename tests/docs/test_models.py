"""docs/models.md and CONTRIBUTING's example say what the tables and tests are."""

import re
import runpy
import textwrap
from pathlib import Path

import pytest

from fastlens.weights.family import FAMILIES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "tools" / "models_page.py"))


@pytest.fixture(scope="module")
def page(tool):
    return tool["PAGE"].read_text(encoding="utf-8")


def test_the_page_is_up_to_date(tool, page):
    assert page == tool["page"](), "run: python tools/models_page.py"


def test_every_family_has_a_row_and_a_section(page):
    rows = re.findall(r"^\| \[(\S+)\]\(#(\S+)\) \|", page, re.MULTILINE)
    names = sorted(family.name for family in FAMILIES)
    assert [name for name, _ in rows] == names == [anchor for _, anchor in rows]
    assert re.findall(r"^## (\S+)$", page, re.MULTILINE) == names


def test_every_family_says_what_it_was_compared_with(tool, page):
    for family in FAMILIES:
        text = tool["section"](family)
        assert text in page
        assert "- Generated tests against " in text or "- Tests: " in text
        assert family.architectures[0] in text and "Mechanisms: " in text


def test_enough_is_verified_against_hugging_face(tool):
    verified = [one for one in FAMILIES if tool["tests_of"](one) and not tool["is_remote"](one)]
    assert len(verified) >= 40


@pytest.mark.parametrize(
    "file", ["fastlens/weights/families/arcee.py", "tests/weights/families/test_arcee.py"]
)
def test_the_worked_example_is_the_real_thing(file):
    code = textwrap.indent((ROOT / file).read_text(encoding="utf-8"), "    ", str.strip)
    assert code in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
