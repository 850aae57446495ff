"""`fastlens.utils` is TransformerLens' old path: the names of `utilities`, and no warning."""

import subprocess
import sys

import pytest

from fastlens import utils
from fastlens.compat import utilities


def test_every_name_is_that_of_utilities():
    assert utils.__all__ == utilities.__all__
    assert all(getattr(utils, name) is getattr(utilities, name) for name in utils.__all__)
    assert utils.devices is utilities.devices


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"no utils\.to_nunpy .* Nearest: 'to_numpy'"):
        _ = utils.to_nunpy
    with pytest.raises(ImportError):
        from fastlens.compat.utils import evals  # noqa: F401


def test_importing_it_warns_of_nothing_and_is_light():
    code = (
        "import sys; from fastlens import utils; "
        "print({'datasets', 'transformers', 'pandas'} & set(sys.modules))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
