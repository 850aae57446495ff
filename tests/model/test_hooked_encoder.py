"""`HookedEncoder` against transformers (float64) and TransformerLens 3.9 (every activation)."""

import copy
import pickle
import warnings

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.config import EncoderConfig
from fastlens.errors import (
    ConfigError,
    FlagError,
    HookNameError,
    ShapeError,
    SweepError,
    TokenError,
    WeightsError,
)
from fastlens.model.hooked_encoder import HookedEncoder
from fastlens.patching import generic_activation_patch, get_act_patch_block_every
from fastlens.patching import get_act_patch_attn_head_all_pos_every as every_head
from fastlens.patching.model import check_patchable
from tests.close import assert_close_to
from tests.encoders import (
    D_VOCAB,
    VOCAB,
    bert_tokenizer,
    hf_bert,
    hf_inputs,
    inputs,
    ours,
    pair,
)

WEIGHTS = """W_U b_U W_E W_pos W_E_pos W_K W_Q W_V W_O W_in W_out b_K b_Q b_V b_O b_in b_out QK
OV""".split()
METHODS = """forward encoder_output to_tokens run_with_cache to cpu cuda mps from_pretrained
all_head_labels""".split()
COMPARED = [f"transformer_lens.HookedEncoder.HookedEncoder.{n}" for n in (*METHODS, *WEIGHTS)] + [
    f"transformer_lens.components.{name}.forward"
    for name in (
        "bert_block.BertBlock",
        "bert_embed.BertEmbed",
        "bert_mlm_head.BertMLMHead",
        "token_typed_embed.TokenTypeEmbed",
    )
]
FLAGS = [{}, {"use_attn_result": True}, {"use_split_qkv_input": True}, {"use_hook_mlp_in": True}]
TEXTS = ["the cat [MASK]", "a dog ran the cat sat"]


def load(model, **options) -> HookedEncoder:
    return HookedEncoder.from_pretrained("tiny", hf_model=model, verbose=False, **options)


# -- against transformers ------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("hidden_act", ["gelu", "relu", "gelu_new"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_transformers(hidden_act, tied):
    changes = {"hidden_act": hidden_act, "tie_word_embeddings": tied}
    want = hf_bert(dtype="float64", **changes)(**hf_inputs()).prediction_logits
    assert want.std() > 0.1
    exact = load(hf_bert(dtype="float64", **changes), dtype=torch.float64)
    assert_close_to(exact(**inputs()), want, name="float64")
    atol = 1e-5 * float(want.abs().max())
    assert_close_to(load(hf_bert(**changes))(**inputs()), want, atol=atol, name="float32")


@torch.no_grad()
def test_every_residual_stream_is_transformers():
    reference = hf_bert("BertModel", dtype="float64")
    want = reference(**hf_inputs(), output_hidden_states=True)
    model = load(reference, dtype="float64")
    _, cache = model.run_with_cache(**inputs(), return_type=None)
    found = [cache["hook_full_embed"], *(cache["normalized_resid_post", n] for n in range(3))]
    for got, state in zip(found, want.hidden_states, strict=True):
        assert_close_to(got, state)
    # The pooler is part of BertModel.
    assert_close_to(model.pooler(found[-1]), want.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("BertForPreTraining", set()),
        ("BertForMaskedLM", {"pooler", "nsp_head"}),
        ("BertForNextSentencePrediction", {"mlm_head", "unembed"}),
        ("BertModel", {"mlm_head", "unembed", "nsp_head"}),
    ],
)
def test_a_head_that_is_not_there_is_never_made_up(name, absent):
    model = load(hf_bert(name))
    assert model.absent_parts == absent
    for key, leaf in model.named_parameters():
        assert bool(leaf.isnan().all()) == (key.split(".")[0] in absent), key
    if "mlm_head" in absent:
        with pytest.raises(WeightsError, match="no weights for mlm_head, unembed"):
            model(inputs()["input"])
        assert model(inputs()["input"], return_type=None) is None
    else:
        want = hf_bert(name)(**hf_inputs())
        want = want.prediction_logits if "PreTraining" in name else want.logits
        assert_close_to(model(**inputs()), want, atol=1e-4)
    assert model.encoder_output(inputs()["input"]).isfinite().all()


