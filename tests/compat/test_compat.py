"""TransformerLens' module names are where code looks for them."""

import fastlens
from fastlens.compat import utils


def test_utils_is_imported_from_the_top():
    from fastlens import utils as from_the_top

    assert from_the_top is utils is fastlens.utils
