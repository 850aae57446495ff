"""Arguments of tiny configs that families of Llama's shape share."""

from typing import Any

import torch

from tests.weights.families.generated import FamilyTests

# Three layers of 32 channels; four heads, in groups of two where the config groups heads.
LLAMA: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
# Of the wavelengths at theta 1000 and head size 8, some are kept, some blended, some divided.
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def random_model(tests: type[FamilyTests], case: str) -> Any:
    """transformers' model of a case, every parameter random; the caller's own."""
    model = tests.transformers_model(case).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tests.randomise(name, parameter, generator)
    return model
