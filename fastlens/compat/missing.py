"""What TransformerLens 3.9 has and fastlens has not, by name, each with its reason.

A name stands for everything below it. `tests/compat/test_surface.py` compares these tables with the
installed TransformerLens: what is missing and not here fails, and so does what is here and exists.
"""

import functools

BRIDGE = "belongs to TransformerBridge, which TransformerLens 4 keeps"
JACOBIAN = "part of the Jacobian lens, which takes a raw TransformerBridge and nothing else"
AUDIO = "audio models are not here"
GPT_OSS = "GPT-OSS' experts are `components.mlps.moe.MoE` here, with other settings"
FOUR_BIT = "bitsandbytes' 4-bit weights are not loaded"
HUB = "it needs a data set from the hub"

# Reason -> names below `transformer_lens`.
MISSING: dict[str, str] = {
    BRIDGE: """
        model_bridge benchmarks conversion_utils remote_module_loading lit tools.model_registry
        factories.architecture_adapter_factory config.transformer_bridge_config
        utilities.bridge_components utilities.heterogeneous_config utilities.aliases
        utilities.architectures utilities.tracr
        tools.analysis.backward_lens
        ActivationCache.ActivationCache.ssm_layers
        ActivationCache.ActivationCache.compute_ssm_effective_attention
        ActivationCache.ActivationCache.compute_ssm_state
        weight_processing.ProcessWeights.distribute_weights_to_components
        utilities.hf_utils.autoconfig_with_remote_post_init_compat
        utilities.hf_utils.autotokenizer_with_special_token_compat
        utilities.hf_utils.make_post_init_kwarg_tolerant
        utilities.multi_gpu.cast_floating_params_to_dtype
        utilities.multi_gpu.maybe_cast_floating_params utilities.multi_gpu.find_misplaced_modules
        """,
    JACOBIAN: """
        tools.analysis.jacobian_lens tools.analysis.jacobian_lens_coordinate_patch
        tools.analysis.jacobian_lens_decomposition
        """,
    AUDIO: """
        HookedAudioEncoder pretrained.weight_conversions.hubert
        """,
    GPT_OSS: "components.mlps.gpt_oss_moe",
    FOUR_BIT: "components.mlps.gated_mlp_4bit",
    HUB: """
        HookedTransformer.HookedTransformer.load_sample_training_dataset
        HookedTransformer.HookedTransformer.sample_datapoint
        """,
}

# Name below `transformer_lens` -> {argument that differs: why}.
DIFFERENT: dict[str, dict[str, str]] = {}


@functools.cache
def reasons() -> dict[str, str]:
    """Name below `transformer_lens` -> why it is missing."""
    return {name: reason for reason, names in MISSING.items() for name in names.split()}


def reason_for(name: str) -> str | None:
    """Why a name, or one it is below, is missing; None if it is not listed."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((reasons()[prefix] for prefix in prefixes if prefix in reasons()), None)
