"""What the tests of families with DeepSeek-V3's router share."""

from typing import Any

import torch

from tests.weights.families.mixtures import MixtureTests

# One dense layer, then mixtures of 8 experts in groups of two.
MIXED = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
         "first_k_dense_replace": 1, "moe_intermediate_size": 24, "n_group": 4, "topk_group": 2,
         "n_routed_experts": 8, "num_experts_per_tok": 3}  # fmt: skip


class GroupedMixtureTests(MixtureTests):
    """`MixtureTests` with a bias of the choice that changes it."""

    @classmethod
    def transformers_model(cls, case: str) -> Any:
        """As always, with random biases."""
        model = super().transformers_model(case)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                generator = torch.Generator().manual_seed(len(name))
                buffer.copy_(torch.randn(8, generator=generator, dtype=torch.float32) * 0.6)
        return model
