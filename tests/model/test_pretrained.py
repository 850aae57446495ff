"""Loading, processing, initialising and saving: against transformers and TransformerLens."""

import copy
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.errors import ConfigError, ModelNameError, SourceError, WeightsError
from fastlens.weights.fold import FLAGS
from tests.configs import tiny
from tests.weights.checkpoints import hf_model, prompt, save_folder, word_tokenizer

# The others are in the tests of their families.
each_case = pytest.mark.parametrize("case", ["gpt2", "neox", "llama_grouped", "mistral_window"])
TOLERANCE = 1e-5


def load(name, **options) -> HookedTransformer:
    return HookedTransformer.from_pretrained(name, verbose=False, **options)


def load_plain(name, **options) -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing(name, verbose=False, **options)


@torch.no_grad()
def expected_logits(case: str, tokens: torch.Tensor) -> torch.Tensor:
    return hf_model(case)(tokens).logits


@torch.no_grad()
def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# -- against Hugging Face ------------------------------------------------------------------------


@each_case
def test_logits_of_a_model_in_memory(case):
    tokens = prompt()
    want = expected_logits(case, tokens)
    with torch.no_grad():
        plain = load_plain(case, hf_model=hf_model(case))(tokens)
        processed = load(case, hf_model=hf_model(case))(tokens)
    assert want.std() > 0.1, "the logits are all alike: the test shows nothing"
    assert gap(plain, want) <= TOLERANCE
    assert gap(processed, want) > TOLERANCE, "centring moved no logit"
    assert gap(processed.log_softmax(-1), want.log_softmax(-1)) <= TOLERANCE


@each_case
def test_logits_of_a_folder(case, tmp_path):
    folder = save_folder(tmp_path / case, case)
    tokens = prompt()
    want = expected_logits(case, tokens)
    with torch.no_grad():
        plain, processed = load_plain(folder)(tokens), load(str(folder))(tokens)
    assert gap(plain, want) <= TOLERANCE
    assert gap(processed.log_softmax(-1), want.log_softmax(-1)) <= TOLERANCE


@pytest.mark.parametrize(
    # Hugging Face's rotary tables are float32 in a float64 model too.
    ("case", "tolerance"),
    [("gpt2", 1e-12), ("neox", 1e-6), ("llama_grouped", 1e-6), ("mistral_window", 1e-6)],
)
def test_the_same_function_in_float64(case, tolerance):
    tokens = prompt()
    reference = copy.deepcopy(hf_model(case)).double()
    model = load_plain(case, hf_model=reference, dtype="float64")
    processed = load(case, hf_model=reference, dtype="float64")
    assert all(p.dtype == torch.float64 for p in model.parameters())
    with torch.no_grad():
        want = reference(tokens).logits
        assert gap(model(tokens), want) <= tolerance
        assert gap(processed(tokens).log_softmax(-1), want.log_softmax(-1)) <= tolerance


def test_a_window_changes_the_logits():
    tokens = prompt(12)
    model = load_plain("mistral_window", hf_model=hf_model("mistral_window"))
    assert model.cfg.use_local_attn and model.cfg.window_size == 4 < tokens.shape[1]
    model.cfg.use_local_attn = False
    wide = HookedTransformer({**model.cfg.to_dict(), "attn_types": None, "window_size": None})
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert gap(wide(tokens), expected_logits("mistral_window", tokens)) > 1e-3


def test_first_layers_only():
    tokens = prompt()
    model = load_plain("gpt2", hf_model=hf_model("gpt2"), first_n_layers=2)
    assert model.cfg.n_layers == len(model.blocks) == 2
    with torch.no_grad():
        hidden = hf_model("gpt2")(tokens, output_hidden_states=True).hidden_states[2]
        assert gap(model(tokens, stop_at_layer=2), hidden) <= TOLERANCE
    with pytest.raises(ConfigError, match="first_n_layers=9"):
        load("gpt2", hf_model=hf_model("gpt2"), first_n_layers=9)


