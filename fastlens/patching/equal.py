"""Where a cached value is the run's own, so that patching it in changes nothing."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastlens.patching.frame import NullTest
from fastlens.patching.model import PatchableModel
from fastlens.patching.runs import PlannedPatch, Run
from fastlens.patching.sites import SITES
from fastlens.patching.sources import Source


def equality(
    model: PatchableModel, tokens: Tensor, runs: Sequence[Run], sources: Sequence[Source]
) -> dict[int, NullTest]:
    """A test for each cache among the sources: at which positions a patch from it is null.

    Values count as equal bit by bit only. The prompts are run as the cache was made, the same
    places kept, so positions that see the same tokens have the same bits.

    Cost: one forward of ``tokens`` and the memory of each cache once more, while it is compared.
    """
    caches = {i: source for i, source in enumerate(sources) if source.kind == "cache"}
    sites = {
        patch.hook_name: patch for run in runs for patch in run.patches if patch.value in caches
    }
    if not sites:
        return {}
    tests: dict[int, NullTest] = {}
    for number, source in caches.items():
        assert source.cache is not None
        # What is kept decides which products and which attention run, and so the last bits.
        kept = [name for name in source.cache.keys() if name in model.hook_dict]  # noqa: SIM118
        with torch.no_grad():
            _, own = model.run_with_cache(tokens, names_filter=[*kept, *sites])
        equal = {
            name: _equal(source.cache[name], own[name], len(SITES[patch.site].axes))
            for name, patch in sites.items()
            if name in source.cache
        }
        tests[number] = _test(equal)
    return tests


def _equal(cached: Tensor, own: Tensor, n_axes: int) -> np.ndarray:
    """Over batch and the site's axes."""
    if cached.shape != own.shape:
        return np.zeros(own.shape[: 1 + n_axes], dtype=bool)
    same = cached.detach().to(own) == own.detach()
    return same.flatten(1 + n_axes).all(-1).cpu().numpy() if same.ndim > 1 + n_axes else (
        same.cpu().numpy()
    )  # fmt: skip


def _test(equal: dict[str, np.ndarray]) -> NullTest:
    def null_positions(patch: PlannedPatch, example: int) -> frozenset[int]:
        same = equal[patch.hook_name][example]
        axes = SITES[patch.site].axes
        for axis, index in zip(axes, patch.indices(), strict=True):
            at = axes.index(axis)
            if (index is not None and not axis.endswith("pos")) or (
                axis == "key_pos" and index is not None
            ):
                same = np.take(same, index, axis=at)
        at = next(i for i, axis in enumerate(axes) if axis in ("pos", "query_pos"))
        others = tuple(i for i in range(len(axes)) if i != at)
        positions = same.all(axis=others) if others else same
        return frozenset(np.nonzero(positions)[0].tolist())

    return null_positions
