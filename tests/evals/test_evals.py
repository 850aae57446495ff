"""What `fastlens.evals` holds."""

import pytest

from fastlens import evals


def test_every_name_is_there():
    assert all(hasattr(evals, name) for name in evals.__all__)


@pytest.mark.tl
def test_nothing_of_transformer_lens_is_missing():
    pytest.importorskip("transformer_lens")
    from transformer_lens import evals as theirs

    own = {
        name
        for name, value in vars(theirs).items()
        if name.isupper() or getattr(value, "__module__", None) == theirs.__name__
    }
    assert own <= set(evals.__all__)
