"""Which runs a sweep makes, and the axes and labels of its scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastlens.errors import SweepError
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
    sites = list(dict.fromkeys(patch.site for run in found for patch in run.patches))
    return Grid(sites, ("run",), {"run": names}, found)


def grid_of(
    model: PatchableModel,
    prompts: Prompts,
    sites: str | Sequence[str],
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
        restrictions: For the axes layer, pos, head, neuron and key_pos, which entries; None is all.
        sources: Gets the source, if it is new.
        source, mode: Of every patch; see `Patch`.
        window: Layers patched together; see `runs_of`.

    Raises: SweepError for sites, axes or entries that the model or the prompts do not have.
    """
    cfg = model.cfg
    check_mode(mode)
    if window < 1:
        raise SweepError(f"window={window} must be at least 1 layer.")
    names = [sites] if isinstance(sites, str) else list(sites)
    layers = chosen(restrictions["layer"], cfg.n_layers, "layers")
    found = [find_site(name, cfg, model.hook_dict, layers) for name in names]
    if not found or len({site.name for site in found}) < len(found):
        raise SweepError(f"sites={sites!r} is empty or names a site twice.")
    axes = [sweep_axes(site, by) for site in found]
    if len(set(axes)) > 1:
        raise SweepError(
            f"{', '.join(s.name for s in found)} are swept by different axes "
            f"({', '.join(str(a) for a in axes)}): give by=, or sweep them one by one."
        )
    tokens = position_labels(model, prompts)
    labels: dict[str, list[str]] = {}
    runs: list[Run] = []
    for number, (site, site_axes) in enumerate(zip(found, axes, strict=True)):
        sizes = {"layer": cfg.n_layers, **sizes_of(site, cfg, prompts.n_pos)}
        restricted = _restricted(site, restrictions, sizes)
        indices = {
            axis: restricted.get(axis, list(range(sizes[axis]))) for axis in ("layer", *site.axes)
        }
        start = () if isinstance(sites, str) else (number,)
        new = runs_of(
            *(site, site_axes, indices, restricted),
            cell_start=start,
            window=window,
            n_layers=cfg.n_layers,
            value=sources.number_of(source),
            mode=mode,
        )
        patched = sorted({patch.layer for run in new for patch in run.patches})
        find_site(site.name, cfg, model.hook_dict, patched)
        for layer in patched:
            one = new[0].patches[0]._replace(layer=layer)
            check_source(sources.list[one.value], one, sizes, model, sources)
        check_run(new[0], model)
        runs += new
        texts = {axis: _labels(site, cfg, axis, indices[axis], tokens) for axis in site_axes}
        if labels and labels != texts:
            raise SweepError(
                f"{found[0].name} and {site.name} have different heads, so they do not share an "
                f"axis: sweep them one by one."
            )
        labels = texts
    if isinstance(sites, str):
        return Grid([found[0].name], axes[0], labels, runs)
    named = [site.name for site in found]
    return Grid(named, ("site", *axes[0]), {"site": named, **labels}, runs)


def _restricted(
    site: Site, restrictions: Mapping[str, Selection], sizes: Mapping[str, int]
) -> dict[str, list[int]]:
    """The axes of the activation that were restricted, and to which entries."""
    restricted = {}
    arguments = {"layer": "layers", "pos": "positions", "head": "heads", "neuron": "neurons"}
    arguments["key_pos"] = "key_positions"
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
    letter = "KV" if is_kv else {"layer": "L", "head": "H", "neuron": "N"}[axis]
    return [f"{letter}{i}" for i in indices]
