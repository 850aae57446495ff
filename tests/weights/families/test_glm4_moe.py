"""GLM-4.5: its table against transformers."""

from fastlens.weights.families.glm4_moe import FAMILY
from fastlens.weights.source import open_source
from tests.weights.checkpoints import weights_of
from tests.weights.families.grouped_mixtures import MIXED, GroupedMixtureTests

GLM = {**MIXED, "num_key_value_heads": 2, "head_dim": 8}


class TestGlm4Moe(GroupedMixtureTests):
    family = FAMILY
    cases = {
        "grouped": GLM,
        "normed": {**GLM, "use_qk_norm": True, "attention_bias": True, "num_hidden_layers": 2,
                   "num_key_value_heads": 4},
        "single": {**GLM, "num_key_value_heads": 1, "num_hidden_layers": 2, "n_group": 1,
                   "topk_group": 1, "tie_word_embeddings": True},
    }  # fmt: skip


def test_layers_that_predict_further_tokens_are_dropped(tmp_path):
    """The repositories hold one more layer, which is not the model's."""
    import torch
    from safetensors.torch import load_file, save_file

    model = TestGlm4Moe.transformers_model("grouped")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    want = weights_of(open_source(tmp_path))
    behind = {"enorm.weight": torch.ones(32), "shared_head.head.weight": torch.ones(60, 32)}
    tensors |= {f"model.layers.3.{name}": tensor for name, tensor in behind.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = weights_of(open_source(tmp_path))
    assert set(found) == set(want)


def test_the_published_sizes():
    fields = FAMILY.config_fields({"architectures": ["Glm4MoeForCausalLM"], "head_dim": 128})
    assert (fields["d_head"], fields["rotary_dim"], fields["n_key_value_heads"]) == (128, 64, 8)
    assert (fields["d_mlp"], fields["d_mlp_dense"], fields["n_dense_layers"]) == (1408, 10944, 1)
