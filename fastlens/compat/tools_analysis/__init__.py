"""``transformer_lens.tools.analysis``: what takes a `HookedTransformer`, or no model at all.

`direct_path_patching` is `fastlens.analysis.direct_path_patching` itself.
"""
