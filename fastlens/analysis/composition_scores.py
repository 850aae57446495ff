"""`composition_scores`: how much each head's weights read what each earlier head writes."""

from typing import Any

from fastlens.errors import FastlensError, did_you_mean
from fastlens.scores import Scores

MODES = ("Q", "K", "V")


def composition_scores(model: Any, mode: str = "K") -> Scores:
    """Composition of every head with every head of a later layer, from weights alone.

    ``|W_OV[sender] W_x[receiver]| / (|W_OV[sender]| |W_x[receiver]|)`` in Frobenius norms, where
    ``W_x`` is what the receiver reads through: the QK circuit from the query's side (``"Q"``), from
    the key's side (``"K"``, as induction heads read previous-token heads), or its OV circuit
    (``"V"``) (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). Between 0
    and 1; two random heads have about ``1 / sqrt(d_model)``. Norms and rotary positions between the
    two are left out, so the score is of a model whose norms are folded into its weights.

    >>> composition_scores(model).top(5)
    >>> composition_scores(model).select(sender_layer=0, sender_head="H7").plot()

    Args:
        model: A `HookedTransformer`. Under grouped attention each query head has its group's keys
            and values, as in ``model.W_K``.

    Returns: `Scores` with axes ``("sender_layer", "sender_head", "layer", "head")``. A sender in
    the receiver's layer or behind it cannot be read: its score is 0. That of a head whose weights
    are zero is NaN, which ``top`` leaves out.

    Cost: as ``model.all_composition_scores``: products of ``d_head x d_head`` for each pair.
    """
    if mode not in MODES:
        raise FastlensError(
            f"mode={mode!r} must be 'Q', 'K' or 'V'.{did_you_mean(str(mode).upper(), MODES)}"
        )
    values = model.all_composition_scores(mode).detach().cpu()
    layers = [f"L{layer}" for layer in range(model.cfg.n_layers)]
    heads = [f"H{head}" for head in range(model.cfg.n_heads)]
    return Scores(
        values=values,
        axes=("sender_layer", "sender_head", "layer", "head"),
        labels={
            "sender_layer": layers,
            "sender_head": heads,
            "layer": list(layers),
            "head": list(heads),
        },
        unit="fraction of the norms' product",
        title=f"{mode}-composition",
        meta={"model": model.cfg.model_name, "mode": mode, "random": model.cfg.d_model**-0.5},
    )
