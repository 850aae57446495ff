"""DeepSeek-V2: its table against transformers."""

import pytest

from fastlens.errors import ConfigError
from fastlens.weights.families.deepseek_v2 import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.mixtures import MixtureTests
from tests.weights.families.test_deepseek_v3 import DENSE, MIXED, YARN


class TestDense(FamilyTests):
    family = FAMILY
    cases = {
        "dense": DENSE,
        "lite": {**DENSE, "q_lora_rank": None, "rope_parameters": YARN},
    }


class TestMixtures(MixtureTests):
    family = FAMILY
    cases = {
        "greedy": {**MIXED, "num_hidden_layers": 2, "norm_topk_prob": False, "n_shared_experts": 2},
        "groups": {**MIXED, "topk_method": "group_limited_greedy", "norm_topk_prob": False,
                   "routed_scaling_factor": 16.0},
    }  # fmt: skip


def test_other_routers_are_refused():
    with pytest.raises(ConfigError, match="topk_method='noaux_tc'"):
        FAMILY.config_fields({**MIXED, "norm_topk_prob": False, "topk_method": "noaux_tc"})
    with pytest.raises(ConfigError, match="norm_topk_prob=True"):
        FAMILY.config_fields({**MIXED, "norm_topk_prob": True})