def test_an_absent_head_can_be_given():
    model, whole = load(hf_bert("BertModel")), load(hf_bert())
    heads = {k: v for k, v in whole.state_dict().items() if k.startswith(("mlm_head", "unembed"))}
    model.load_state_dict(heads, strict=False)
    assert model.absent_parts == {"nsp_head"}
    assert model(inputs()["input"]).isfinite().all()


def test_folders_load(tmp_path):
    hf_bert().save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path)
    model = HookedEncoder.from_pretrained(str(tmp_path), verbose=False)
    assert model.to_tokens("the cat")[0].tolist() == bert_tokenizer()(["the cat"])["input_ids"]
    for key, leaf in load(hf_bert()).state_dict().items():
        assert torch.equal(leaf, model.state_dict()[key]), key


def test_loading_says_so_and_takes_options(capsys):
    model = HookedEncoder.from_pretrained(
        "tiny", hf_model=hf_bert(), dtype="float64", tokenizer=bert_tokenizer(), device="cpu"
    )
    assert capsys.readouterr().out == "Loaded pretrained model tiny into HookedEncoder\n"
    assert model.cfg.dtype == model.W_E.dtype == torch.float64
    assert model.tokenizer is bert_tokenizer()
    assert model.cfg.eps == 1e-12 and model.cfg.attention_dir == "bidirectional"
    with pytest.raises(ConfigError, match="nonsense"):
        load(hf_bert(), nonsense=1)


def test_the_wrong_class_is_refused():
    with pytest.raises(ConfigError, match="bert model. Use HookedEncoder.from_pretrained"):
        HookedTransformer.from_pretrained("bert-base-cased")
    with pytest.raises(ConfigError, match="bert model. Use HookedEncoder.from_pretrained"):
        HookedTransformer.from_pretrained("tiny", hf_model=hf_bert())
    with pytest.raises(ConfigError, match="gpt2 model. Use HookedTransformer.from_pretrained"):
        HookedEncoder.from_pretrained("gpt2")


# -- against TransformerLens ---------------------------------------------------------------------


def same_caches(want, got):
    assert list(got.keys()) == list(want.keys())
    for key, activation in want.items():
        assert got[key].dtype == activation.dtype, key
        assert_close_to(got[key], activation, name=key)


@pytest.mark.tl
@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(flags) or "plain")
def test_every_hook_is_transformerlens(flags, is_masked):
    theirs, model = pair(**flags)
    given = inputs() if is_masked else {"input": inputs()["input"]}
    want, want_cache = theirs.run_with_cache(**given)
    got, got_cache = model.run_with_cache(**given)
    assert_close_to(got, want, name="hooked logits")
    same_caches(want_cache, got_cache)
    assert list(model.hook_dict) == list(theirs.hook_dict)
    assert_close_to(model(**given), want, name="fused logits")
    with torch.no_grad():
        assert_close_to(model(**given), want, name="fused logits without gradients")
    assert_close_to(model.encoder_output(*given.values()), theirs.encoder_output(*given.values()))


@pytest.mark.tl
def test_loading_is_transformerlens(monkeypatch, capsys):
    import transformer_lens

    config = copy.deepcopy(hf_bert().config)
    config.architectures = ["BertForMaskedLM"]
    # TransformerLens asks the hub for the config of a model that it has in its hands.
    monkeypatch.setattr(
        transformer_lens.loading_from_pretrained.AutoConfig,
        "from_pretrained",
        lambda *args, **kwargs: config,
    )
    options = {"hf_model": hf_bert(), "tokenizer": bert_tokenizer(), "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformer_lens.HookedEncoder.from_pretrained("bert-base-cased", **options)
    want = capsys.readouterr().out.splitlines()[-1]
    model = HookedEncoder.from_pretrained("bert-base-cased", **options)
    assert capsys.readouterr().out.splitlines()[-1] == want
    for key, leaf in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[key], leaf), key
    assert_close_to(model(**inputs()), theirs(**inputs()), atol=5e-5)
    for field in "d_model d_head n_heads d_mlp n_ctx n_layers eps act_fn attention_dir".split():
        assert getattr(model.cfg, field) == getattr(theirs.cfg, field), field


@pytest.mark.tl
def test_state_dicts_go_both_ways():
    theirs, model = pair()
    assert list(model.state_dict()) == list(theirs.state_dict())
    model.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(model.state_dict())
    assert [name for name in theirs.mod_dict if name not in model.mod_dict] == ["mlm_head.act_fn"]


