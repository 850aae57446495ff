"""Activation patching: `sweep` and its metrics."""

from fastlens.patching.metrics import (
    answer_logit,
    answer_prob,
    cross_entropy,
    kl_divergence,
    logit_diff,
)
# SWEEP

__all__ = [
    "answer_logit",
    "answer_prob",
    "cross_entropy",
    "kl_divergence",
    "logit_diff",
    "sweep",
]
