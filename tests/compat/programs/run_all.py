"""Run every program here in one process, their lines marked by name: `run_all.py FOLDER`."""

import json
import runpy
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("*.py")):
    if path.stem not in ("run_all", "reporting"):
        print(json.dumps({"program": path.stem}), flush=True)
        runpy.run_path(str(path), run_name="__main__")
