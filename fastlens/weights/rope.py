"""Rotary embedding parameters of Hugging Face configs, old keys and new, as config fields."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastlens.errors import ConfigError
from fastlens.weights.gguf_file import GgufReader

# Attributes that `rotary_fields` reads.
ROTARY_ATTRIBUTES = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
DEFAULT_THETA = 10000.0

_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
    "yarn": {
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "original_max_position_embeddings", "truncate",
    },
    "longrope": {
        "factor", "attention_factor", "short_factor", "long_factor",
        "original_max_position_embeddings",
    },
}  # fmt: skip
_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rotary_fields(
    config: dict[str, Any],
    d_head: int,
    n_ctx: int,
    *,
    theta_name: str = "rope_theta",
    fraction: float | int | None = None,
) -> dict[str, Any]:
    """Config fields for the rotary embedding of a Hugging Face config dict.

    Reads ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling`` (older).

    Args:
        d_head: Head size.
        n_ctx: The config's own context length; some scalings refer to it.
        theta_name: The old attribute that holds the base.
        fraction: Share of ``d_head`` that is rotated, where ``rope_parameters`` does not say; None
            for an architecture that rotates whole heads and nothing less.

    Raises: ConfigError for a kind of scaling that no config field expresses, or that is incomplete.
    """
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KEYS:
        raise ConfigError(
            f"the config asks for rope_type={kind!r}. fastlens computes {', '.join(_KEYS)}; "
            f"{kind!r} changes with the length of the text or has tables of its own."
        )
    unknown = {k for k, v in rope.items() if v is not None} - _KEYS[kind] - _ALWAYS
    if unknown:
        raise ConfigError(
            f"rope_type={kind!r} has parameters that are not accounted for: "
            f"{', '.join(sorted(unknown))}. The model is not loaded, as they may change it."
        )
    missing = [key for key in _REQUIRED.get(kind, ()) if rope.get(key) is None]
    if missing:
        raise ConfigError(f"rope_type={kind!r} needs {', '.join(missing)}, which is not stated.")
    theta, stated = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    if fraction is None and stated not in (None, 1, 1.0):
        raise ConfigError(
            f"partial_rotary_factor={stated} was asked of an architecture that rotates whole heads."
        )
    share = stated or fraction or 1.0
    fields: dict[str, Any] = {
        "positional_embedding_type": "rotary",
        "rotary_base": config.get(theta_name, DEFAULT_THETA) if theta is None else theta,
        "rotary_dim": int(d_head * share),
        "rotary_adjacent_pairs": False,
    }
    original = rope.get("original_max_position_embeddings") or n_ctx
    if kind == "linear":
        fields["rotary_scaling_factor"] = float(rope["factor"])
    elif kind == "llama3":
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_original_ctx_len": original,
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_by_parts_factor": rope["factor"],
        }
    elif kind == "yarn":
        factor = float(rope.get("factor") or n_ctx / original)
        fields |= {
            "use_yarn_rope": True,
            "yarn_factor": factor,
            "yarn_attention_factor": _attention_factor(rope, factor),
            "yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "yarn_beta_slow": float(rope.get("beta_slow") or 1),
            "yarn_original_max_position_embeddings": original,
            "yarn_truncate": rope.get("truncate", True),
        }
    elif kind == "longrope":
        original = config.get("original_max_position_embeddings") or original
        fields |= {
            "longrope_short_factor": list(rope["short_factor"]),
            "longrope_long_factor": list(rope["long_factor"]),
            "longrope_original_ctx_len": original,
            "longrope_attention_factor": _longrope_factor(rope, n_ctx, original),
        }
    return fields


def rotary_fields_of_kinds(
    config: dict[str, Any],
    d_head: int,
    n_ctx: int,
    kinds: Sequence[str],
    *,
    theta: float,
    local_theta: float | None = None,
) -> dict[str, Any]:
    """Config fields where layers with a window have rotary parameters of their own.

    Reads ``rope_parameters`` with one dict for each kind of layer (transformers 5), and the older
    ``rope_theta`` with ``rope_local_base_freq`` and a ``rope_scaling`` of the global layers alone.

    Args:
        kinds: One a layer, as transformers' ``layer_types``.
        theta: Base of global layers where the config says none.
        local_theta: The same for windowed layers; None for the base of the global ones.

    Raises: ConfigError as `rotary_fields`, and for scalings that our windowed layers would share
        with the global ones though the config's do not, or the other way round.
    """
    stated = config.get("rope_parameters") or {}
    if stated and not {"full_attention", "sliding_attention"} & set(stated):
        raise ConfigError(
            f"rope_parameters={stated!r} was asked of an architecture that has one dict for each "
            f"kind of layer. Nest it: {{'full_attention': ..., 'sliding_attention': ...}}."
        )
    full = {**(stated.get("full_attention") or {}), **(config.get("rope_scaling") or {})}
    local = dict(stated.get("sliding_attention") or {})
    base = full.setdefault("rope_theta", config.get("rope_theta", theta))
    local.setdefault(
        "rope_theta",
        config.get("rope_local_base_freq", base if local_theta is None else local_theta),
    )
    fields = rotary_fields({"rope_parameters": full}, d_head, n_ctx)
    if "sliding_attention" not in kinds:
        return fields
    if local["rope_theta"] != base:
        fields["rotary_base_local"] = local["rope_theta"]
    full_kind, local_kind = (
        rope.get("rope_type", rope.get("type", "default")) for rope in (full, local)
    )
    if local_kind == "default" and full_kind in ("default", "linear", "yarn"):
        return fields | ({"yarn_global_attn_only": True} if full_kind == "yarn" else {})
    if local == full and full_kind in ("llama3", "yarn"):
        return fields
    raise ConfigError(
        f"rope_type={full_kind!r} was asked for global layers and {local_kind!r} for those with a "
        f"window. fastlens computes windowed layers without scaling below global ones with linear "
        f"scaling or YaRN, or the same YaRN or Llama-3 scaling in both."
    )


def _longrope_factor(rope: dict[str, Any], n_ctx: int, original: int) -> float:
    """What LongRoPE multiplies sine and cosine with (Ding et al. 2402.13753)."""
    factor = float(rope.get("factor") or n_ctx / original)
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _attention_factor(rope: dict[str, Any], factor: float) -> float:
    """What YaRN multiplies sine and cosine with (Peng et al. 2309.00071, section 3.4)."""
    stated = rope.get("attention_factor")
    if stated is not None:
        return float(stated)

    def growth(mscale: float | int) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    return growth(mscale) / growth(of_all) if mscale and of_all else growth(1.0)


def gguf_rope(reader: GgufReader, architecture: str) -> dict[str, Any]:
    """``rope_scaling`` from a GGUF file: its ``rope.scaling.*`` keys, or Llama 3's table.

    Raises: ConfigError for a kind of scaling other than none, linear, YaRN and Llama 3's.
    """
    prefix = f"{architecture}.rope.scaling."
    stated = {
        key.removeprefix(prefix): value
        for key, value in reader.metadata.items()
        if key.startswith(prefix)
    }
    kind, factor = stated.pop("type", "none"), stated.pop("factor", None)
    original = stated.pop("original_context_length", None)
    stated.pop("finetuned", None)
    if stated or kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"the GGUF file scales rotary positions by type {kind!r} with {sorted(stated)}. "
            f"fastlens reads none, linear and yarn without further keys from GGUF."
        )
    if "rope_freqs.weight" in reader.shapes:
        return {"rope_scaling": _llama3_scaling(reader, architecture)}
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = original
    return {"rope_scaling": scaling}


def _llama3_scaling(reader: GgufReader, architecture: str) -> dict[str, Any]:
    """The parameters behind a table of divisors: all released Llama 3 models differ in one."""
    table = reader.read("rope_freqs.weight", torch.float64)
    scaling = {
        "rope_type": "llama3",
        "factor": round(table.max().item(), 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = reader.metadata.get(f"{architecture}.rope.freq_base", DEFAULT_THETA)
    steps = torch.arange(table.numel(), dtype=torch.float64) / table.numel()
    turns = 8192 * base**-steps / (2 * math.pi)
    smooth = ((turns - 1.0) / 3.0).clamp(0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if not torch.allclose(table, expected, rtol=1e-5):
        raise ConfigError(
            "the GGUF file has a table of rotary divisors (rope_freqs.weight) that is not Llama "
            "3's. No config field expresses it."
        )
    return scaling
