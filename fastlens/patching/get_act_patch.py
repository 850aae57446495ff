"""TransformerLens' patching functions: patch a clean cache into a corrupted prompt, one at a time.

`generic_activation_patch`, its fifteen ``get_act_patch_*`` and the three ``*_every``, with
TransformerLens' arguments, shapes and values. `fastlens.patching.sweep` does more, from the two
prompts themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    TypeAlias,
    cast,
    overload,
    runtime_checkable,
)

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from fastlens.errors import HookNameError, MetricError, PatchIndexError, ShapeError, SweepError
from fastlens.patching.index_frames import (
    AxisNames,
    Indices,
    indices_of,
    make_df_from_ranges,
    site_of,
)
from fastlens.patching.metrics import Metric
from fastlens.patching.model import HookableModel, PatchableModel
from fastlens.patching.patch_setters import (
    CorruptedActivation,
    PatchedActivation,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
    selection_of,
)
from fastlens.patching.sites import PER_HEAD, POS, Site

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "AxisNames",
    "CleanCache",
    "CorruptedActivation",
    "Logits",
    "PatchedActivation",
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
]

Logits: TypeAlias = Tensor
# None is returned by a setter that only writes into the activation it gets.
PatchSetter: TypeAlias = Callable[
    [CorruptedActivation, Sequence[Any], Any], PatchedActivation | None
]
PatchingMetric: TypeAlias = Callable[[Any], Any]
# A user may give one prompt without a batch axis.
Tokens: TypeAlias = Int[Tensor, "*batch pos"]

_FIELD_OF_AXIS = {
    "pos": "pos",
    "query_pos": "pos",
    "key_pos": "key_pos",
    "head": "head",
    "neuron": "neuron",
}


@runtime_checkable
class CleanCache(Protocol):
    """Activations by full hook name: an `ActivationCache`, TransformerLens' own, or a dict."""

    def __getitem__(self, key: str, /) -> Any: ...


@overload
def generic_activation_patch(
    model: HookableModel,
    corrupted_tokens: Tokens,
    clean_cache: CleanCache,
    patching_metric: PatchingMetric,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: "DataFrame | None" = None,
    return_index_df: Literal[False] = False,
) -> Float[Tensor, "..."]: ...


@overload
def generic_activation_patch(
    model: HookableModel,
    corrupted_tokens: Tokens,
    clean_cache: CleanCache,
    patching_metric: PatchingMetric,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: "DataFrame | None" = None,
    *,
    return_index_df: Literal[True],
) -> tuple[Float[Tensor, "..."], "DataFrame"]: ...


def generic_activation_patch(
    model: HookableModel,
    corrupted_tokens: Tokens,
    clean_cache: CleanCache,
    patching_metric: PatchingMetric,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
) -> Any:
    """The metric of the corrupted run for every index, each with one part of the clean run put in.

    Args:
        model: A `HookedTransformer`.
        corrupted_tokens: The prompts that are run.
        clean_cache: Activations of the clean run by hook name, such as `run_with_cache` returns: of
            the same batch, or of one prompt for all.
        patching_metric: ``f(logits [batch, pos, d_vocab])``, a scalar for the whole batch. Pure: it
            may be called more often than once for each index.
        patch_setter: ``f(corrupted_activation, index, clean_activation)``, which returns the
            patched activation or writes into the one it gets.
        activation_name: As in `get_act_name`, without the layer: ``"resid_pre"``, ``"z"``,
            ``"pattern"``.
        index_axis_names: Axes that are swept whole, the first one ``"layer"``: then ``"pos"``,
            ``"head"`` or ``"head_index"``, ``"dest_pos"``, ``"src_pos"``. Heads of k and v are KV
            heads.
        index_df: A frame instead, one row per run: the row is the index that the setter gets. Its
            first column is the layer.
        return_index_df: Also return the frame (needs pandas).

    Returns: the metric, in the model's device and torch's default dtype: one axis for each of
        ``index_axis_names``, or one entry per row of ``index_df``.

    Cost: TransformerLens' six setters (ours or its own) on the activations of
        `fastlens.patching.sites` run on the engine of `sweep`; any other setter or activation is
        one forward per index.

    Numerics: equal to one forward per index within 1e-4 (float32) or 1e-12 (float64) times
        ``max(1, |metric|)``.

    Raises: before any run, HookNameError (a KeyError) for an activation that the model or the cache
        lacks; PatchIndexError for indices out of range or of the wrong length; ShapeError for a
        cache of prompts of another length or number. MetricError for a metric that is no scalar.
    """
    indices = indices_of(
        model,
        corrupted_tokens.shape[-1],
        activation_name,
        index_axis_names,
        index_df,
        return_index_df,
    )
    metric = _scalar(patching_metric, model)
    clean = {name: _clean_activation(clean_cache, name) for name in indices.hook_names.values()}
    runs = None
    # Not encoders, which cannot start at a layer.
    if isinstance(model, PatchableModel):
        runs = _runs(corrupted_tokens, patch_setter, indices, clean, clean_cache)
    if runs is None:
        values = _one_by_one(model, corrupted_tokens, patch_setter, indices, clean, metric)
    else:
        values = _planned(cast(PatchableModel, model), corrupted_tokens, runs, metric)
    output = _filled(model, indices, values)
    return (output, indices.frame) if return_index_df else output


