"""Kinds of layers as config fields."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.windows import all_windowed, window_fields

FULL, SLIDING = "full_attention", "sliding_attention"


def test_no_window_gives_no_fields():
    assert window_fields(4, [FULL] * 3, {}) == {}
    assert window_fields(None, all_windowed(None, 3), {}) == {}


def test_a_window_where_the_kinds_say():
    fields = window_fields(4, [FULL, SLIDING, SLIDING], {"rotary_scaling_factor": 1.0})
    assert fields == {
        "use_local_attn": True, "window_size": 4, "attn_types": ["global", "local", "local"],
    }  # fmt: skip
    assert window_fields(7, all_windowed(7, 2), {})["attn_types"] == ["local", "local"]


@pytest.mark.parametrize(
    ("window", "kinds", "rotary", "message"),
    [
        (4, [FULL, "chunked_attention"], {}, "layer_types has 'chunked_attention'"),
        (None, [SLIDING], {}, "gives the window no size"),
        (4, [SLIDING], {"rotary_scaling_factor": 2.0}, "linear rotary scaling"),
    ],
)
def test_what_cannot_be_computed_is_refused(window, kinds, rotary, message):
    with pytest.raises(ConfigError, match=message):
        window_fields(window, kinds, rotary)
