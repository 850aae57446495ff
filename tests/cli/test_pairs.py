"""Pairs of prompts from options and files."""

import pytest

from fastlens.cli.options import OptionError
from fastlens.cli.pairs import Pairs, given_pairs, pairs_of_file


def test_one_pair_is_text_and_several_are_lists():
    assert given_pairs(["a"], ["b"], ["x"], []).texts() == ("a", "b")
    assert given_pairs(["a", "c"], ["b", "d"], ["x"], ["y", "z"]) == Pairs(
        ("a", "c"), ("b", "d"), ("x",), ("y", "z")
    )
    assert Pairs(("a", "c"), ("b", "d")).texts() == (["a", "c"], ["b", "d"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (([], [], [], []), "--clean is missing"),
        ((["a"], [], [], []), "--corrupted is missing"),
        ((["a", "b"], ["c"], [], []), "2 x --clean and 1 x --corrupted"),
        ((["a"], ["c"], ["x", "y"], []), "2 x --answer for 1 pairs"),
        ((["a"], ["c"], ["x"], ["y", "z"]), "2 x --wrong for 1 pairs"),
    ],
)
def test_what_does_not_pair_up(given, said):
    with pytest.raises(OptionError, match=said):
        given_pairs(*given)


def test_a_file_keeps_spaces_and_odd_characters(tmp_path):
    path = tmp_path / "pairs.tsv"
    # A byte-order mark, Windows line ends, and a separator that is no line end here.
    text = "\ufeffa b \tc\u2028d\t x\t y\r\n\r\ne\tf\tg\th"
    path.write_bytes(text.encode())
    assert pairs_of_file(path, [], []) == Pairs(
        ("a b ", "e"), ("c\u2028d", "f"), (" x", "g"), (" y", "h")
    )


def test_columns_that_a_file_lacks_come_from_options(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("a\tb\tx\nc\td\ty\n")
    assert pairs_of_file(path, [], [" z"]) == Pairs(("a", "c"), ("b", "d"), ("x", "y"), (" z",))
    with pytest.raises(OptionError, match="--answer was given, and --pairs .* too"):
        pairs_of_file(path, ["x"], [])
    with pytest.raises(OptionError, match="3 x --wrong for 2 pairs"):
        pairs_of_file(path, [], ["x", "y", "z"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no pairs"),
        ("\n \n", "holds no pairs"),
        ("a", "line 1: 1 columns"),
        ("a\tb\n\na\tb\tc\n", "line 3: 3 columns"),
        ("a\t\tc", "line 1: 3 columns with 2 texts"),
        ("a\tb\tc\td\te", "line 1: 5 columns"),
    ],
)
def test_files_that_do_not_fit(tmp_path, text, said):
    path = tmp_path / "pairs.tsv"
    path.write_text(text)
    with pytest.raises(OptionError, match=said):
        pairs_of_file(path, [], [])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        pairs_of_file(tmp_path / "none", [], [])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="cannot be read: 'utf-8'"):
        pairs_of_file(tmp_path / "binary", [], [])
