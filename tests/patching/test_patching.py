"""What `fastlens.patching` offers."""

import fastlens
from fastlens import patching

OURS = {
    "Codes", "Patch", "SweepPlan", "answer_logit", "answer_prob", "codes", "cross_entropy",
    "execute", "kl_divergence", "logit_diff", "plan", "sweep",
}  # fmt: skip


def test_public_names():
    names = set(patching.__all__)
    assert names >= OURS
    # The rest is TransformerLens' module, whose names its own test compares.
    extra = {name for name in names - OURS if not name.startswith(("get_act_patch_", "layer_"))}
    assert extra == {
        "AxisNames",
        "CleanCache",
        "CorruptedActivation",
        "Logits",
        "PatchedActivation",
        "generic_activation_patch",
        "make_df_from_ranges",
    }
    assert all(hasattr(patching, name) for name in names)
    assert fastlens.patching is patching
