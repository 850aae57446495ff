"""Pairs of prompts and their answers, from options or from a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlens.cli.options import OptionError

COLUMNS = ("clean", "corrupted", "answer", "wrong")


@dataclass(frozen=True)
class Pairs:
    """What a sweep is about.

    Attributes:
        clean, corrupted: The prompts, pair by pair.
        answer, wrong: One token for all pairs, one for each, or none.
    """

    clean: tuple[str, ...]
    corrupted: tuple[str, ...]
    answer: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()

    def texts(self) -> tuple[str | list[str], str | list[str]]:
        """Clean and corrupted as `sweep` takes them."""
        if len(self.clean) == 1:
            return self.clean[0], self.corrupted[0]
        return list(self.clean), list(self.corrupted)


def given_pairs(
    clean: Sequence[str], corrupted: Sequence[str], answer: Sequence[str], wrong: Sequence[str]
) -> Pairs:
    """Pairs from options that may be given several times.

    Raises: OptionError if they do not go together.
    """
    if not clean or not corrupted:
        missing = "--corrupted" if clean else "--clean"
        raise OptionError(f"{missing} is missing. Give both prompts, or --pairs with a file.")
    if len(clean) != len(corrupted):
        raise OptionError(
            f"{len(clean)} x --clean and {len(corrupted)} x --corrupted do not pair up. "
            f"Give as many of each."
        )
    _check_answers(len(clean), answer, wrong)
    return Pairs(tuple(clean), tuple(corrupted), tuple(answer), tuple(wrong))


def pairs_of_file(path: Path, answer: Sequence[str], wrong: Sequence[str]) -> Pairs:
    """Pairs from a file: two to four columns with tabs between, one pair a line.

    Spaces count: the answer is usually a token that starts with one. Empty lines are left out.

    Args:
        answer, wrong: For columns that the file does not have.

    Raises: OptionError for a file that cannot be read or a line that does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"--pairs {path} cannot be read: {reason}.") from error
    # Not `splitlines`, which also breaks lines at characters that a prompt may hold.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    rows = {number: line.split("\t") for number, line in enumerate(lines, 1) if line.strip()}
    if not rows:
        raise OptionError(f"--pairs {path} holds no pairs.")
    width = len(next(iter(rows.values())))
    for number, row in rows.items():
        if len(row) != width or not 2 <= width <= len(COLUMNS) or not all(row):
            raise OptionError(
                f"--pairs {path}, line {number}: {len(row)} columns with "
                f"{sum(map(bool, row))} texts. Every line holds, with tabs between, "
                f"{', '.join(COLUMNS)}; the last one or two may be missing in all lines."
            )
    columns = [tuple(column) for column in zip(*rows.values(), strict=True)]
    for option, given, at in (("--answer", answer, 2), ("--wrong", wrong, 3)):
        if given and width > at:
            raise OptionError(f"{option} was given, and --pairs {path} has that column too.")
    _check_answers(len(rows), answer, wrong)
    answers = columns[2] if width > 2 else tuple(answer)
    return Pairs(columns[0], columns[1], answers, columns[3] if width > 3 else tuple(wrong))


def _check_answers(n_pairs: int, answer: Sequence[str], wrong: Sequence[str]) -> None:
    for option, given in (("--answer", answer), ("--wrong", wrong)):
        if len(given) not in (0, 1, n_pairs):
            raise OptionError(
                f"{len(given)} x {option} for {n_pairs} pairs of prompts. Give one for all, or "
                f"one for each."
            )
