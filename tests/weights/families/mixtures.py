"""What the tests of families with mixtures of experts share."""

from typing import Any

import torch
from torch import Tensor

from tests.weights.families.generated import FamilyTests
from tests.weights.families.tiny import LLAMA

# Narrow experts, of which a token takes two.
MIXTURE: dict[str, Any] = {
    **LLAMA,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "num_experts_per_tok": 2,
}


class MixtureTests(FamilyTests):
    """`FamilyTests` against transformers' experts one by one."""

    @classmethod
    def transformers_model(cls, case: str) -> Any:
        """As always, with the experts as transformers wrote them, not as it fuses them."""
        model = super().transformers_model(case)
        model.set_experts_implementation("eager")
        return model

    @classmethod
    def randomise(cls, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Routers that tell experts well apart: near-ties are tested by themselves."""
        super().randomise(name, parameter, generator)
        if name.endswith(("mlp.gate.weight", "router.weight")):
            parameter.mul_(3)
