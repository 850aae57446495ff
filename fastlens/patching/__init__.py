"""Activation patching: `sweep` and its metrics."""

from fastlens.patching.metrics import (
    answer_logit,
    answer_prob,
    cross_entropy,
    kl_divergence,
    logit_diff,
)
from fastlens.patching.execute import execute
from fastlens.patching.patch import Patch
from fastlens.patching.query import SweepPlan, plan
from fastlens.patching.sweep import sweep

__all__ = [
    "answer_logit",
    "answer_prob",
    "cross_entropy",
    "kl_divergence",
    "logit_diff",
    "sweep",
]
