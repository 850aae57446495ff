"""What `fastlens.patching` offers."""

import fastlens
from fastlens import patching


def test_public_names():
    assert patching.__all__ == [
        "answer_logit",
        "answer_prob",
        "cross_entropy",
        "kl_divergence",
        "logit_diff",
        "sweep",
    ]
    assert all(callable(getattr(patching, name)) for name in patching.__all__)
    assert fastlens.patching is patching
