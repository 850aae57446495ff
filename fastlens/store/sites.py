"""Which activations a dataset is to hold, written as ``resid_post:8,pattern:3:[0,5]``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastlens.act_names import get_act_name
from fastlens.errors import ShapeError

SITE = re.compile(r"([\w.]+)(?::(-?\d+))?(?::\[([\d,\s]+)\])?")


@dataclass(frozen=True)
class Site:
    """A place, and some of its heads.

    Attributes:
        name: Full hook name.
        layer: None for places outside the layers.
        heads: None for all, or for a place without heads.
    """

    name: str
    layer: int | None
    heads: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name if self.heads is None else f"{self.name}:{list(self.heads)}"


def parse_sites(sites: str | Sequence[str], model: Any) -> list[Site]:
    """The sites of a text, or of several.

    Args:
        sites: ``NAME``, ``NAME:LAYER`` or ``NAME:LAYER:[HEAD,...]``, commas between them; names as
            in `get_act_name`, or full hook names; layers from the end if negative.

    Raises: ShapeError for a text that is none, for heads of a place that has none, or if sites of
        one layer name different heads; HookNameError for a place that the model lacks.
    """
    texts = [sites] if isinstance(sites, str) else list(sites)
    found = [_site(part, model) for text in texts for part in _parts(text)]
    if not found or len({site.name for site in found}) < len(found):
        raise ShapeError(f"sites {sites!r}: none is named, or one twice.")
    heads_of(found, model)
    return found


def heads_of(sites: Sequence[Site], model: Any) -> dict[int, list[int]] | None:
    """What ``heads=`` of ``run_with_cache`` must be.

    Raises: ShapeError if sites of one layer name different heads.
    """
    chosen: dict[int, tuple[int, ...]] = {}
    for site in sites:
        if site.heads is None or site.layer is None:
            continue
        if chosen.setdefault(site.layer, site.heads) != site.heads:
            raise ShapeError(_mixed(site))
    for site in sites:
        if site.heads is None and site.layer in chosen and _has_heads(site.name, model):
            raise ShapeError(_mixed(site))
    return {layer: list(heads) for layer, heads in chosen.items()} or None


def _mixed(site: Site) -> str:
    return (
        f"{site} and another site of layer {site.layer} have different heads. Name the same for "
        f"all, or capture them into two folders."
    )


def _parts(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _has_heads(name: str, model: Any) -> bool:
    axes = (model.hook_dict[name].axes or "").split()
    return "head" in axes or "kv_head" in axes


def _site(text: str, model: Any) -> Site:
    match = SITE.fullmatch(text)
    if match is None:
        raise ShapeError(
            f"site {text!r} makes no sense. Write resid_post:8, pattern:3:[0,5] or hook_embed."
        )
    name, layer, heads = match[1], match[2], match[3]
    number = None if layer is None else int(layer)
    n_layers = model.cfg.n_layers
    if number is not None:
        if not -n_layers <= number < n_layers:
            raise ShapeError(f"site {text!r}: the model has layers 0 to {n_layers - 1}.")
        number %= n_layers
    full = name if name in model.hook_dict else get_act_name(name, number)
    if full not in model.hook_dict:
        raise model.no_such_hook(full)
    block = re.match(r"blocks\.(\d+)\.", full)
    number = int(block[1]) if block else None
    if heads is None:
        return Site(full, number)
    if not _has_heads(full, model):
        raise ShapeError(f"site {text!r} names heads, and {full} has none.")
    return Site(full, number, tuple(int(head) for head in heads.split(",") if head.strip()))