@pytest.mark.tl
def test_weights_as_properties():
    theirs, model = pair()
    for name in WEIGHTS:
        want, got = getattr(theirs, name), getattr(model, name)
        if name in ("QK", "OV"):
            want, got = want.AB, got.AB
        assert_close_to(got, want, name=name)
    assert model.all_head_labels() == theirs.all_head_labels()


@pytest.mark.tl
def test_gradients_are_transformerlens():
    theirs, model = pair()
    gradients = []
    for one in (theirs, model):
        seen = {}
        names = [name for name in one.hook_dict if "hook_z" in name or "resid" in name]

        def keep(gradient, hook, seen=seen):
            seen[hook.name] = gradient.clone()

        with one.hooks(bwd_hooks=[(name, keep) for name in names]):
            one(**inputs()).pow(2).mean().backward()
        seen |= {name: leaf.grad for name, leaf in one.named_parameters() if leaf.grad is not None}
        gradients.append(seen)
    want, got = gradients
    assert set(want) == set(got) and len(got) > 60
    for name, gradient in want.items():
        assert_close_to(got[name], gradient, name=name)


@pytest.mark.tl
def test_hooks_do_what_they_do_in_transformerlens():
    theirs, model = pair()

    def without_head(z, hook):
        z = z.clone()
        z[:, :, 1] = 0
        return z

    hooks = [("blocks.1.attn.hook_z", without_head), ("hook_full_embed", lambda x, hook: 2 * x)]
    want = theirs.run_with_hooks(**inputs(), fwd_hooks=hooks)
    assert_close_to(model.run_with_hooks(**inputs(), fwd_hooks=hooks), want)
    assert not torch.allclose(model(**inputs()), want)


@pytest.mark.tl
def test_text():
    theirs, model = pair(bert_tokenizer())
    for texts in ("the cat", TEXTS, ["the cats " * 20]):
        for truncate in (True, False):
            want = theirs.to_tokens(texts, truncate=truncate)
            got = model.to_tokens(texts, truncate=truncate)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert_close_to(model(TEXTS), theirs(TEXTS))
    assert_close_to(model(TEXTS[0]), theirs(TEXTS[0]))
    types = torch.ones_like(model.to_tokens(TEXTS)[0])
    assert_close_to(model(TEXTS, token_type_ids=types), theirs(TEXTS, token_type_ids=types))


@pytest.mark.tl
def test_predictions():
    theirs, model = pair(bert_tokenizer())
    with torch.no_grad():
        # Whole words, so that decoding all at once joins nothing.
        for one in (theirs, model):
            one.unembed.b_U[5:11] += 100
    for texts in ("the [MASK]", "[MASK] cat [MASK]", TEXTS, ["[MASK]", "a [MASK] ran"], "the cat"):
        want = theirs(texts, return_type="predictions")
        assert model(texts, return_type="predictions") == want
    assert want == ""
    tokens = model.to_tokens("the [MASK] cat [MASK]")[0]
    assert model(tokens, return_type="predictions") == theirs(tokens, return_type="predictions")
    assert model("the [MASK]", return_type=None) is None
    # Pieces of words stay pieces.
    with torch.no_grad():
        model.unembed.b_U[VOCAB.index("##s")] += 1000
    found = model("[MASK] cat [MASK]", return_type="predictions")
    assert found == ["Prediction 0: ##s", "Prediction 1: ##s"]


@pytest.mark.tl
def test_moving_says_the_same(capsys):
    said = []
    for model in pair():
        capsys.readouterr()
        for move in (
            lambda m: m.to("cpu"), lambda m: m.to(torch.float64), lambda m: m.cpu(),
            lambda m: m.to(torch.device("cpu"), print_details=False),
        ):  # fmt: skip
            assert move(model) is model
        assert model.cfg.dtype == model.W_E.dtype == torch.float64 and model.cfg.device == "cpu"
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    for name in ("cuda", "mps"):
        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            for model in pair():
                with warnings.catch_warnings(), pytest.raises((RuntimeError, AssertionError)):
                    warnings.simplefilter("ignore")
                    getattr(model, name)()


