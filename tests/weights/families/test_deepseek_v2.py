"""DeepSeek-V2: its table against transformers."""

from fastlens.weights.families.deepseek_v2 import FAMILY
from tests.weights.families.generated import FamilyTests
from tests.weights.families.test_deepseek_v3 import TINY, YARN


class TestDeepseekV2(FamilyTests):
    family = FAMILY
    cases = {
        "dense": TINY,
        "lite": {**TINY, "q_lora_rank": None, "rope_parameters": YARN},
    }
