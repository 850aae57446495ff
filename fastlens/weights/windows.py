"""Sliding windows of Hugging Face configs, as config fields."""

from collections.abc import Sequence
from typing import Any

from fastlens.errors import ConfigError

_KINDS = {"full_attention": "global", "sliding_attention": "local"}


def window_fields(
    window: int | None, kinds: Sequence[str], rotary: dict[str, Any]
) -> dict[str, Any]:
    """Config fields for layers that see a window of the last tokens; none where no layer does.

    Args:
        window: How many tokens a windowed layer sees, its own included.
        kinds: "full_attention" or "sliding_attention" for each layer (``layer_types``).
        rotary: The fields of the rotary embedding.

    Raises: ConfigError for another kind of layer, for windows without a size, and for windows with
        linearly scaled positions, which our windowed layers do not scale.
    """
    unknown = sorted(set(kinds) - set(_KINDS))
    if unknown:
        raise ConfigError(
            f"layer_types has {', '.join(map(repr, unknown))}. fastlens computes layers of "
            f"{' and '.join(_KINDS)}."
        )
    if "sliding_attention" not in kinds:
        return {}
    if window is None:
        raise ConfigError(
            "layer_types has 'sliding_attention', and the config gives the window no size. "
            "Set sliding_window, and use_sliding_window=True where the config has it."
        )
    if rotary.get("rotary_scaling_factor", 1.0) != 1.0:
        raise ConfigError(
            f"sliding_window={window} and linear rotary scaling were asked together. Layers with a "
            f"window are not scaled here, so this model cannot be computed exactly."
        )
    return {
        "use_local_attn": True,
        "window_size": window,
        "attn_types": [_KINDS[kind] for kind in kinds],
    }


def all_windowed(window: int | None, n_layers: int) -> list[str]:
    """The kinds of layers of a model that windows all of them, or none."""
    return ["full_attention" if window is None else "sliding_attention"] * n_layers
