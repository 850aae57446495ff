"""Write docs/missing.md: TransformerLens' public names that fastlens lacks, each with its reason.

python tools/missing_names.py
"""

from pathlib import Path

from fastlens.compat.missing import MISSING

PAGE = Path(__file__).parents[1] / "docs" / "missing.md"
HEAD = """\
# Names that are missing

Public names of TransformerLens 3.9 that fastlens has not; a name stands for everything below it.
A test compares this list with the installed package: whatever else is missing fails.
"""


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for reason, names in MISSING.items():
        listed = "\n".join(f"- `transformer_lens.{name}`" for name in sorted(names.split()))
        parts.append(f"## {reason[0].upper()}{reason[1:]}\n\n{listed}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
