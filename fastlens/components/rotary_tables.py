"""Sine and cosine tables of rotary position embeddings, with the scalings models use."""

import functools
import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ShapeError


def rotary_tables(
    cfg: HookedTransformerConfig, n_ctx: int, dtype: torch.dtype, is_local: bool = False
) -> tuple[Float[Tensor, "pos rotary_dim"], Float[Tensor, "pos rotary_dim"]]:
    """(sin, cos) for positions ``0 .. n_ctx - 1``.

    Angle = position * frequency; frequency i is ``base ** (-2i / rotary_dim)``, then scaled as the
    config says: linear, NTK-by-parts (Llama 3.1) or YaRN (Peng et al. 2309.00071). With LongRoPE
    the rows are not positions but what `table_rows` gives.

    Args:
        is_local: A sliding-window layer, which may have its own base and is not scaled.

    Numerics: computed in float32 and cast, in the order Hugging Face does; in float64 for a
        float64 model.
    """
    assert cfg.rotary_dim is not None
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    base = cfg.rotary_base
    if is_local and cfg.rotary_base_local is not None:
        base = cfg.rotary_base_local
    steps = torch.arange(0, cfg.rotary_dim, 2, dtype=precise) / cfg.rotary_dim
    frequencies = 1.0 / (base**steps)
    attention_factor = 1.0
    if cfg.longrope_short_factor is not None:
        return _longrope(frequencies, n_ctx, cfg, dtype)
    if cfg.use_NTK_by_parts_rope:
        frequencies = _by_parts(frequencies, cfg)
    elif cfg.use_yarn_rope and not (cfg.yarn_global_attn_only and is_local):
        frequencies = _yarn(frequencies, cfg, base)
        attention_factor = cfg.yarn_attention_factor
    elif not is_local and cfg.rotary_scaling_factor != 1.0:
        frequencies = frequencies / cfg.rotary_scaling_factor
    is_plain = type(frequencies) is Tensor and frequencies.device.type == "cpu"
    if not is_plain or n_ctx * frequencies.numel() > _LARGEST_KEPT:
        return _tables(frequencies, n_ctx, attention_factor, cfg.rotary_adjacent_pairs, dtype)
    # All layers of a model ask for the same tables, and each has its own.
    precisely = frequencies.numpy().tobytes(), precise
    sin, cos = _kept_tables(precisely, n_ctx, attention_factor, cfg.rotary_adjacent_pairs, dtype)
    return sin.clone(), cos.clone()


# Angles of one table, half a million of which are 4 MB of sines and cosines.
_LARGEST_KEPT = 2**19


def _tables(
    frequencies: Tensor, n_ctx: int, factor: float, adjacent_pairs: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    angles = torch.arange(n_ctx, dtype=frequencies.dtype)[:, None] * frequencies
    if adjacent_pairs:
        angles = angles.repeat_interleave(2, dim=1)
    else:
        angles = torch.cat([angles, angles], 1)
    return (angles.sin() * factor).to(dtype), (angles.cos() * factor).to(dtype)


@functools.lru_cache(maxsize=2)
def _kept_tables(
    frequencies: tuple[bytes, torch.dtype],
    n_ctx: int,
    factor: float,
    adjacent_pairs: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    numbers, precise = frequencies
    exact = torch.frombuffer(bytearray(numbers), dtype=precise)
    return _tables(exact, n_ctx, factor, adjacent_pairs, dtype)


def _longrope(
    frequencies: Tensor, n_ctx: int, cfg: HookedTransformerConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows for the positions of a short text, then for those of a long one, from 0 again."""
    n_short = min(n_ctx, cfg.longrope_original_ctx_len)
    parts = []
    for factors, n in (
        (cfg.longrope_short_factor, n_short),
        (cfg.longrope_long_factor, n_ctx - n_short),
    ):
        divided = frequencies / torch.tensor(factors, dtype=frequencies.dtype)
        factor = float(cfg.longrope_attention_factor)
        parts.append(_tables(divided, n, factor, cfg.rotary_adjacent_pairs, dtype))
    (sin, cos), (long_sin, long_cos) = parts
    return torch.cat([sin, long_sin]), torch.cat([cos, long_cos])


def table_rows(
    cfg: Any,
    positions: Int[Tensor, "batch pos"],
    lengths: Int[Tensor, " batch"],
) -> Int[Tensor, "batch pos"]:
    """Which rows of `rotary_tables` turn these positions.

    Args:
        lengths: Tokens of each whole text, padding not counted. With LongRoPE they decide which
            frequencies a text has; transformers lets the longest text of a batch decide for all.
    """
    if getattr(cfg, "longrope_short_factor", None) is None:
        return positions
    behind = cfg.longrope_original_ctx_len
    return positions + behind * (lengths > behind)[:, None].to(positions)


def turns_long(
    cfg: Any, before: Int[Tensor, " batch"], after: Int[Tensor, " batch"]
) -> Bool[Tensor, " batch"]:
    """Which texts had LongRoPE's short table before they went on, and now have the long one.

    What a KV cache holds of them was made with the other table in all layers but the first.

    Args:
        before, after: Tokens of each whole text, padding not counted.
    """
    if getattr(cfg, "longrope_short_factor", None) is None:
        return torch.zeros_like(before, dtype=torch.bool)
    behind = cfg.longrope_original_ctx_len
    return (before > 0) & (before <= behind) & (after > behind)


def check_same_table(
    cfg: Any,
    offset: int,
    attention_mask: Int[Tensor, "batch all_pos"] | None,
    lengths: Int[Tensor, " batch"],
) -> None:
    """Raises ShapeError for a text in a KV cache, of ``offset`` columns, that turns long."""
    before = torch.full_like(lengths, offset)
    if attention_mask is not None:
        before = attention_mask[:, :offset].sum(1)
    turns = turns_long(cfg, before, lengths)
    if bool(turns.any()):
        raise ShapeError(
            f"a text of {int(before[turns].max())} tokens in a KV cache goes on beyond "
            f"{cfg.longrope_original_ctx_len}, from where LongRoPE turns all of its tokens "
            f"otherwise. Run the whole text again into a new cache, as generate does."
        )


def _by_parts(frequencies: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a linear blend between."""
    low, high = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor
    context = cfg.NTK_original_ctx_len
    wavelengths = 2 * math.pi / frequencies
    scaled = frequencies / cfg.NTK_by_parts_factor
    smooth = (context / wavelengths - low) / (high - low)
    blend = (1 - smooth) * scaled + smooth * frequencies
    out = torch.where(wavelengths > context / low, scaled, blend)
    return torch.where(wavelengths < context / high, frequencies, out)


def _yarn(frequencies: Tensor, cfg: HookedTransformerConfig, base: float | int) -> Tensor:
    """Interpolated below, kept above, a linear ramp between two channels."""
    dim, context = cfg.rotary_dim, cfg.yarn_original_max_position_embeddings
    assert dim is not None

    def channel(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(cfg.yarn_beta_fast), channel(cfg.yarn_beta_slow)
    if cfg.yarn_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(dim // 2, dtype=frequencies.dtype) - low) / (high - low)
    ramp = ramp.clamp(0, 1)
    return frequencies / cfg.yarn_factor * ramp + frequencies * (1 - ramp)
