"""Which runs a sweep makes, and the axes and labels of its scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastlens.errors import SweepError
from fastlens.patching.model import PatchableModel
from fastlens.patching.prompts import Prompts, position_labels
from fastlens.patching.runs import Run, Selection, chosen, runs_of
from fastlens.patching.sites import Site, find_site, n_heads, sweep_axes


@dataclass(frozen=True)
class Grid:
    """The axes of the scores, and the runs that fill them."""

    sites: list[Site]
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
        named = [] if "site" in self.axes else [run.site.name]
        return ", ".join([*named, *parts])


def grid_of(
    model: PatchableModel,
    prompts: Prompts,
    sites: str | Sequence[str],
    by: str | Sequence[str] | None,
    restrictions: Mapping[str, Selection],
) -> Grid:
    """All runs of a sweep.

    Args:
        restrictions: For the axes layer, pos, head and neuron, which entries; None is all.

    Raises: SweepError for sites, axes or entries that the model or the prompts do not have.
    """
    cfg = model.cfg
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
        sizes = {
            "layer": cfg.n_layers,
            "pos": prompts.n_pos,
            "query_pos": prompts.n_pos,
            "key_pos": prompts.n_pos,
            "head": n_heads(site, cfg),
            "neuron": cfg.d_mlp,
        }
        restricted = _restricted(site, restrictions, sizes)
        indices = {
            axis: restricted.get(axis, list(range(sizes[axis]))) for axis in ("layer", *site.axes)
        }
        start = () if isinstance(sites, str) else (number,)
        runs += runs_of(site, site_axes, indices, restricted, start)
        texts = {axis: _labels(site, cfg, axis, indices[axis], tokens) for axis in site_axes}
        if labels and labels != texts:
            raise SweepError(
                f"{found[0].name} and {site.name} have different heads, so they do not share an "
                f"axis: sweep them one by one."
            )
        labels = texts
    if isinstance(sites, str):
        return Grid(found, axes[0], labels, runs)
    return Grid(found, ("site", *axes[0]), {"site": [s.name for s in found], **labels}, runs)


def _restricted(
    site: Site, restrictions: Mapping[str, Selection], sizes: Mapping[str, int]
) -> dict[str, list[int]]:
    """The axes of the activation that were restricted, and to which entries."""
    restricted = {}
    arguments = {"layer": "layers", "pos": "positions", "head": "heads", "neuron": "neurons"}
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
