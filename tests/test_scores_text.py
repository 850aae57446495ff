"""How scores are written: labels, numbers, aligned tables."""

import pytest

from fastlens.scores_text import cell_name, code_point, html_table, short, text_table, visible


def test_visible():
    assert visible(" a b\n\t") == "·a·b\\n\\t"
    assert visible("two words", "kind") == "two words"
    assert visible("a\n", "kind") == "a\\n"
    assert visible(" é中", "query_pos") == "·é中"


def test_nothing_that_moves_a_terminal_comes_through():
    assert visible("\x1b[2J\x00\u2028\xa0") == "\\x1b[2J\\x00\\u2028\\xa0"
    assert visible("a\x1bb", "run") == "a\\x1bb"


def test_code_point():
    assert [code_point(char) for char in "\x07\xe9中"] == ["\\x07", "\\xe9", "\\u4e2d"]


def test_cell_name():
    assert cell_name(("layer", "pos"), ("L3", " of:9")) == "L3 ·of:9"
    assert cell_name(("head", "layer"), ("KV1", "L3")) == "L3KV1"
    assert cell_name(("run",), ("L1H2 + all MLPs",)) == "L1H2 + all MLPs"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (1.23456, "1.235"), (2, "2"), (float("nan"), "nan"), ("much", "much"), ([], "[]")],
)
def test_short(value, text):
    assert short(value) == text


def test_columns_are_aligned_by_what_a_terminal_shows():
    lines = text_table([["pos", "value"], ["中文:1", "-2"], ["e\u0301:2", "10.5"]], 1)
    assert lines == ["pos     value", "中文:1     -2", "e\u0301:2      10.5"]


def test_html_is_escaped():
    table = html_table([["pos", "value"], ["<b>&", "1"]], 1, "a < b")
    assert "<b>&" not in table
    assert '<td style="text-align:left">&lt;b&gt;&amp;</td>' in table
    assert '<td style="text-align:right">1</td>' in table
    assert "<caption>a &lt; b</caption>" in table
