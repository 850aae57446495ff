"""Architectures without a family open through `HookedModule`."""

import json

import pytest
import torch
import transformers

from fastlens import HookedModule, HookedTransformer
from fastlens.errors import ConfigError, ModelNameError, SourceError
from fastlens.model.any_architecture import LACKS, described
from fastlens.weights.family import FAMILIES
from tests.close import assert_close_to
from tests.weights.checkpoints import save_folder

TOKENS = torch.arange(12).view(2, 6)
# No family: a state space model and one with two streams. Place of a layer's output, axis of batch.
OTHERS = {
    "mamba": (
        transformers.MambaConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=2, state_size=4, use_cache=False
        ),
        "MambaForCausalLM",
        "backbone.layers.0.hook_out",
    ),
    "fnet": (
        transformers.FNetConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=2, intermediate_size=32,
            max_position_embeddings=16,
        ),
        "FNetForMaskedLM",
        "fnet.encoder.layer.0.hook_out.0",
    ),
}  # fmt: skip


@pytest.fixture(params=sorted(OTHERS))
def saved(request, tmp_path):
    config, architecture, place = OTHERS[request.param]
    assert not any(architecture in family.architectures for family in FAMILIES)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).eval()
    model.save_pretrained(tmp_path)
    return tmp_path, model, place


def test_families_of_others_say_what_opens_them(saved):
    folder, model, _ = saved
    line = r"model = HookedModule\.from_pretrained\(name_or_folder\)"
    for options in ({}, {"hf_model": model}):
        with pytest.raises(ConfigError, match=line):
            HookedTransformer.from_pretrained(folder, **options)


def test_hooks_cache_and_patching(saved, capsys):
    folder, model, place = saved
    hooked = HookedModule.from_pretrained(folder)
    said = capsys.readouterr().out
    assert type(model).__name__ in said and LACKS in said and said.count("\n") == 1
    with torch.no_grad():
        want = model(TOKENS).logits
        output, cache = hooked.run_with_cache(TOKENS)
        assert torch.equal(output.logits, want)
        # The first row's run, with the second row's layer written into it.
        other = cache[place][1:]
        patched = hooked.run_with_patches(TOKENS[:1], patches={place: other}).logits
        assert_close_to(patched, want[1:], atol=1e-5, name="patched")
        seen = []
        hooked.run_with_hooks(TOKENS, fwd_hooks=[(place, lambda x, hook: seen.append(x.shape))])
    assert seen == [cache[place].shape]


def test_options(saved, capsys):
    folder, model, _ = saved
    hooked = HookedModule.from_pretrained(
        folder, model_class="AutoModel", dtype=torch.float64, verbose=False
    )
    assert capsys.readouterr().out == ""
    assert type(hooked.wrapped).__name__ == type(model).__name__.split("For")[0] + "Model"
    assert next(hooked.parameters()).dtype == torch.float64
    with pytest.raises(ConfigError, match="'MambaForCausalML' was asked.*'MambaForCausalLM'"):
        HookedModule.from_pretrained(folder, model_class="MambaForCausalML")


def test_an_architecture_with_a_family_says_so(tmp_path):
    folder = save_folder(tmp_path, "gpt2")
    hooked = HookedModule.from_pretrained(folder, verbose=False)
    assert type(hooked.wrapped).__name__ == "GPT2LMHeadModel"
    assert "HookedTransformer.from_pretrained has all" in described("x", "GPT2LMHeadModel")
    assert "from_pretrained" not in described("x", "MambaForCausalLM")


def test_speech(tmp_path):
    """What the error for TransformerLens' audio names advises."""
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_kernel=(3, 3), conv_stride=(2, 2), num_feat_extract_layers=2,
        num_conv_pos_embedding_groups=2, num_conv_pos_embeddings=4,
    )  # fmt: skip
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path)
    hooked = HookedModule.from_pretrained(tmp_path, model_class="Wav2Vec2Model", verbose=False)
    _, cache = hooked.run_with_cache(torch.randn(1, 400))
    assert cache["encoder.layers.0.attention.hook_out.0"].shape[-1] == 16


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises((SourceError, ModelNameError), match="could not be reached"):
        HookedModule.from_pretrained("facebook/wav2vec2-base", model_class="Wav2Vec2Model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "oddgpt"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="transformers does not know.*trust_remote_code=True"):
        HookedModule.from_pretrained(tmp_path)
