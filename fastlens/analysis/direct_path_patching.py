"""TransformerLens' direct path patching: one head's output into another head's q, k or v alone.

`fastlens.analysis.path_patching` starts from the two prompts instead, takes several receivers
together, lets messages pass through MLPs, and recomputes norms.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.norms import norm_before, norm_behind
from fastlens.decompose import FrozenNorm, head_results
from fastlens.errors import (
    HookNameError,
    LayerError,
    MetricError,
    ShapeError,
    SweepError,
    did_you_mean,
)
from fastlens.patching import Patch
from fastlens.patching.get_act_patch import CleanCache
from fastlens.patching.metrics import Metric
from fastlens.patching.model import PatchableModel
from fastlens.patching.sweep import patched_metrics

COMPONENTS = ("q", "k", "v")


def get_act_patch_direct_path(
    model: PatchableModel,
    corrupted_tokens: Int[Tensor, "*batch pos"],
    clean_cache: CleanCache,
    corrupted_cache: CleanCache,
    patching_metric: Callable[[Any], Any],
    src_layer: int,
    src_head: int,
    component: str = "q",
    verbose: bool = True,
) -> Float[Tensor, "layer head"]:
    """The metric when what one head writes reaches one later head's input as in the clean run.

    For every head of a later layer, its query (key, value) becomes that of the corrupted run plus
    ``norm(clean result - corrupted result of the source) @ W``, the norm at the scale it had in the
    corrupted run; all other heads read the corrupted output. That is the edge from source to
    destination (Wang et al. 2211.00593) but for the change in the norm's scale, which is left out;
    everything behind the destination is computed.

    Args:
        corrupted_tokens: The prompts that are run.
        clean_cache, corrupted_cache: Must hold ``hook_z`` of the source's layer; the corrupted one
            also ``ln1.hook_scale`` of the layers behind it (and ``ln1_post.hook_scale`` of the
            source's in a model that normalises what attention writes).
        patching_metric: ``f(logits [batch, pos, d_vocab])``, a scalar for the whole batch. Pure.
        src_layer, src_head: The source.
        component: The input of the destination that is patched.
        verbose: Show a bar if it takes longer than two seconds.

    Returns: the metric by destination; 0 where it is not behind the source, as in TransformerLens.

    Cost: one sweep for all destinations; see `fastlens.patching.sweep`.

    Numerics: TransformerLens' values on models whose norms are folded (the default of
    ``from_pretrained``). It leaves out the norm's gain and centring, which is wrong on others, and
    warns of it; here they are applied, so no model is worse off. Under grouped attention keys and
    values are those of the destination's query head alone (TransformerLens fails there).

    Raises: HookNameError (a KeyError) for what a cache lacks; LayerError for a source that is not
        there; ShapeError for a cache of other positions; MetricError for a metric that is no
        scalar.
    """
    _check_component(component)
    results = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, device=model.cfg.device)
    _check_source(model, src_layer, src_head)
    found = _from_layer(
        *(model, corrupted_tokens, clean_cache, corrupted_cache, patching_metric),
        *(src_layer, [src_head], component, verbose),
    )
    results[src_layer + 1 :] = found[0]
    return results


def get_act_patch_direct_path_all_sources(
    model: PatchableModel,
    corrupted_tokens: Int[Tensor, "*batch pos"],
    clean_cache: CleanCache,
    corrupted_cache: CleanCache,
    patching_metric: Callable[[Any], Any],
    component: str = "q",
    verbose: bool = True,
) -> Float[Tensor, "src_layer src_head layer head"]:
    """`get_act_patch_direct_path` from every head to every later one.

    Cost: one sweep for each source layer.
    """
    _check_component(component)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    shape = (n_layers, n_heads, n_layers, n_heads)
    results = torch.zeros(shape, device=model.cfg.device)
    for layer in range(n_layers - 1):
        results[layer, :, layer + 1 :] = _from_layer(
            *(model, corrupted_tokens, clean_cache, corrupted_cache, patching_metric),
            *(layer, range(n_heads), component, verbose),
        )
    return results


def _check_component(component: str) -> None:
    if component not in COMPONENTS:
        raise SweepError(
            f"component={component!r} must be 'q', 'k' or 'v'.{did_you_mean(component, COMPONENTS)}"
        )


def _check_source(model: PatchableModel, layer: int, head: int) -> None:
    for index, size, what in (
        (layer, model.cfg.n_layers, "src_layer"),
        (head, model.cfg.n_heads, "src_head"),
    ):
        if not 0 <= index < size:
            raise LayerError(f"{what}={index} is out of range: the model has {size}.")


def _from_layer(
    model: Any,
    tokens: Tensor,
    clean_cache: CleanCache,
    corrupted_cache: CleanCache,
    metric: Callable[[Any], Any],
    layer: int,
    heads: Sequence[int],
    component: str,
    verbose: bool,
) -> Float[Tensor, "src_head later_layer head"]:
    """The metric for some heads of one layer and all heads behind it."""
    cfg = model.cfg
    later = range(layer + 1, cfg.n_layers)
    batched = (tokens if tokens.ndim > 1 else tokens[None]).to(cfg.device)
    if not later:
        return torch.zeros(len(heads), 0, cfg.n_heads, device=cfg.device)
    _check_positions(batched, clean_cache, corrupted_cache, layer)
    written = _written(model, clean_cache, corrupted_cache, layer, list(heads))
    runs = []
    for sent in written:
        for destination in later:
            block = model.blocks[destination]
            read = sent
            if norm_before(cfg, "ln1") is not None:
                name = f"blocks.{destination}.ln1"
                read = _frozen(cfg, block.ln1, name, corrupted_cache).apply(sent)
            weights = getattr(block.attn, f"W_{component.upper()}")
            for head in range(cfg.n_heads):
                change = (read @ weights[head])[:, :, None]
                patch = Patch(component, destination, head=head, source=change, mode="add")
                runs.append([patch])
    with _key_values_of_query_heads(model, component):
        values = patched_metrics(
            model, batched, runs, _bound(metric, model), progress=verbose
        ).reshape(len(runs), -1)
    if values.shape[1] != 1:
        raise MetricError(
            f"the metric returned one value for each of {values.shape[1]} examples; it must return "
            f"a scalar for the whole batch. Reduce it, for example with .mean()."
        )
    shape = (len(heads), len(later), cfg.n_heads)
    return values.detach().reshape(shape).to(cfg.device, torch.get_default_dtype())


def _bound(metric: Callable[[Any], Any], model: PatchableModel) -> Callable[[Any], Any]:
    return metric.bind(model) if isinstance(metric, Metric) else metric


def _written(
    model: Any, clean: CleanCache, corrupted: CleanCache, layer: int, heads: list[int]
) -> Float[Tensor, "src_head batch pos d_model"]:
    """How the heads' outputs differ between the runs, as they enter the stream."""
    name = f"blocks.{layer}.attn.hook_z"
    z = [_activation(cache, name, which)[:, :, heads] for cache, which in _both(clean, corrupted)]
    block = model.blocks[layer]
    written = head_results((z[0] - z[1]).detach(), block.attn.W_O[heads].detach())
    behind = norm_behind(model.cfg, "ln1")
    if behind is None:
        return written
    after = _frozen(model.cfg, getattr(block, behind), f"blocks.{layer}.{behind}", corrupted)
    return after.apply(written)


