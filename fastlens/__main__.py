"""``python -m fastlens``: the command line."""

import sys

from fastlens.cli import main

if __name__ == "__main__":
    sys.exit(main())
