"""Baichuan: its code is not in transformers; Llama repacked is the truth, and ALiBi written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlens import HookedTransformer
from fastlens.errors import ConfigError
from fastlens.weights.families.baichuan import FAMILY, SECOND_VOCABULARY
from tests.close import assert_close_to
from tests.weights.families.generated import tokens_of
from tests.weights.families.repacked import check, llama, save

CONFIG = {
    "architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan", "hidden_act": "silu",
    "auto_map": {"AutoConfig": "configuration_baichuan.BaiChuanConfig"}, "rms_norm_eps": 1e-5,
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "model_max_length": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
FULL = {"num_key_value_heads": 4}


def repack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{at}{x}_proj.weight") for x in "qkv"]
        tensors[f"{at}W_pack.weight"] = torch.cat(parts)
        tensors[f"{at}rotary_emb.inv_freq"] = torch.ones(4)
    return tensors


def test_against_llama(tmp_path):
    model = check(save(tmp_path, CONFIG, repack, **FULL), **FULL)
    assert model.cfg.n_key_value_heads is None and model.cfg.rotary_base == 10000


def test_the_second_release_normalises_its_unembedding(tmp_path):
    sizes = {"vocab_size": SECOND_VOCABULARY}
    config = {**CONFIG, **sizes, "architectures": ["BaichuanForCausalLM"], "z_loss_weight": 0}
    folder = save(tmp_path, config, repack, **FULL, **sizes)
    truth = llama(**FULL, **sizes)
    tokens = tokens_of(1, 5)
    with torch.no_grad():
        plain = truth(tokens).logits
        truth.lm_head.weight.copy_(F.normalize(truth.lm_head.weight))
        want = truth(tokens).logits
        model = HookedTransformer.from_pretrained_no_processing(folder, verbose=False)
        assert_close_to(model(tokens), want, atol=1e-5, name="logits")
    assert (plain - want).abs().max() > 0.1
    assert model.W_U.norm(dim=0).sub(1).abs().max() < 1e-5


def with_alibi(tensors: dict[str, Tensor], tokens: Tensor, n_heads: int) -> Tensor:
    """The 13B models' forward, in float64; slopes for any number of heads (Press et al.)."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    lower = 2 ** int(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    slopes += [2 ** (-4 * (i + 1) / lower) for i in range(0, 2 * lower, 2)][: n_heads - lower]
    positions = torch.arange(tokens.shape[1])
    bias = torch.tensor(slopes).double()[:, None, None] * (positions - positions[:, None])
    bias = bias.masked_fill(positions > positions[:, None], -torch.inf)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"model.{name}.weight"]

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(2):
        at = f"model.layers.{layer}."
        read = norm(x, f"layers.{layer}.input_layernorm")
        packed = read @ weights[f"{at}self_attn.W_pack.weight"].T
        q, k, v = (t.unflatten(-1, (n_heads, -1)).transpose(1, 2) for t in packed.chunk(3, -1))
        pattern = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
        x = x + (pattern @ v).transpose(1, 2).flatten(2) @ weights[f"{at}self_attn.o_proj.weight"].T
        read = norm(x, f"layers.{layer}.post_attention_layernorm")
        gate, up, down = (
            weights[f"{at}mlp.{part}_proj.weight"].T for part in ("gate", "up", "down")
        )
        x = x + (F.silu(read @ gate) * (read @ up)) @ down
    return norm(x, "norm") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("n_heads", [4, 5])
def test_the_13b_models_have_alibi(n_heads, tmp_path):
    sizes = {"num_attention_heads": n_heads, "hidden_size": 8 * n_heads}
    config = {**CONFIG, **sizes, "architectures": ["BaichuanForCausalLM"]}
    del config["max_position_embeddings"]
    changes = {**sizes, "num_key_value_heads": n_heads}
    folder = save(tmp_path, config, repack, **changes)
    want = with_alibi(repack(dict(llama(**changes).state_dict())), tokens_of(), n_heads)
    wide = {"verbose": False, "dtype": torch.float64}
    with torch.no_grad():
        model = HookedTransformer.from_pretrained_no_processing(folder, **wide)
        assert_close_to(model(tokens_of()), want, atol=1e-9, name="logits in float64")
        folded = HookedTransformer.from_pretrained(folder, verbose=False)(tokens_of())
    assert_close_to(folded.log_softmax(-1), want.log_softmax(-1).float(), atol=2e-5, name="log p")
    assert (model.cfg.positional_embedding_type, model.cfg.n_ctx) == ("alibi", 64)


def test_what_is_not_accounted_for(tmp_path):
    with pytest.raises(ConfigError, match="surprise=1"):
        FAMILY.config_fields({**CONFIG, "surprise": 1})
