"""What the texts of options mean."""

import pytest

from fastlens.cli.options import Dtype, OptionError, names, selection


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (None, None),
        ("3", [3]),
        ("0,4,-1", [0, 4, -1]),
        (" 1, 2 ", [1, 2]),
        ("2:8", slice(2, 8)),
        (":8", slice(None, 8)),
        ("-2:", slice(-2, None)),
        ("::2", slice(None, None, 2)),
    ],
)
def test_selections(text, meaning):
    assert selection(text, "--layers") == meaning


@pytest.mark.parametrize("text", ["", "a", "1-3", "1,2:4", "1;2", "1:2:3:4", "1.5", "1,,2"])
def test_selections_that_mean_nothing(text):
    with pytest.raises(OptionError, match="--layers") as caught:
        selection(text, "--layers")
    assert "Write 3, 0,4,-1 or 2:8" in str(caught.value)


def test_names():
    assert names(None) is None
    assert names("z, q,") == ["z", "q"]


def test_dtypes_are_torchs():
    import torch

    assert all(isinstance(getattr(torch, dtype.value), torch.dtype) for dtype in Dtype)