def _filled(
    model: HookableModel, indices: Indices, values: Float[Tensor, " run"]
) -> Float[Tensor, "..."]:
    output = torch.zeros(indices.shape, device=model.cfg.device)
    return output.copy_(values.detach().reshape(indices.shape))


# -- the known setters: a plan -------------------------------------------------------------------


def _clean_activation(clean_cache: CleanCache, name: str) -> Tensor:
    try:
        return clean_cache[name]
    except KeyError as error:
        raise HookNameError(
            f"{name!r} is to be patched from clean_cache, which does not hold it. Cache it: "
            f"model.run_with_cache(clean_tokens, names_filter=...) with a filter that lets "
            f"{name!r} through, or none."
        ) from error


def _runs(
    tokens: Tensor,
    setter: PatchSetter,
    indices: Indices,
    clean: Mapping[str, Tensor],
    clean_cache: CleanCache,
) -> list[list[Any]] | None:
    """One patch per row, or None if the engine does not know setter, activation or index."""
    selection = selection_of(setter)
    if selection is None:
        return None
    _check_entries(indices, 1 + len(selection.axes), setter)
    n_axes = 4 if selection.of_pattern else 2 + max(selection.axes)
    for name, activation in clean.items():
        if activation.ndim < n_axes:
            raise PatchIndexError(
                f"{_name(setter)} indexes an activation of at least {n_axes} axes, and the cached "
                f"{name} has {activation.ndim}: {list(activation.shape)}. Use the setter that goes "
                f"with the activation, and a cache with its batch axis."
            )
    found: dict[str, Site] = {}
    for name in clean:
        site = site_of(name)
        # An entry may select from the last axis (d_model), which is no axis of a site.
        if site is None or max(selection.axes) >= len(site.axes):
            return None
        found[name] = site
    # A slice or a list in a user's frame selects several: the setter itself knows how.
    if any(type(entry) is not int for row in indices.rows for entry in row[1:]):
        return None
    from fastlens.patching.patch import Patch

    # The other entries say what was looked at when the cache was made: `fastlens.patching.equal`.
    names = getattr(clean_cache, "keys", tuple)()
    source = {name: clean_cache[name] for name in names}
    source |= {name: _like_tokens(found[name], name, clean[name], tokens) for name in clean}
    runs = []
    for row in indices.rows:
        name = indices.hook_names[row[0]]
        site, lengths, where = found[name], source[name].shape[1:], {}
        for axis, entry in zip(selection.axes, row[1:], strict=True):
            if not -lengths[axis] <= entry < lengths[axis]:
                raise PatchIndexError(
                    f"the index {row} is out of range: {name} has {lengths[axis]} entries along "
                    f"{site.axes[axis]}, and {entry} is asked for."
                )
            where[_FIELD_OF_AXIS[site.axes[axis]]] = entry % lengths[axis]
        layer = int(name.split(".")[1])
        runs.append([Patch(site.name, layer, source=source, **where)])
    return runs


def _check_entries(indices: Indices, length: int, setter: PatchSetter) -> None:
    for row in indices.rows[:1]:
        if len(row) != length:
            raise PatchIndexError(
                f"the index {row} has {len(row)} entries, and {_name(setter)} takes {length}. Use "
                f"the setter that goes with your axes."
            )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _like_tokens(
    site: Site, name: str, clean: Float[Tensor, "..."], tokens: Tensor
) -> Float[Tensor, "batch ..."]:
    """The clean activation, broadcast over the batch, if it has the prompts' number and length."""
    n_pos = tokens.shape[-1]
    batch = tokens.shape[0] if tokens.ndim > 1 else 1
    shape = list(clean.shape)
    axes = ["batch", *site.axes, *(["width"] if site.axes in (POS, PER_HEAD) else [])]
    if len(shape) != len(axes):
        raise ShapeError(
            f"the cached {name} has shape {shape}, and its axes should be {', '.join(axes)}. Cache "
            f"it with its batch axis and all positions: without remove_batch_dim or pos_slice."
        )
    for axis, length in zip(axes, shape, strict=True):
        if axis.endswith("pos") and length != n_pos:
            raise ShapeError(
                f"the cached {name} has {length} positions ({axis}) and corrupted_tokens have "
                f"{n_pos}, so positions do not correspond. Use prompts of one length, cached "
                f"whole, or a patch_setter of your own that says which positions go together."
            )
    if shape[0] not in (1, batch):
        raise ShapeError(
            f"the cached {name} is of {shape[0]} prompts and corrupted_tokens are {batch}. Cache "
            f"as many clean prompts, or one for all."
        )
    return clean.detach().expand(batch, *shape[1:])


