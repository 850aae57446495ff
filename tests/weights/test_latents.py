"""What families with latent attention share: views and fields, element by element."""

import math

import pytest
import torch

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights import latents

CFG = HookedTransformerConfig(
    n_layers=1, d_model=8, d_head=5, n_heads=2, n_ctx=16, d_vocab=20, act_fn="silu", device="cpu",
    positional_embedding_type="rotary", rotary_dim=2, d_kv_latent=3, d_q_latent=4, d_value=4,
)  # fmt: skip
CONFIG = {
    "num_attention_heads": 2, "hidden_size": 8, "qk_rope_head_dim": 2, "qk_nope_head_dim": 3,
    "v_head_dim": None, "q_lora_rank": None, "kv_lora_rank": 3, "rope_interleave": False,
    "max_position_embeddings": 16,
}  # fmt: skip


def test_rotated_channels_come_first():
    stored = torch.arange(2 * 5 * 4).view(10, 4)
    found = latents.rotated_first(stored, CFG)
    assert found.shape == (2, 4, 5)
    for head in range(2):
        of_head = stored[5 * head : 5 * head + 5]
        assert torch.equal(found[head].t(), of_head[[3, 4, 0, 1, 2]])


def test_keys_and_values_come_apart():
    stored = torch.arange(2 * 7 * 3).view(14, 3)
    keys, values = latents.keys_and_values(stored, CFG)
    assert torch.equal(keys[1].t(), stored[7:10]) and torch.equal(values[1].t(), stored[10:14])


def test_the_latent_and_the_shared_key_come_apart():
    stored = torch.arange(5 * 8).view(5, 8)
    latent, shared = latents.latent_and_shared(stored, CFG)
    assert torch.equal(latent.t(), stored[:3]) and torch.equal(shared.t(), stored[3:])
    latent, shared = latents.latent_and_shared(stored[:, 0], CFG)
    assert torch.equal(latent, stored[:3, 0]) and torch.equal(shared, stored[3:, 0])


def test_fields():
    fields = latents.attention_fields({}, CONFIG)
    assert (fields["d_head"], fields["d_value"], fields["rotary_dim"]) == (5, 4, 2)
    assert (fields["d_q_latent"], fields["d_kv_latent"]) == (None, 3)
    assert fields["attn_scale"] == pytest.approx(math.sqrt(5))
    rope = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    fields = latents.attention_fields({"rope_scaling": rope}, CONFIG)
    assert fields["attn_scale"] == pytest.approx(math.sqrt(5) / (0.1 * math.log(4) + 1) ** 2)
    assert fields["yarn_attention_factor"] == 1.0
    with pytest.raises(ConfigError, match="num_key_value_heads=1 was asked beside 2 heads"):
        latents.attention_fields({"num_key_value_heads": 1}, CONFIG)
