"""``python -m fastlens.compat script.py ...`` or ``-m module ...``: run with fastlens for
`transformer_lens`, otherwise as ``python script.py ...`` would.
"""

import runpy
import sys
from pathlib import Path
from types import TracebackType

from fastlens.compat.finder import install

USAGE = "usage: python -m fastlens.compat (script.py | -m module) [arguments]"


def main(arguments: list[str]) -> None:
    """Run a script or module under `install`; what it raises is shown as Python itself would."""
    module = arguments[:1] == ["-m"]
    if module:
        arguments = arguments[1:]
    if not arguments or arguments[0].startswith("-"):
        sys.exit(USAGE)
    target = arguments[0]
    install()
    _show_tracebacks_from_the_script()
    sys.argv = arguments
    if module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    if not Path(target).is_file():
        sys.exit(f"python -m fastlens.compat: no file {target!r}\n{USAGE}")
    # Where `python -m` has the current folder, `python script.py` has the script's.
    sys.path[0] = str(Path(target).resolve().parent)
    runpy.run_path(target, run_name="__main__")


def _show_tracebacks_from_the_script() -> None:
    """Leave our own frames and runpy's out of what an uncaught error shows."""
    shown = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        rest = traceback
        while rest is not None and rest.tb_frame.f_code.co_filename in (__file__, *_RUNPY):
            rest = rest.tb_next
        shown(kind, error.with_traceback(rest or traceback), rest or traceback)

    sys.excepthook = hook


_RUNPY = ("<frozen runpy>", runpy.__file__)

if __name__ == "__main__":
    main(sys.argv[1:])