def _planned(
    model: PatchableModel, tokens: Tensor, runs: Sequence[Sequence[Any]], metric: PatchingMetric
) -> Float[Tensor, " run"]:
    from fastlens.patching.sweep import patched_metrics

    if not runs:
        return torch.zeros(0)
    batched = tokens if tokens.ndim > 1 else tokens[None]
    return patched_metrics(model, batched.to(model.cfg.device), runs, metric, progress=True)


# -- everything else: as it says -----------------------------------------------------------------


def _one_by_one(
    model: HookableModel,
    tokens: Tensor,
    setter: PatchSetter,
    indices: Indices,
    clean: Mapping[str, Tensor],
    metric: PatchingMetric,
) -> Float[Tensor, " run"]:
    def patched(activation: Tensor, hook: Any, index: list[Any], name: str) -> Tensor:
        # Written into by most setters: never the tensor that the model or another hook holds.
        activation = activation.clone()
        result = setter(activation, index, clean[name])
        return activation if result is None else result

    values = []
    for row in tqdm(indices.rows):
        name = indices.hook_names[row[0]]
        hook = partial(patched, index=list(row), name=name)
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, hook)])
        values.append(metric(logits).item())
    return torch.tensor(values, dtype=torch.float64)


def _scalar(metric: PatchingMetric, model: HookableModel) -> Callable[[Any], Float[Tensor, ""]]:
    """The metric, its result checked: one number for the whole batch."""
    if isinstance(metric, Metric):
        if metric.normalize:
            raise SweepError(
                f"{metric.name} with normalize=True needs the logits of both runs, and a clean "
                f"cache has none. Use normalize=False, or fastlens.patching.sweep."
            )
        metric = metric.bind(cast(PatchableModel, model))
    called = _name(metric)

    def measured(logits: Any) -> Tensor:
        value = metric(logits)
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.detach().reshape(())
        if isinstance(value, Tensor):
            raise MetricError(
                f"the metric {called!r} returned shape {list(value.shape)}; it must return a "
                f"scalar for the whole batch. Reduce it, for example with .mean()."
            )
        if not isinstance(value, int | float) and not hasattr(value, "item"):
            raise MetricError(
                f"the metric {called!r} returned {type(value).__name__}; it must return a scalar."
            )
        return torch.tensor(float(value), dtype=torch.float64)

    measured.__name__ = called
    return measured


# -- TransformerLens' names ----------------------------------------------------------------------

_AXES_OF_SETTER = {
    layer_pos_patch_setter: ("layer", "pos"),
    layer_pos_head_vector_patch_setter: ("layer", "pos", "head"),
    layer_head_vector_patch_setter: ("layer", "head"),
    layer_head_pattern_patch_setter: ("layer", "head_index"),
    layer_head_pos_pattern_patch_setter: ("layer", "head_index", "dest_pos"),
    layer_head_dest_src_pos_pattern_patch_setter: ("layer", "head_index", "dest_pos", "src_pos"),
}


def _sweep_of(activation_name: str, patch_setter: Callable[..., Any]) -> Any:
    return partial(
        generic_activation_patch,
        patch_setter=patch_setter,
        activation_name=activation_name,
        index_axis_names=_AXES_OF_SETTER[patch_setter],
    )


get_act_patch_resid_pre = _sweep_of("resid_pre", layer_pos_patch_setter)
get_act_patch_resid_mid = _sweep_of("resid_mid", layer_pos_patch_setter)
get_act_patch_attn_out = _sweep_of("attn_out", layer_pos_patch_setter)
get_act_patch_mlp_out = _sweep_of("mlp_out", layer_pos_patch_setter)
get_act_patch_attn_head_out_by_pos = _sweep_of("z", layer_pos_head_vector_patch_setter)
get_act_patch_attn_head_q_by_pos = _sweep_of("q", layer_pos_head_vector_patch_setter)
get_act_patch_attn_head_k_by_pos = _sweep_of("k", layer_pos_head_vector_patch_setter)
get_act_patch_attn_head_v_by_pos = _sweep_of("v", layer_pos_head_vector_patch_setter)
get_act_patch_attn_head_pattern_by_pos = _sweep_of("pattern", layer_head_pos_pattern_patch_setter)
get_act_patch_attn_head_pattern_dest_src_pos = _sweep_of(
    "pattern", layer_head_dest_src_pos_pattern_patch_setter
)
get_act_patch_attn_head_out_all_pos = _sweep_of("z", layer_head_vector_patch_setter)
get_act_patch_attn_head_q_all_pos = _sweep_of("q", layer_head_vector_patch_setter)
get_act_patch_attn_head_k_all_pos = _sweep_of("k", layer_head_vector_patch_setter)
get_act_patch_attn_head_v_all_pos = _sweep_of("v", layer_head_vector_patch_setter)
get_act_patch_attn_head_pattern_all_pos = _sweep_of("pattern", layer_head_pattern_patch_setter)