def _check_positions(
    tokens: Int[Tensor, "batch pos"], clean: CleanCache, corrupted: CleanCache, layer: int
) -> None:
    """Raises: ShapeError for a cache of other positions, which would be broadcast over these."""
    for cache, which in _both(clean, corrupted):
        shape = list(_activation(cache, f"blocks.{layer}.attn.hook_z", which).shape)
        if len(shape) != 4 or shape[1] != tokens.shape[1]:
            raise ShapeError(
                f"hook_z of {which} has shape {shape}; for tokens {list(tokens.shape)} it must be "
                f"[batch, {tokens.shape[1]}, head, d_head]. Cache whole prompts of one length, "
                f"without pos_slice and remove_batch_dim."
            )


def _both(clean: CleanCache, corrupted: CleanCache) -> list[tuple[CleanCache, str]]:
    return [(clean, "clean_cache"), (corrupted, "corrupted_cache")]


def _activation(cache: CleanCache, name: str, which: str) -> Tensor:
    try:
        return cache[name]
    except KeyError as error:
        raise HookNameError(
            f"{name!r} is needed of {which}, which does not hold it. Let it through names_filter "
            f"in run_with_cache, or give none."
        ) from error


def _frozen(cfg: Any, norm: Any, name: str, corrupted: CleanCache) -> FrozenNorm:
    """The norm at the scale of the corrupted run."""
    if cfg.normalization_type is None:
        return FrozenNorm()
    scale = _activation(corrupted, f"{name}.hook_scale", "corrupted_cache").detach()
    if scale.ndim == 4:
        # One for each head under use_attn_in and use_split_qkv_input, all the same.
        scale = scale[:, :, 0]
    gain = getattr(norm, "w", None)
    return FrozenNorm(
        scale,
        centred=not cfg.normalization_type.startswith("RMS"),
        gain=None if gain is None else gain.detach(),
    )


@contextlib.contextmanager
def _key_values_of_query_heads(model: Any, component: str) -> Iterator[None]:
    """Keys and values one for each query head, where several would share a patched one."""
    cfg = model.cfg
    before = getattr(cfg, "ungroup_grouped_query_attention", False)
    if component == "q" or getattr(cfg, "n_key_value_heads", None) is None:
        yield
        return
    try:
        model.set_ungroup_grouped_query_attention(True)
        yield
    finally:
        model.set_ungroup_grouped_query_attention(before)