def test_another_context_length(caplog):
    short = load_plain("gpt2", hf_model=hf_model("gpt2"), n_ctx=8)
    assert short.W_pos.shape == (8, 32)
    with torch.no_grad():
        assert gap(short(prompt(8)), expected_logits("gpt2", prompt(8))) <= TOLERANCE
    with pytest.raises(ConfigError, match="learned 32 positions"):
        load("gpt2", hf_model=hf_model("gpt2"), n_ctx=40)
    with caplog.at_level(logging.WARNING):
        long = load_plain("llama_grouped", hf_model=hf_model("llama_grouped"), n_ctx=128)
    assert long.cfg.n_ctx == 128 and "n_ctx=128" in caplog.text


def test_the_true_context_length():
    assert load("llama_grouped", hf_model=hf_model("llama_grouped")).cfg.n_ctx == 64


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": torch.float64}, torch.float64),
        ({"dtype": "float32", "torch_dtype": torch.bfloat16}, torch.bfloat16),
    ],
)
def test_dtypes(options, dtype):
    model = load("gpt2", hf_model=hf_model("gpt2"), **options)
    assert {p.dtype for p in model.parameters()} == {dtype} and model.cfg.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else TOLERANCE
    want = expected_logits("gpt2", prompt()).log_softmax(-1)
    with torch.no_grad():
        assert gap(model(prompt()).float().log_softmax(-1), want) <= tolerance


def test_half_precision_is_rounded_once():
    half = load("gpt2", hf_model=hf_model("gpt2"), dtype="bfloat16")
    whole = load("gpt2", hf_model=hf_model("gpt2"))
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name).bfloat16()), name


def test_bos_default_is_the_familys_unless_given():
    assert load("x", hf_model=hf_model("gpt2")).cfg.default_prepend_bos is True
    assert load("x", hf_model=hf_model("neox")).cfg.default_prepend_bos is False
    given = load("x", hf_model=hf_model("neox"), default_prepend_bos=True)
    assert given.cfg.default_prepend_bos is True


def test_says_what_it_loaded(capsys):
    HookedTransformer.from_pretrained("anything", hf_model=hf_model("gpt2"))
    assert capsys.readouterr().out == "Loaded pretrained model anything into HookedTransformer\n"
    load("anything", hf_model=hf_model("gpt2"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"dtype": "int8"}, "dtype='int8' must be one of"),
        ({"dtype": torch.int8}, "must be a float dtype"),
        ({"cache_dri": "x"}, "Nearest: 'cache_dir'"),
        ({"checkpoint_value": 1, "checkpoint_label": 1}, "two names of one thing"),
    ],
)
def test_arguments_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        load("gpt2", hf_model=hf_model("gpt2"), **options)


def test_checkpoints_are_hub_revisions(monkeypatch, tmp_path):
    folder = save_folder(tmp_path / "neox", "neox")
    asked = []

    def fetch(repository, **options):
        asked.append((repository, options["revision"]))
        return folder

    monkeypatch.setattr("fastlens.weights.source.fetch", fetch)
    model = load("pythia-70m", checkpoint_value=512)
    assert asked == [("EleutherAI/pythia-70m", "step512")]
    assert model.cfg.from_checkpoint and model.cfg.checkpoint_value == 512
    assert model.cfg.checkpoint_index == 10 and model.cfg.checkpoint_label_type == "step"
    load("pythia-70m", checkpoint_index=-1)
    assert asked[-1][1] == "step143000"
    with pytest.raises(ModelNameError, match="Nearest: 256, 512, 1000"):
        load("pythia-70m", checkpoint_label=600)
    with pytest.raises(ModelNameError, match="no list of its checkpoints"):
        load("gpt2", checkpoint_index=0)
    with pytest.raises(ConfigError, match="Give one of them"):
        load("pythia-70m", checkpoint_value=512, revision="main")


def test_an_unknown_name_has_near_ones():
    with pytest.raises(ModelNameError, match="'gpt2-small'"):
        load("gpt2-smal")


# -- tokenizers ----------------------------------------------------------------------------------


def test_the_tokenizer_of_a_folder(tmp_path):
    folder = save_folder(tmp_path, "gpt2")
    assert load(folder).tokenizer is None
    word_tokenizer().save_pretrained(folder)
    model = load(folder)
    assert model.to_tokens("w0 w2", prepend_bos=True).tolist() == [[0, 3, 5]]
    given = word_tokenizer()
    given.add_tokens(["extra"])
    assert len(load(folder, tokenizer=given).tokenizer) == len(given)


