"""Which activations of a transformer a cache stores, and which it derives from those."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastlens.components.attention import AbstractAttention
from fastlens.components.pattern_tap import PatternTap
from fastlens.components.recipes import (
    Recipe,
    captured,
    fused_attention,
    is_ours,
    norm_recipe,
    recipes_of,
)
from fastlens.components.rows import replaced_method
from fastlens.hooks.capture import CapturePlan, CaptureSpec, capture_hook, derive_hook
from fastlens.hooks.derived import CacheDict
from fastlens.hooks.point import HookFunction, is_live

SEEN_IN_ATTENTION = ("hook_attn_scores", "hook_pattern")


def transformer_plan(
    model: Any,
    names: list[str],
    spec: CaptureSpec,
    incl_bwd: bool = False,
    lazy: bool = True,
    by_hooks: bool = False,
    into: CacheDict | None = None,
) -> CapturePlan:
    """The hooks and taps that fill a cache with these places.

    A place that carries a user's hook is stored, whatever it could be derived from: what the hook
    made of it is what the run had.

    Args:
        model: A hooked transformer; parts that are not fastlens' own are captured as they are.
        names: In the order in which they fire.
        incl_bwd: Gradients as well.
        lazy: Let entries be computed when read.
        by_hooks: Capture every place where it is, by a hook.
        into: What to fill; None makes a dict.
    """
    cfg = model.cfg
    kv_heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    if getattr(cfg, "ungroup_grouped_query_attention", False):
        kv_heads = cfg.n_heads
    spec = replace(spec, group_size=cfg.n_heads // kv_heads)
    # A method of ours that a user replaced may do anything.
    replaced = replaced_method() is not None
    lazy = lazy and not by_hooks and not replaced
    lazy = lazy and (into is None or into.takes_derived)
    new = CacheDict() if lazy else spec.new_cache()
    cache: dict[str, Tensor] = new if into is None else into
    points = model.hook_dict
    taps = [] if by_hooks or replaced else _taps(model, names, spec, cache, lazy)
    tapped = {name for _, tap in taps for name in tap.points}
    recipes: dict[str, Recipe] = {}
    # What is computed from rounded activations is not what passed, rounded.
    if lazy and spec.keeps_all and spec.dtype is None:
        # Hooks on some points see, and give back, another form of what passes.
        plain = {name for name in names if points[name].hook_conversion is None}
        recipes = captured([name for name in names if name in plain], _recipes(model))
    fwd: list[tuple[str, HookFunction]] = []
    for name in names:
        if name in tapped:
            continue
        if lazy and name in recipes and not is_live(points[name]):
            assert isinstance(cache, CacheDict)
            recipe = recipes[name]
            hook = derive_hook(cache, name, spec, recipe.formula, recipe.sources)
        else:
            hook = capture_hook(cache, name, spec)
        fwd.append((name, hook))
    bwd = [(name, capture_hook(cache, f"{name}_grad", spec)) for name in names if incl_bwd]
    return CapturePlan(cache, fwd, bwd, taps)


def _recipes(model: Any) -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("blocks"):
            found |= recipes_of(module, f"{name}.")
    # A subclass with a forward of its own may put anything before the last norm.
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    straight = getattr(model, "ends_in_norm", False) and is_ours(model.blocks[-1])
    if straight and last in model.hook_dict:
        found |= norm_recipe(model._modules.get("ln_final"), "ln_final", last)
    return found


def _taps(
    model: Any, names: list[str], spec: CaptureSpec, cache: dict[str, Tensor], lazy: bool
) -> list[tuple[AbstractAttention, PatternTap]]:
    wanted: dict[str, list[str]] = {}
    for name in names:
        layer, _, place = name.rpartition(".")
        if place in SEEN_IN_ATTENTION:
            wanted.setdefault(layer, []).append(name)
    taps = []
    for layer, places in wanted.items():
        attn = fused_attention(model.mod_dict[layer])
        if attn is not None and not any(model.hook_dict[name].hook_conversion for name in places):
            seen = {name: model.hook_dict[name] for name in places}
            tap = PatternTap(cache, seen, spec, _sources(attn, layer, set(names)), lazy)
            taps.append((attn, tap))
    return taps


def _sources(attn: AbstractAttention, layer: str, names: set[str]) -> tuple[str, str] | None:
    """The captured places that hold queries and keys as attention reads them, if there are."""
    places = ("hook_q", "hook_k")
    if attn.cfg.positional_embedding_type == "rotary":
        places = ("hook_rot_q", "hook_rot_k")
    elif attn.q_norm is not None or attn.cfg.clip_qkv is not None:
        return None
    q, k = (f"{layer}.{place}" for place in places)
    return (q, k) if {q, k} <= names else None
