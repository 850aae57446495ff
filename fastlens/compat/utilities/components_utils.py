"""Short names of activations, by TransformerLens' path."""

from fastlens.act_names import get_act_name

__all__ = ["get_act_name"]