def _describe(*functions: partial[Any]) -> None:
    for function in functions:
        name, axes = (function.keywords[key] for key in ("activation_name", "index_axis_names"))
        function.__doc__ = (
            f"``(model, corrupted_tokens, clean_cache, patching_metric)``: patch {name} by "
            f"{', '.join(axes)}, which are the axes of the result. For k and v a head is a KV "
            f"head. A partial of `generic_activation_patch`, which has the rest."
        )


_describe(
    get_act_patch_resid_pre,
    get_act_patch_resid_mid,
    get_act_patch_attn_out,
    get_act_patch_mlp_out,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_v_by_pos,
    get_act_patch_attn_head_pattern_by_pos,
    get_act_patch_attn_head_pattern_dest_src_pos,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_pattern_all_pos,
)


def get_act_patch_attn_head_all_pos_every(
    model: HookableModel, corrupted_tokens: Tokens, clean_cache: CleanCache, metric: PatchingMetric
) -> Float[Tensor, "patch_type layer head"]:
    """Heads' outputs, queries, keys, values and patterns, each patched at every position.

    Rows in that order; with fewer KV heads than heads, keys and values are padded with zeros. All
    are one sweep. Arguments as in `generic_activation_patch`.
    """
    parts = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    results = _every(model, corrupted_tokens, clean_cache, metric, parts)
    return torch.stack([_padded(result, model.cfg.n_heads) for result in results])


def get_act_patch_attn_head_by_pos_every(
    model: HookableModel, corrupted_tokens: Tokens, clean_cache: CleanCache, metric: PatchingMetric
) -> Float[Tensor, "patch_type layer pos head"]:
    """Heads' outputs, queries, keys, values and patterns, each patched at one position.

    For patterns the position is the query's. Rows in that order; with fewer KV heads than heads,
    keys and values are padded with zeros. All are one sweep. Arguments as in
    `generic_activation_patch`.
    """
    parts = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
        get_act_patch_attn_head_pattern_by_pos,
    )
    *vectors, pattern = _every(model, corrupted_tokens, clean_cache, metric, parts)
    results = [*vectors, pattern.transpose(-1, -2)]
    return torch.stack([_padded(result, model.cfg.n_heads) for result in results])


def get_act_patch_block_every(
    model: HookableModel, corrupted_tokens: Tokens, clean_cache: CleanCache, metric: PatchingMetric
) -> Float[Tensor, "patch_type layer pos"]:
    """The residual stream before each block, and attention's and the MLP's outputs, by position.

    Rows in that order. All are one sweep. Arguments as in `generic_activation_patch`.
    """
    parts = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return torch.stack(_every(model, corrupted_tokens, clean_cache, metric, parts))


def _every(
    model: HookableModel,
    tokens: Tensor,
    clean_cache: CleanCache,
    metric: PatchingMetric,
    parts: Sequence[partial[Any]],
) -> list[Tensor]:
    """The results of several patching functions, from one call of the engine."""
    if not isinstance(model, PatchableModel):
        return [part(model, tokens, clean_cache, metric) for part in parts]
    found, runs = [], []
    for part in parts:
        setter, activation_name, axes = (
            part.keywords[name] for name in ("patch_setter", "activation_name", "index_axis_names")
        )
        indices = indices_of(model, tokens.shape[-1], activation_name, axes)
        clean = {name: _clean_activation(clean_cache, name) for name in indices.hook_names.values()}
        planned = _runs(tokens, setter, indices, clean, clean_cache)
        assert planned is not None
        found.append(indices)
        runs += planned
    values = _planned(model, tokens, runs, _scalar(metric, model))
    split = values.split([len(indices.rows) for indices in found])
    return [_filled(model, *one) for one in zip(found, split, strict=True)]


def _padded(result: Float[Tensor, "... head"], n_heads: int) -> Float[Tensor, "... n_heads"]:
    return F.pad(result, (0, n_heads - result.shape[-1]))
