"""Which runs a sweep makes, and the axes and labels of its scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastlens.errors import SweepError
from fastlens.patching.codes import Codes
from fastlens.patching.model import PatchableModel
from fastlens.patching.patch import (
    Sources,
    Value,
    check_mode,
    check_run,
    check_source,
    explicit_runs,
    sizes_of,
)
from fastlens.patching.prompts import Prompts, position_labels
from fastlens.patching.runs import Run, Selection, chosen, runs_of
from fastlens.patching.sites import Site, find_site, n_heads, sweep_axes


@dataclass(frozen=True)
class Grid:
    """The axes of the scores, and the runs that fill them."""

    named: list[str]
    axes: tuple[str, ...]
    labels: dict[str, list[str]]
    runs: list[Run]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the scores; the runs are in its row-major order."""
        return tuple(len(self.labels[axis]) for axis in self.axes)

    def name(self, run: Run) -> str:
        """A run in words: ``z, layer L3, head H7``."""
        parts = [
            label if axis == "site" else f"{axis} {label}"
            for axis, label in (
                (axis, self.labels[axis][i]) for axis, i in zip(self.axes, run.cell, strict=True)
            )
        ]
        named = [] if self.axes[:1] in (("site",), ("run",)) else self.named
        return ", ".join([*named, *parts])


def given_runs(model: PatchableModel, runs: Any, sources: Sources) -> Grid:
    """A grid of one axis, ``run``, from runs given one by one."""
    found, names = explicit_runs(runs, model, sources)
    sites = dict.fromkeys(
        patch.site if patch.codes is None else sources.codes[patch.codes].name
        for run in found
        for patch in run.patches
    )
    return Grid(list(sites), ("run",), {"run": names}, found)


def grid_of(
    model: PatchableModel,
    prompts: Prompts,
    sites: str | Codes | Sequence[str | Codes],
    by: str | Sequence[str] | None,
    restrictions: Mapping[str, Selection],
    sources: Sources,
    *,
    source: Value = "other",
    mode: str = "replace",
    window: int = 1,
) -> Grid:
    """All runs of a sweep.

    Args:
        restrictions: For the axes layer, pos, head, neuron, feature and key_pos, which entries;
            None is all.
        sources: Gets the source, if it is new.
        source, mode: Of every patch; see `Patch`.
        window: Layers patched together; see `runs_of`.

    Raises: SweepError for sites, axes or entries that the model or the prompts do not have.
    """
    cfg = model.cfg
    check_mode(mode)
    if window < 1:
        raise SweepError(f"window={window} must be at least 1 layer.")
    is_one = isinstance(sites, str | Codes)
    asked = [sites] if isinstance(sites, str | Codes) else list(sites)
    layers = chosen(restrictions["layer"], cfg.n_layers, "layers")
    layers_of = [
        one.layers(cfg.n_layers)
        if isinstance(one, Codes) and restrictions["layer"] is None
        else layers
        for one in asked
    ]
    found = [
        one.found_in(model, its)
        if isinstance(one, Codes)
        else find_site(one, cfg, model.hook_dict, its)
        for one, its in zip(asked, layers_of, strict=True)
    ]
    named = [
        one.name if isinstance(one, Codes) else site.name
        for one, site in zip(asked, found, strict=True)
    ]
    if not found or len(set(named)) < len(named):
        raise SweepError(
            f"sites= ({', '.join(named)}) is empty or names a site twice. Codes of one place "
            f"can be given names of their own."
        )
    axes = [sweep_axes(site, by) for site in found]
    if len(set(axes)) > 1:
        raise SweepError(
            f"{', '.join(named)} are swept by different axes "
            f"({', '.join(str(a) for a in axes)}): give by=, or sweep them one by one."
        )
    tokens = position_labels(model, prompts)
    labels: dict[str, list[str]] = {}
    runs: list[Run] = []
    for number, (site, site_axes) in enumerate(zip(found, axes, strict=True)):
        one, its_layers = asked[number], layers_of[number]
        codes, n_features = _codes_of(one, model, its_layers, window, sources)
        sizes = {"layer": cfg.n_layers, **sizes_of(site, cfg, prompts.n_pos, n_features)}
        restricted = _restricted(site, {**restrictions, "layer": its_layers}, sizes)
        indices = {
            axis: restricted.get(axis, list(range(sizes[axis]))) for axis in ("layer", *site.axes)
        }
        start = () if is_one else (number,)
        new = runs_of(
            *(site, site_axes, indices, restricted),
            cell_start=start,
            window=window,
            n_layers=cfg.n_layers,
            value=sources.number_of(source),
            mode=mode,
            codes=codes,
        )
        patched = sorted({patch.layer for run in new for patch in run.patches})
        find_site(site.name, cfg, model.hook_dict, patched)
        for layer in patched:
            patch = new[0].patches[0]._replace(layer=layer)
            check_source(sources.list[patch.value], patch, sizes, model, sources)
        check_run(new[0], model)
        runs += new
        texts = {axis: _labels(site, cfg, axis, indices[axis], tokens) for axis in site_axes}
        if labels and labels != texts:
            raise SweepError(
                f"{named[0]} and {named[number]} have different heads, layers or features, so they "
                f"do not share an axis: sweep them one by one."
            )
        labels = texts
    if is_one:
        return Grid(named, axes[0], labels, runs)
    return Grid(named, ("site", *axes[0]), {"site": named, **labels}, runs)


def _codes_of(
    asked: str | Codes,
    model: PatchableModel,
    layers: Sequence[int],
    window: int,
    sources: Sources,
) -> tuple[dict[int, int] | None, int]:
    """The number of each layer's autoencoder, and how many features they have."""
    if isinstance(asked, str):
        return None, 0
    n_layers = model.cfg.n_layers
    # As `runs_of` cuts windows.
    around = {
        one
        for layer in layers
        for one in range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))
    }
    asked.found_in(model, sorted(around))
    numbers = {layer: sources.number_of_codes(asked, layer, model) for layer in sorted(around)}
    sizes = {sources.codes[number].n_features for number in numbers.values()}
    if len(sizes) > 1:
        raise SweepError(
            f"the autoencoders of {asked.name} have {', '.join(map(str, sorted(sizes)))} features: "
            f"sweep those that have as many together, the others by themselves."
        )
    return numbers, sizes.pop()


def _restricted(
    site: Site, restrictions: Mapping[str, Selection], sizes: Mapping[str, int]
) -> dict[str, list[int]]:
    """The axes of the activation that were restricted, and to which entries."""
    restricted = {}
    arguments = {"layer": "layers", "pos": "positions", "head": "heads", "neuron": "neurons"}
    arguments |= {"key_pos": "key_positions", "feature": "features"}
    for axis, selection in restrictions.items():
        if selection is None:
            continue
        own = "query_pos" if axis == "pos" and "query_pos" in site.axes else axis
        if own not in ("layer", *site.axes):
            raise SweepError(
                f"{arguments[axis]}= was given, but {site.name} is indexed by layer, "
                f"{', '.join(site.axes)}."
            )
        restricted[own] = chosen(selection, sizes[own], arguments[axis])
    return restricted


def _labels(
    site: Site, cfg: Any, axis: str, indices: Sequence[int], tokens: Sequence[str]
) -> list[str]:
    if axis.endswith("pos"):
        return [tokens[i] for i in indices]
    is_kv = axis == "head" and n_heads(site, cfg) != cfg.n_heads
    letter = "KV" if is_kv else {"layer": "L", "head": "H", "neuron": "N", "feature": "F"}[axis]
    return [f"{letter}{i}" for i in indices]
