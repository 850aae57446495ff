"""The indices of TransformerLens' patching functions, and the activation that each one means.

Rows of ``[layer, ...]``, from names of axes or from a user's frame. Only frames need pandas.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from fastlens.act_names import get_act_name
from fastlens.errors import HookNameError, MissingDependencyError, PatchIndexError, did_you_mean
from fastlens.patching import sites
from fastlens.patching.model import HookableModel

if TYPE_CHECKING:
    from pandas import DataFrame

AxisNames: TypeAlias = Literal["layer", "pos", "head_index", "head", "src_pos", "dest_pos"]
_SITE_OF_HOOK = {site.hook: site for site in sites.SITES.values()}


def make_df_from_ranges(
    column_max_ranges: Sequence[int], column_names: Sequence[str]
) -> "DataFrame":
    """A frame with one row for every combination of ``range(column_max_ranges[i])``.

    The last column changes fastest.

    Raises: MissingDependencyError without pandas.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingDependencyError(
            "a frame of indices needs pandas, which is not installed: pip install pandas. "
            "Without return_index_df and index_df the patching functions do not need it."
        ) from error
    return pandas.DataFrame(_product(column_max_ranges), columns=list(column_names))


class Indices(NamedTuple):
    """The runs that a patching function makes.

    Attributes:
        rows: The index of each run.
        shape: Of the results.
        hook_names: For each first entry of a row, the hook point that is patched.
        frame: The rows as a frame, where there is one.
    """

    rows: list[list[Any]]
    shape: list[int]
    hook_names: dict[Any, str]
    frame: Any = None


def indices_of(
    model: HookableModel,
    n_pos: int,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
) -> Indices:
    """The runs over whole axes, or of a user's frame.

    A frame's columns count by their place, not by their name, as in TransformerLens. Of mixed
    dtypes pandas makes a common one: ints beside floats become floats.

    Args:
        n_pos: Length of the prompts.
        activation_name, index_axis_names, index_df, return_index_df: See
            `fastlens.patching.get_act_patch.generic_activation_patch`.

    Raises: PatchIndexError for an axis that does not exist, a first axis other than the layer, or a
        layer out of range; HookNameError for an activation that the model does not have.
    """
    # In a name like "z5" the layer is fixed, and the first entry of an index is like any other.
    has_layer = get_act_name(activation_name, 0) != get_act_name(activation_name, 1)
    if index_df is not None and index_axis_names is None:
        if has_layer:
            _check_layer_first(list(index_df.columns), "index_df")
        rows, frame = index_df.to_numpy().tolist(), index_df
        shape = [len(rows)]
    elif index_df is None and index_axis_names is not None:
        lengths = _axis_lengths(model, n_pos, activation_name)
        _check_axes(index_axis_names, lengths, activation_name if has_layer else None)
        shape = [lengths[name] for name in index_axis_names]
        rows = _product(shape)
        frame = make_df_from_ranges(shape, index_axis_names) if return_index_df else None
    else:
        found = "neither" if index_df is None else "both"
        raise PatchIndexError(f"give one of index_axis_names and index_df; there are {found}.")
    hook_names = {}
    for layer in dict.fromkeys(row[0] for row in rows):
        hook_names[layer] = _hook_name(model, activation_name, layer)
    return Indices(rows, shape, hook_names, frame)


def site_of(hook_name: str) -> sites.Site | None:
    """The kind of site a hook point is, or None if it is not one of `fastlens.patching.sites`."""
    return _SITE_OF_HOOK.get(re.sub(r"^blocks\.\d+\.", "blocks.{layer}.", hook_name))


def _product(lengths: Sequence[int]) -> list[list[int]]:
    return [list(row) for row in itertools.product(*(range(n) for n in lengths))]


def _axis_lengths(model: HookableModel, n_pos: int, activation_name: str) -> dict[str, int]:
    cfg = model.cfg
    n_heads = cfg.n_heads
    site = site_of(get_act_name(activation_name, 0))
    if activation_name in ("k", "v") and cfg.n_key_value_heads is not None:
        # As TransformerLens: KV heads also where a flag gives every head a copy of them.
        n_heads = cfg.n_key_value_heads
    elif site is not None and "head" in site.axes:
        n_heads = sites.n_heads(site, cfg)
    lengths = {"layer": cfg.n_layers, "pos": n_pos, "head_index": n_heads, "head": n_heads}
    return {**lengths, "src_pos": n_pos, "dest_pos": n_pos}


def _check_axes(names: Sequence[str], lengths: Mapping[str, int], layered: str | None) -> None:
    """The axes exist, and the first one is the layer if the activation has one in each."""
    for name in names:
        if name not in lengths:
            raise PatchIndexError(
                f"index_axis_names has {name!r}, and the axes are {', '.join(lengths)}."
                f"{did_you_mean(name, lengths)} Other indices go in index_df."
            )
    if not names or (layered is not None and "layer" not in names):
        raise PatchIndexError(
            f"index_axis_names={tuple(names)} must start with 'layer': the first entry of an index "
            f"says which layer's activation is patched."
        )
    if layered is not None:
        _check_layer_first(names, "index_axis_names")


def _check_layer_first(names: Iterable[Any], argument: str) -> None:
    names = list(names)
    if "layer" in names and names[0] != "layer":
        raise PatchIndexError(
            f"{argument} has the axes {', '.join(map(str, names))}; 'layer' must be the first, "
            f"since axes count by their place: the first says which layer is patched. Reorder them."
        )


def _hook_name(model: HookableModel, activation_name: str, layer: Any) -> str:
    cfg, name = model.cfg, get_act_name(activation_name, str(layer))
    site, reason = site_of(name), None
    if name in model.hook_dict:
        # Some places are made in every model, and passed only in some.
        reason = site and sites.missing_because(site, cfg, model.hook_dict, [])
        if reason is None:
            return name
    elif get_act_name(activation_name, 0) in model.hook_dict:
        raise PatchIndexError(
            f"layer {layer!r} of {activation_name} is out of range: the first entry of an index is "
            f"an int from 0 to {cfg.n_layers - 1}."
        )
    has = sites.available_sites(cfg, model.hook_dict)
    if site is not None:
        reason = sites.missing_because(site, cfg, model.hook_dict, range(cfg.n_layers))
    if reason is None:
        near = did_you_mean(activation_name, [*has, *sites.ALIASES])
        reason = f"it has no hook point {name!r}.{near}".removesuffix(".")
    raise HookNameError(
        f"this model has no activation {activation_name!r}: {reason}. "
        f"It has {sites.site_list(cfg, model.hook_dict)}."
    )