@pytest.mark.tl
def test_caches_say_the_same(caplog):
    theirs, model = pair()
    (_, want), (_, got) = (one.run_with_cache(**inputs()) for one in (theirs, model))
    calls = [
        ("accumulated_resid", {}), ("accumulated_resid", {"incl_mid": True, "layer": 2}),
        ("decompose_resid", {}), ("stack_activation", {"activation_name": "pattern"}),
        ("stack_head_results", {"layer": 2, "incl_remainder": True}),
        ("stack_neuron_results", {"layer": 1, "incl_remainder": True}),
    ]  # fmt: skip
    for method, arguments in calls:
        assert_close_to(
            getattr(got, method)(**arguments), getattr(want, method)(**arguments), atol=5e-5
        )
    assert "normalises the residual stream after every sublayer" in caplog.text
    with pytest.raises(AttributeError, match="no sum of what its components wrote"):
        got.get_full_resid_decomposition(expand_neurons=False)


def test_the_stream_before_a_layer_is_not_the_sum_before_its_norm():
    names = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]
    _, cache = ours().run_with_cache(**inputs(), names_filter=names)
    with pytest.raises(HookNameError, match="hook_resid_pre"):
        cache.accumulated_resid(layer=1)


@pytest.mark.tl
def test_patching_functions_are_transformerlens():
    import transformer_lens.patching as reference

    theirs, model = pair()
    clean = inputs()["input"][:2]
    corrupted = (clean + 3) % D_VOCAB
    caches = [one.run_with_cache(clean)[1] for one in (theirs, model)]

    def metric(logits):
        return (logits[:, 2, 7] - logits[:, 2, 9]).mean()

    for name, function in {
        "get_act_patch_block_every": get_act_patch_block_every,
        "get_act_patch_attn_head_all_pos_every": every_head,
    }.items():
        want = getattr(reference, name)(theirs, corrupted, caches[0], metric)
        assert_close_to(function(model, corrupted, caches[1], metric), want, atol=5e-5, name=name)

    def setter(corrupted_activation, index, clean_activation):
        corrupted_activation[:, index[1]] = clean_activation[:, index[1]]
        return corrupted_activation

    arguments = (metric, setter, "normalized_resid_post", ("layer", "pos"))
    want = reference.generic_activation_patch(theirs, corrupted, caches[0], *arguments)
    got = generic_activation_patch(model, corrupted, caches[1], *arguments)
    assert_close_to(got, want, atol=5e-5)


def test_sweeps_are_refused():
    # What `sweep` and `plan` call first.
    with pytest.raises(SweepError, match="HookedEncoder cannot be swept"):
        check_patchable(ours())


# -- padding, fused and hooked -------------------------------------------------------------------


