"""What README tells people to type works: its Python runs, its commands exit with 0."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastlens.cli import main
from fastlens.compat import uninstall

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")]


def blocks(*languages: str) -> list[str]:
    """The fenced blocks of README in those languages; "" is for those that name none."""
    found, inside = [], None
    for line in README.splitlines():
        if not line.startswith("```"):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            inside = [line.removeprefix("```")]
        else:
            found.append(inside)
            inside = None
    return ["\n".join(lines) for language, *lines in found if language in languages]


def commands(program: str) -> Iterator[list[str]]:
    """Every call of a program, in blocks and in running text, split as a shell would."""
    inline = re.findall(rf"`({program} [^`]*)`", README)
    fenced = [line for block in blocks("sh", "") for line in block.splitlines()]
    for line in [*inline, *fenced]:
        words = shlex.split(line, comments=True)
        if words and words[0] == program:
            yield words


def test_python_snippets_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    snippets = blocks("python")
    assert len(snippets) >= 4
    try:
        for snippet in snippets:
            exec(compile(snippet, "README.md", "exec"), names)
    finally:
        uninstall()
    assert (tmp_path / "heatmap.png").is_file() and (tmp_path / "scores").is_dir()
    shown = capsys.readouterr().out
    assert "logit difference" in shown and "Loaded pretrained model toy-induction" in shown
    # The story the first snippet tells: the answer sits at the letter that differs.
    assert names["scores"].top(1)[0].labels[1].startswith("z/j")


LINES = [words for words in commands("fastlens") if words[1] != "demo"]


@pytest.mark.parametrize("words", LINES, ids=lambda words: " ".join(words[:2]))
def test_commands_run(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words[1:]) == 0, capsys.readouterr().err
    if "--out" in words:
        out = tmp_path / words[words.index("--out") + 1]
        # Hidden ones aside: a lock against a second process.
        assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
            "scores.json",
            "scores.safetensors",
            "heatmap.png",
            "plan.json",
            "chunks",
        }


def test_every_command_is_shown():
    shown = {words[1] for words in commands("fastlens")}
    assert {"sweep", "heads", "models", "doctor", "demo"} <= shown


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    asked = {words[1] for words in commands("make")}
    assert {"demo", "test"} <= asked <= targets


def test_extras_that_are_asked_for_exist():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extras in re.findall(r"\.\[([\w,]+)\]", README):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), extra


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document):
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"`((?:docs|examples|benchmarks|tests|fastlens)/[\w./-]*)`", text)
    named += re.findall(r"python ((?:benchmarks|examples)/[\w./-]+)", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    # The results appear with the first measurement.
    assert not [name for name in missing if not name.startswith("benchmarks/results")]
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert not [link for link in links if not (document.parent / link).exists()]
