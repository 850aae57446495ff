"""Drawing a token from logits, and a table of them."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.errors import MissingDependencyError, ShapeError
from fastlens.sampling import SamplingError, sample_logits

__all__ = ["logits_to_df", "sample_logits"]


def logits_to_df(
    logits: Float[Tensor, "..."], tokenizer: Any | None = None, top_k: int | None = None
) -> Any:
    """A pandas DataFrame of one position's logits, most likely token first.

    Columns: ``token_index``, ``token_string`` (with a tokenizer), ``logit``, ``log_prob`` (nats),
    ``probability``. Probabilities are computed in float32, of float64 logits in float64.

    Args:
        logits: Those of one position: a single axis.
        tokenizer: Says what each token is.
        top_k: Keep this many rows.

    Raises: ShapeError for more than one axis; SamplingError for a negative ``top_k``;
        MissingDependencyError without pandas.
    """
    if logits.ndim != 1:
        raise ShapeError(
            f"logits {tuple(logits.shape)} have {logits.ndim} axes, but the table is of one "
            f"position. Give logits[row, pos]."
        )
    if top_k is not None and top_k < 0:
        raise SamplingError(f"top_k={top_k} must be a number of rows, or None for all.")
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependencyError(
            "logits_to_df makes a pandas DataFrame, and pandas is not installed: pip install "
            "pandas."
        ) from error
    logits = logits.detach().cpu()
    log_probs = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    order = torch.argsort(log_probs.exp(), descending=True)[:top_k]
    columns: dict[str, list[Any]] = {"token_index": order.tolist()}
    if tokenizer is not None:
        columns["token_string"] = [tokenizer.decode([token]) for token in columns["token_index"]]
    columns["logit"] = logits[order].tolist()
    columns["log_prob"] = log_probs[order].tolist()
    columns["probability"] = log_probs.exp()[order].tolist()
    return pd.DataFrame(columns)