@pytest.mark.parametrize("is_hooked", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_text_does_not_see_its_padding(is_hooked, gradients):
    model, given = ours(), inputs()
    look = [(lambda name: name.endswith("hook_pattern"), lambda pattern, hook: None)]
    with torch.set_grad_enabled(gradients):
        with model.hooks(fwd_hooks=look if is_hooked else []):
            batched = model(**given)
            for row, length in enumerate(given["one_zero_attention_mask"].sum(1).tolist()):
                alone = model(
                    given["input"][row : row + 1, :length],
                    token_type_ids=given["token_type_ids"][row : row + 1, :length],
                )
                assert_close_to(batched[row : row + 1, :length], alone, name=f"row {row}")
            other = given["input"].where(given["one_zero_attention_mask"] == 1, 6)
            assert not torch.equal(other, given["input"])
            seen = given["one_zero_attention_mask"].bool()
            again = model(**{**given, "input": other})
    assert_close_to(again[seen], batched[seen], name="other tokens as padding")


@pytest.mark.parametrize("place", ["hook_pattern", "hook_attn_scores", "hook_q", "ln1.hook_scale"])
def test_looking_changes_nothing(place):
    model = ours()
    plain = model(**inputs())
    hooks = [(lambda name: name.endswith(place), lambda activation, hook: None)]
    with model.hooks(fwd_hooks=hooks):
        assert_close_to(model(**inputs()), plain)


def test_a_text_that_is_all_padding_gives_numbers():
    model, given = ours(), inputs()
    given["one_zero_attention_mask"][1] = 0
    fused = model(**given)
    hooked, _ = model.run_with_cache(**given)
    assert fused.isfinite().all()
    assert_close_to(hooked, fused)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(dtype):
    model, given = ours(), inputs()
    want = model(**given)
    given["one_zero_attention_mask"] = given["one_zero_attention_mask"].to(dtype)
    assert torch.equal(model(**given), want)
    if dtype.is_floating_point:
        # Zero alone is padding, as in TransformerLens.
        given["one_zero_attention_mask"] = given["one_zero_attention_mask"] * 0.5
        assert torch.equal(model(**given), want)


def test_attention_looks_both_ways_and_causal_configs_do_not():
    tokens = inputs()["input"][:1]
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % D_VOCAB
    for direction, is_causal in (("bidirectional", False), ("causal", True)):
        model = ours(attention_dir=direction)
        same = torch.equal(model(tokens)[0, 0], model(changed)[0, 0])
        assert same == is_causal


# -- the rest ------------------------------------------------------------------------------------


def test_a_place_that_is_switched_off():
    model = ours()
    with pytest.raises(FlagError, match="use_attn_result is False"):
        model.add_hook("blocks.0.attn.hook_result", lambda result, hook: None)
    _, cache = model.run_with_cache(**inputs(), names_filter="blocks.0.attn.hook_result")
    assert cache["result", 0].shape == (3, 11, 4, 32) and not model.cfg.use_attn_result
    with pytest.raises(HookNameError, match="Nearest: 'blocks.0.hook_attn_out'"):
        model.run_with_cache(**inputs(), names_filter="blocks.0.hook_attn_ou")


def test_positions_are_sliced():
    _, cache = ours().run_with_cache(**inputs(), pos_slice=[2, 3])
    assert cache["z", 0].shape == (3, 2, 4, 8) and cache["hook_full_embed"].shape == (3, 2, 32)


def test_copies_and_pickles():
    model = ours()
    want = model(**inputs())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (
            torch.equal(other(**inputs()), want)
            and other.hook_dict.keys() == model.hook_dict.keys()
        )


def test_initial_weights_follow_the_seed():
    fresh = [
        HookedEncoder({**ours().cfg.to_dict(), "n_params": None, "seed": s}) for s in (1, 1, 2)
    ]
    a, b, c = (dict(model.named_parameters()) for model in fresh)
    for name in a:
        assert torch.equal(a[name], b[name])
        matrix = name.rsplit(".", 1)[-1].startswith("W")
        assert matrix != torch.equal(a[name], c[name]), name
        assert not matrix or 0.05 < float(a[name].detach().std()) < 0.4, name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positional_embedding_type": "rotary"}, "'standard'"),
        ({"d_vocab": -1}, "d_vocab is not set"),
        (
            {
                "positional_embedding_type": "rotary",
                "rotary_dim": 4,
                "encoder": EncoderConfig(pre_norm=True),
                "longrope_short_factor": [1.0, 2.0],
                "longrope_long_factor": [1.0, 4.0],
            },
            "an encoder counts positions over padding",
        ),
    ],
)
def test_configs_that_cannot_be_built(changes, words):
    with pytest.raises(ConfigError, match=words):
        ours(**changes)


def test_a_name_is_not_a_config():
    with pytest.raises(ConfigError, match=r"HookedEncoder.from_pretrained\('bert-base-cased'\)"):
        HookedEncoder("bert-base-cased")


def test_d_vocab_of_a_tokenizer():
    model = ours(bert_tokenizer(), d_vocab=-1)
    assert model.cfg.d_vocab == model.cfg.d_vocab_out == len(VOCAB)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m("the cat"), TokenError, "needs a tokenizer"),
        (lambda m: m.to_tokens("the cat"), AssertionError, "needs a tokenizer"),
        (lambda m: m(**inputs(), return_type="predictions"), TokenError, "mask token"),
        (lambda m: m(**inputs(), return_type="logit"), ValueError, "'logits', 'predictions'"),
        (lambda m: m.encoder_output(inputs()["input"][0]), ShapeError, r"\[batch, pos\]"),
        (lambda m: m(**{**inputs(), "token_type_ids": torch.zeros(3, 4, dtype=torch.long)}),
         ShapeError, r"token_type_ids has shape \[3, 4\]"),
    ],
)  # fmt: skip
def test_mistakes_are_told(call, error, words):
    with pytest.raises(error, match=words):
        call(ours())