def test_a_broken_tokenizer_is_named(tmp_path):
    folder = save_folder(tmp_path, "gpt2")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="tokenizer files in .* cannot be loaded"):
        load(folder)


OFFLINE_PROBE = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from fastlens import HookedTransformer
model = HookedTransformer.from_pretrained(sys.argv[1])
print(model.to_tokens("w0 w2").tolist())
"""


def test_a_folder_needs_no_network(tmp_path):
    folder = save_folder(tmp_path, "llama_grouped")
    word_tokenizer().save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OFFLINE_PROBE, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[[0, 3, 5]]" in done.stdout


# -- native folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gpt2", "neox", "llama_grouped", "mistral_window"])
def test_a_saved_model_comes_back_bit_for_bit(case, tmp_path):
    for name, make in (("plain", load_plain), ("processed", load)):
        model = make(case, hf_model=hf_model(case))
        model.save_pretrained(tmp_path / name)
        again = load_plain(tmp_path / name)
        assert {**again.cfg.to_dict(), "tokenizer_name": 0, "model_name": 0} == {
            **model.cfg.to_dict(), "tokenizer_name": 0, "model_name": 0,
        }  # fmt: skip
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter, again.get_parameter(key)), key
        processed = load(tmp_path / name)
        with torch.no_grad():
            want = expected_logits(case, prompt()).log_softmax(-1)
            assert gap(processed(prompt()).log_softmax(-1), want) <= TOLERANCE


def test_first_layers_of_a_saved_model(tmp_path):
    load("x", hf_model=hf_model("gpt2")).save_pretrained(tmp_path)
    assert len(load(tmp_path, first_n_layers=1).blocks) == 1
    with pytest.raises(ConfigError, match="has 3 layers"):
        load(tmp_path, first_n_layers=4)


def test_a_saved_model_that_does_not_fit_its_config(tmp_path):
    load_plain("x", hf_model=hf_model("gpt2")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "fastlens.json").read_text())
    (tmp_path / "fastlens.json").write_text(json.dumps({**config, "d_mlp": 7, "n_layers": 4}))
    with pytest.raises(WeightsError) as error:
        load_plain(tmp_path)
    assert "wrong shape: blocks.0.mlp.W_in is [32, 128], expected [32, 7]" in str(error.value)
    assert "missing: blocks.3.attn.W_Q" in str(error.value)


def test_a_saved_model_keeps_its_tokenizer(tmp_path):
    model = load("x", hf_model=hf_model("gpt2"), tokenizer=word_tokenizer())
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.to_tokens("w1 w2").equal(model.to_tokens("w1 w2"))
    assert json.loads((tmp_path / "fastlens.json").read_text())["dtype"] == "float32"


def test_a_trained_model_can_be_saved(tmp_path):
    model = HookedTransformer(tiny("attn_only"))
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    before = torch.rand(3)
    torch.manual_seed(5)
    again = load_plain(tmp_path)
    assert torch.equal(torch.rand(3), before), "loading drew or seeded random numbers"
    with torch.no_grad():
        assert torch.equal(model(prompt(5) % 50), again(prompt(5) % 50))


# -- processing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "attn_only", "solu_ln", "post_norm"])
def test_processing_a_live_model_keeps_its_function(family):
    model = HookedTransformer(tiny(family))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tokens = prompt(8) % 50
    with torch.no_grad():
        want = model(tokens).log_softmax(-1)
        model.process_weights_()
        assert model.cfg.normalization_type in ("LNPre", "RMSPre")
        assert not any(name.startswith("blocks.0.ln1.w") for name, _ in model.named_parameters())
        assert model.W_U.mean(-1).abs().max() < 1e-6
        assert gap(model(tokens).log_softmax(-1), want) <= TOLERANCE
    _, cache = model.run_with_cache(tokens)
    assert "blocks.0.ln1.hook_normalized" in cache


def test_a_state_dict_is_consumed_and_hooks_are_set_up_again():
    model = HookedTransformer(tiny("gpt2"))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.load_and_process_state_dict(state)
    assert state == {}
    assert model.hook_dict["blocks.1.ln1.hook_scale"] is model.blocks[1].ln1.hook_scale
    assert model.hook_dict["ln_final.hook_scale"] is model.ln_final.hook_scale


def test_processing_twice_skips_the_norms(caplog):
    model = HookedTransformer(tiny("gpt2"))
    model.process_weights_()
    before = {key: p.clone() for key, p in model.named_parameters()}
    with caplog.at_level(logging.WARNING):
        model.process_weights_()
    assert "are folded already" in caplog.text
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[key], atol=1e-6, rtol=0)


def test_folded_weights_fold_the_norms_of_a_model_that_has_them():
    folded = HookedTransformer(tiny("gpt2"))
    folded.process_weights_()
    model = HookedTransformer(tiny("gpt2"))
    model.load_and_process_state_dict(dict(folded.state_dict()))
    assert model.cfg.normalization_type == "LNPre"
    tokens = prompt(6) % 50
    assert gap(model(tokens), folded(tokens)) <= TOLERANCE


def test_unfolded_norms_cannot_be_lost():
    plain = HookedTransformer(tiny("gpt2"))
    with torch.no_grad():
        plain.blocks[0].ln1.w.fill_(2.0)
    folded = HookedTransformer(tiny("gpt2", normalization_type="LNPre"))
    state = plain.state_dict()
    with pytest.raises(WeightsError, match=r"ln1\.w, which is not folded"):
        folded.load_and_process_state_dict(dict(state), **dict.fromkeys(FLAGS, False))
    folded.load_and_process_state_dict(dict(state))
    with torch.no_grad():
        want = plain(prompt(6) % 50).log_softmax(-1)
        assert gap(folded(prompt(6) % 50).log_softmax(-1), want) <= TOLERANCE


def test_missing_and_wrong_weights_change_nothing():
    model = HookedTransformer(tiny("gpt2"))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    short = {key: tensor for key, tensor in before.items() if not key.endswith("W_O")}
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn\.W_O, blocks\.1\.attn\.W_O"):
        model.load_and_process_state_dict(short)
    wrong = {**before, "embed.W_E": torch.zeros(3, 3), "blocks.0.mlp.b_in": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"(?s)embed\.W_E is \[3, 3\].*blocks\.0\.mlp\.b_in"):
        model.load_and_process_state_dict(wrong)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_missing_biases_are_the_models_own():
    model = HookedTransformer(tiny("gpt2"))
    state = {k: v.clone() for k, v in model.state_dict().items() if ".b_" not in k}
    filled = model.fill_missing_keys(state)
    assert sorted(filled) == sorted(model.state_dict())


def test_single_steps_are_the_folds():
    model = HookedTransformer(tiny("gpt2"))
    state = model.state_dict()
    assert model.center_unembed(state)["unembed.W_U"].mean(-1).abs().max() < 1e-6
    assert model.center_writing_weights(state)["embed.W_E"].mean(-1).abs().max() < 1e-6
    assert (model.fold_layer_norm(state)["blocks.0.ln1.w"] == 1).all()
    assert (model.fold_value_biases(state)["blocks.0.attn.b_V"] == 0).all()
    even = model.refactor_factored_attn_matrices(state)
    assert even["blocks.0.attn.W_O"].shape == state["blocks.0.attn.W_O"].shape


# -- random weights ------------------------------------------------------------------------------

INIT_MODES = [
    "gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP",
]  # fmt: skip


@pytest.mark.tl
@pytest.mark.parametrize("family", ["gpt2", "llama", "attn_only"])
@pytest.mark.parametrize("init_mode", INIT_MODES)
def test_seeds_give_transformerlens_weights(family, init_mode):
    tl = pytest.importorskip("transformer_lens")
    fields = tiny(family, init_mode=init_mode, seed=7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = tl.HookedTransformer(tl.HookedTransformerConfig(**fields))
    ours = HookedTransformer(fields)
    theirs_named = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs_named[name]), name


@pytest.mark.tl
def test_processed_state_dict_is_transformerlens():
    tl = pytest.importorskip("transformer_lens")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = tl.HookedTransformer(tl.HookedTransformerConfig(**tiny("gpt2")))
        state = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
        theirs.process_weights_()
    ours = HookedTransformer(tiny("gpt2"))
    ours.load_and_process_state_dict(state)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), atol=1e-6, rtol=1e-6)
