"""SantaCoder, whose code is remote: a written reference, GPT-BigCode and TransformerLens."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTBigCodeConfig, GPTBigCodeForCausalLM
from transformers.pytorch_utils import Conv1D

from fastlens import HookedTransformer
from fastlens.errors import ConfigError
from fastlens.weights.families.santacoder import FAMILY
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.weights.checkpoints import edit_config
from tests.weights.families.facts import check_aliases, check_same_as_transformerlens
from tests.weights.families.generated import FamilyTests, tokens_of

TINY = {"vocab_size": 60, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}


class SharedKeyAttention(nn.Module):
    """Multi-query attention (Shazeer 1911.02150) with SantaCoder's parameter names."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.d_head = config.n_embd // config.n_head
        self.q_attn = Conv1D(config.n_embd, config.n_embd)
        self.kv_attn = Conv1D(2 * self.d_head, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        batch, n_pos, width = hidden_states.shape
        key, value = self.kv_attn(hidden_states).chunk(2, -1)
        query = self.q_attn(hidden_states).view(batch, n_pos, -1, self.d_head)
        scores = torch.einsum("bqhd, bkd -> bhqk", query, key) / self.d_head**0.5
        future = torch.ones(n_pos, n_pos).triu(1).bool()
        pattern = scores.masked_fill(future, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk, bkd -> bqhd", pattern, value)
        return self.c_proj(mixed.reshape(batch, n_pos, width)), None


class GPT2LMHeadCustomModel(GPT2LMHeadModel):
    """transformers' GPT-2 with that attention."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        for block in self.transformer.h:
            block.attn = SharedKeyAttention(config)


class TestSantaCoder(FamilyTests):
    family = FAMILY
    cases = {
        "plain": TINY,
        "fast_gelu": {**TINY, "n_layer": 2, "n_inner": 40, "activation_function": "gelu_fast"},
    }

    @classmethod
    def transformers_model(cls, case: str) -> Any:
        kind = {"attention_head_type": "multiquery"}
        config = GPT2Config(bos_token_id=0, eos_token_id=1, **kind, **cls.cases[case])
        return GPT2LMHeadCustomModel(config)


@pytest.mark.tl
def test_aliases_are_transformerlens():
    assert check_aliases(FAMILY, "santacoder") == 2


@pytest.mark.tl
def test_weights_are_transformerlens():
    from transformer_lens.pretrained.weight_conversions.coder import convert_coder_weights

    check_same_as_transformerlens(TestSantaCoder.transformers_model("plain"), convert_coder_weights)


def test_the_logits_are_those_of_gpt_bigcode():
    """The conversion that made ``gpt_bigcode-santacoder``: q, k and v stacked and transposed."""
    custom = TestSantaCoder.transformers_model("fast_gelu").eval()
    arguments = TestSantaCoder.cases["fast_gelu"]
    fused = GPTBigCodeForCausalLM(GPTBigCodeConfig(**arguments, multi_query=True)).eval()
    state = {}
    for name, tensor in custom.state_dict().items():
        is_conv1d = name.endswith(".weight") and ("attn." in name or "mlp." in name)
        tensor = tensor.t() if is_conv1d else tensor
        if "q_attn" in name:
            both = custom.state_dict()[name.replace("q_attn", "kv_attn")]
            tensor = torch.cat([tensor, both.t() if is_conv1d else both])
        if "kv_attn" not in name:
            state[name.replace("q_attn", "c_attn")] = tensor
    fused.load_state_dict(state)
    ours = HookedTransformer.from_pretrained_no_processing("x", hf_model=custom, verbose=False)
    with torch.no_grad():
        assert_close_to(ours(tokens_of()), fused(tokens_of()).logits, atol=1e-5, name="logits")


def test_other_kinds_of_heads_are_refused(tmp_path):
    TestSantaCoder.transformers_model("plain").save_pretrained(tmp_path)
    edit_config(tmp_path, attention_head_type="multihead")
    with pytest.raises(ConfigError, match="attention_head_type='multihead' was found"):
        open_source(tmp_path)
