"""One forward per site, by TransformerLens' own patching functions; 3.9 and 4.3 alike.

Imports torch only, since TransformerLens 4 runs it in an environment without fastlens.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Metric = Callable[[Tensor], Tensor]
# Axes of a sweep -> TransformerLens' function for it.
FUNCTIONS = {
    ("resid_pre", ("layer", "pos")): "get_act_patch_resid_pre",
    ("z", ("layer", "head")): "get_act_patch_attn_head_out_all_pos",
    ("z", ("layer", "pos", "head")): "get_act_patch_attn_head_out_by_pos",
}


def difference_of(answer: int, wrong: int) -> Metric:
    """The difference of two tokens' logits at the last position of a batch of one."""
    return lambda logits: logits[0, -1, answer] - logits[0, -1, wrong]


def patched(
    patching: Any,
    function: str,
    model: Any,
    corrupted: Tensor,
    clean_cache: Any,
    metric: Metric,
    *,
    indices: Sequence[tuple[int, ...]] | None = None,
) -> Tensor:
    """The metric of every site, or of some, in the order of the function's axes.

    Args:
        patching: A module with TransformerLens' patching functions.
        function: One of them.
        indices: Some of its sites; None for all.
    """
    sweep = getattr(patching, function)
    # Their progress bar is not what is timed here, and cannot be switched off.
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        if indices is None:
            return sweep(model, corrupted, clean_cache, metric).flatten()
        import pandas

        given = dict(sweep.keywords)
        frame = pandas.DataFrame(list(indices), columns=list(given.pop("index_axis_names")))
        return patching.generic_activation_patch(
            model, corrupted, clean_cache, metric, index_df=frame, **given
        )
