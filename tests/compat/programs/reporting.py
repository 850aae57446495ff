"""How the programs here hand over what they found: a line of JSON for each result."""

import json
import sys
from pathlib import Path
from typing import Any


def report(name: str, value: Any) -> None:
    """Print one result; tensors become lists."""
    if hasattr(value, "tolist"):
        value = value.detach().cpu().tolist() if hasattr(value, "detach") else value.tolist()
    print(json.dumps({"name": name, "value": value}), flush=True)


def folder() -> Path:
    """Where the models are: the program's argument."""
    return Path(sys.argv[1])
