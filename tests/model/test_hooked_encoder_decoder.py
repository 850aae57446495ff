"""`HookedEncoderDecoder` against transformers, TransformerLens, and itself on its other paths."""

import copy
import inspect
import logging
import pickle

import pytest
import torch

from fastlens import ActivationCache, HookedTransformer, patching
from fastlens.errors import ConfigError, FlagError, HookNameError, ShapeError, TokenError
from fastlens.hooks.derived import Derived
from fastlens.model.hooked_encoder_decoder import HookedEncoderDecoder
from fastlens.patching.model import PatchableModel, check_patchable
from tests.close import assert_close_to
from tests.t5 import (
    CASES,
    CONFIG,
    EOS,
    PAD,
    VOCAB,
    batch,
    hf_t5,
    ours_t5,
    randomise,
    t5_tokenizer,
    theirs_t5,
)

_CLASS = "transformer_lens.HookedEncoderDecoder.HookedEncoderDecoder"
COMPARED = [
    f"{_CLASS}.{name}"
    for name in """forward to_tokens generate run_with_cache from_pretrained state_dict hook_dict
    all_head_labels W_E W_U b_U W_Q W_K W_V W_O W_in W_out b_Q b_K b_V b_O b_in b_out QK OV W_pos
    """.split()
]
# Made in TransformerLens, where they never fire.
NEW_PLACES = {"encoder.0.attn.rel_pos_hook", "decoder.0.attn.rel_pos_hook"}


def load(case="t5", dtype=torch.float32, tokenizer=None):
    return HookedEncoderDecoder.from_pretrained(
        "tiny", hf_model=hf_t5(case), dtype=dtype, device="cpu", tokenizer=tokenizer, verbose=False
    )


def hf_logits(model, inputs):
    with torch.no_grad():
        return model(
            input_ids=inputs["input"],
            attention_mask=inputs.get("one_zero_attention_mask"),
            decoder_input_ids=inputs["decoder_input"],
        ).logits


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers' T5 squares in float32 whatever its dtype; the reference must not."""
    from transformers.models.t5 import modeling_t5

    def forward(self, x):
        return (
            self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", forward)


# -- transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("case", list(CASES))
def test_logits_are_transformers(case, masked, exact_norms):
    inputs = batch()
    if not masked:
        del inputs["one_zero_attention_mask"]
    truth = hf_logits(copy.deepcopy(hf_t5(case)).double(), inputs)
    assert_close_to(load(case, torch.float64)(**inputs), truth, atol=1e-10)
    assert_close_to(load(case)(**inputs), truth, atol=1e-5 * max(1.0, float(truth.abs().max())))
    assert_close_to(load(case)(**inputs), hf_logits(hf_t5(case), inputs), atol=1e-4)


def test_a_folder_loads_with_its_tokenizer(tmp_path, capsys):
    hf_t5().save_pretrained(tmp_path)
    t5_tokenizer().save_pretrained(tmp_path)
    model = HookedEncoderDecoder.from_pretrained(tmp_path, device="cpu")
    assert "HookedEncoderDecoder" in capsys.readouterr().out
    assert_close_to(model(**batch()), load()(**batch()))
    assert model.to_tokens("w1 w2")[0].tolist() == [[4, 5, EOS]]
    assert model.cfg.decoder_start_token_id == PAD and model.cfg.act_fn == "relu"


@pytest.mark.parametrize("case", ["t5", "v1.1"])
def test_greedy_text_is_transformers(case):
    inputs = batch(n_pos=12)
    del inputs["decoder_input"]
    theirs = hf_t5(case).generate(
        inputs["input"],
        attention_mask=inputs["one_zero_attention_mask"],
        do_sample=False,
        max_new_tokens=9,
        decoder_start_token_id=PAD,
    )
    ours = load(case, tokenizer=t5_tokenizer()).generate(
        **inputs, do_sample=False, max_new_tokens=9, verbose=False
    )
    # transformers fills finished rows with pad, TransformerLens with EOS.
    ended = (ours == EOS).cumsum(1) > 1
    assert torch.equal(ours.masked_fill(ended, PAD), theirs)


def test_another_class_is_pointed_to():
    with pytest.raises(ConfigError, match=r"Use HookedEncoderDecoder\.from_pretrained"):
        HookedTransformer.from_pretrained("tiny", hf_model=hf_t5(), device="cpu")
    with pytest.raises(ConfigError, match="relative_positional_bias"):
        HookedEncoderDecoder.from_pretrained("toy-induction", device="cpu")
    with pytest.raises(ConfigError, match="use HookedEncoderDecoder"):
        HookedTransformer(dict(CONFIG))


# -- TransformerLens -----------------------------------------------------------------------------


@pytest.fixture
def pair():
    """Ours and TransformerLens' model of equal weights, with the tokenizer."""
    pytest.importorskip("transformer_lens")
    ours, theirs = ours_t5(t5_tokenizer()), theirs_t5(t5_tokenizer())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def without_repeats(events):
    """ln1's hooks fire three times in TransformerLens, and once here."""
    return list(dict.fromkeys(events))


@pytest.mark.tl
def test_state_dicts_go_both_ways(pair):
    ours, theirs = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    randomise(theirs, 0.1)
    ours.load_state_dict(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.tl
@pytest.mark.parametrize("masked", [True, False])
def test_every_activation_is_transformer_lens(pair, masked):
    inputs = batch()
    if not masked:
        del inputs["one_zero_attention_mask"]
    (ours, cache), (theirs, their_cache) = (m.run_with_cache(**inputs) for m in pair)
    assert_close_to(ours, theirs)
    assert set(cache) - set(their_cache) == NEW_PLACES
    assert not set(their_cache) - set(cache)
    for name in their_cache:
        assert cache[name].shape == their_cache[name].shape, name
        assert cache[name].dtype == their_cache[name].dtype, name
        assert_close_to(cache[name], their_cache[name], name=name)


@pytest.mark.tl
@pytest.mark.parametrize("flag", [None, "use_attn_result", "use_hook_mlp_in"])
def test_hooks_fire_in_transformer_lens_order(pair, flag):
    orders = []
    for model in pair:
        if flag is not None:
            setattr(model.cfg, flag, True)
        seen = []
        hooks = [(lambda name: True, lambda x, hook, seen=seen: seen.append((hook.name, x.shape)))]
        model.run_with_hooks(**batch(), fwd_hooks=hooks)
        orders.append(without_repeats(e for e in seen if e[0] not in NEW_PLACES))
    assert orders[0] == orders[1]
    assert list(pair[0].hook_dict) == list(pair[1].hook_dict)


@pytest.mark.tl
@pytest.mark.parametrize(
    "place",
    ["hook_embed", "encoder.1.attn.hook_z", "encoder.0.attn.hook_pattern", "encoder_final_ln"
     ".hook_normalized", "decoder.0.hook_resid_pre", "decoder.1.cross_attn.hook_pattern",
     "decoder.0.cross_attn.hook_v", "decoder.1.attn.hook_attn_scores", "decoder.0.mlp.hook_post",
     "decoder.1.hook_resid_mid_cross", "decoder.0.hook_cross_attn_out", "unembed.hook_in"],
)  # fmt: skip
def test_edits_are_transformer_lens(pair, place):
    def edit(x, hook):
        return x * 0.5 + 0.1

    plain = pair[0](**batch())
    edited = [m.run_with_hooks(**batch(), fwd_hooks=[(place, edit)]) for m in pair]
    assert_close_to(edited[0], edited[1])
    assert (edited[0] - plain).abs().max() > 1e-3


@pytest.mark.tl
def test_text_is_transformer_lens(pair):
    ours, theirs = pair
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    for input in ("w1 w2", texts, " ".join(["w1"] * 60)):
        for truncate in (True, False):
            for mine, its in zip(
                *(m.to_tokens(input, truncate=truncate) for m in pair), strict=True
            ):
                assert torch.equal(mine, its)
        assert_close_to(ours(input), theirs(input))
    decoder = torch.tensor([[PAD, 5], [PAD, 6], [PAD, 7]])
    assert_close_to(ours(texts, decoder), theirs(texts, decoder))
    assert ours("w1", return_type=None) is theirs("w1", return_type=None) is None


@pytest.mark.tl
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"top_k": 5},
        {"top_p": 0.8, "temperature": 0.7},
        {"freq_penalty": 1.5, "stop_at_eos": False},
        {"do_sample": False, "eos_token_id": [5, 31]},
        {"do_sample": False, "return_type": "tensor"},
    ],
    ids=str,
)
def test_generated_text_is_transformer_lens(pair, options):
    tokens = batch(n_pos=9)
    for inputs in ({"input": "w1 w2 w3"}, {k: tokens[k] for k in tokens if "decoder" not in k}):
        made = []
        for model in pair:
            torch.manual_seed(3)
            made.append(model.generate(**inputs, **options, max_new_tokens=12, verbose=False))
        if isinstance(made[1], str):
            assert made[0] == made[1]
        else:
            assert torch.equal(made[0], made[1])


@pytest.mark.tl
def test_weights_are_transformer_lens(pair):
    ours, theirs = pair
    for name in "W_E W_U b_U W_Q W_K W_V W_O W_in W_out b_Q b_K b_V b_O b_in b_out".split():
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("QK", "OV"):
        assert_close_to(getattr(ours, name).AB, getattr(theirs, name).AB)
    assert ours.all_head_labels() == theirs.all_head_labels()
    for model in pair:
        with pytest.raises(NotImplementedError):
            _ = model.W_pos


@pytest.mark.tl
def test_nothing_public_is_missing(pair):
    cls = type(pair[1])
    for name in dir(cls):
        if name.startswith("_"):
            continue
        assert hasattr(HookedEncoderDecoder, name), name
        method = getattr(cls, name)
        if name in vars(cls) and callable(method):
            theirs = inspect.signature(method).parameters
            found = inspect.signature(getattr(HookedEncoderDecoder, name)).parameters
            # What TransformerLens does not have is our own, and named.
            new = {one for one in found if found[one].kind is inspect.Parameter.KEYWORD_ONLY}
            ours = {one: p for one, p in found.items() if one in theirs or one not in new}
            assert list(ours) == list(theirs) or name == "cuda", name
            assert [p.default for p in ours.values()] == [p.default for p in theirs.values()], name


# -- its own paths -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["t5", "v1.1"])
def test_fused_is_hooked(case):
    model, inputs = load(case, torch.float64), batch()
    # A row that is all padding attends evenly, on both ways.
    inputs["one_zero_attention_mask"][2] = 0
    seen = []
    hooked = model.run_with_hooks(
        **inputs, fwd_hooks=[(lambda name: True, lambda x, hook: seen.append(hook.name))]
    )
    assert set(seen) == {n for n in model.hook_dict if not model.is_switched_off(n)}
    assert_close_to(model(**inputs), hooked)
    with torch.no_grad():
        assert_close_to(model(**inputs), hooked)


def test_padding_and_batch_change_no_row():
    model, inputs = load(), batch()
    together = model(**inputs)
    for row, keep in enumerate((slice(0, 20), slice(4, 30), slice(0, 30))):
        alone = model(inputs["input"][row : row + 1, keep], inputs["decoder_input"][row : row + 1])
        assert_close_to(together[row], alone[0])
    padded = torch.nn.functional.pad(inputs["input"], (5, 6), value=7)
    mask = torch.nn.functional.pad(inputs["one_zero_attention_mask"], (5, 6))
    assert_close_to(model(padded, inputs["decoder_input"], one_zero_attention_mask=mask), together)
    as_bool = model(padded, inputs["decoder_input"], one_zero_attention_mask=mask.bool())
    assert_close_to(as_bool, together)


def test_a_decoder_position_depends_on_none_later():
    model, inputs = load(), batch()
    cut = {**inputs, "decoder_input": inputs["decoder_input"][:, :9]}
    assert_close_to(model(**inputs)[:, :9], model(**cut))


def test_cached_steps_are_the_whole():
    model, inputs = load(tokenizer=t5_tokenizer()), batch(n_pos=12)
    del inputs["decoder_input"]
    seen = []
    for options in ({"do_sample": False}, {"top_k": 9}, {"do_sample": False, "max_new_tokens": 0}):
        options = {"max_new_tokens": 15, "stop_at_eos": False, "verbose": False, **options}
        torch.manual_seed(0)
        steps = model.generate(**inputs, **options)
        model.add_hook("decoder.0.hook_resid_pre", lambda x, hook: seen.append(x.shape[1]))
        torch.manual_seed(0)
        whole = model.generate(**inputs, **options)
        model.reset_hooks()
        assert torch.equal(steps, whole)
    assert seen[:3] == [1, 2, 3]


def test_what_replaces_a_part_is_run_whole():
    model, inputs = load(tokenizer=t5_tokenizer()), batch(n_pos=6)
    del inputs["decoder_input"]
    assert not model._is_watched()
    block = model.decoder[1]
    lengths = []
    forward = block.mlp.forward
    block.mlp.forward = lambda x: lengths.append(x.shape[1]) or forward(x)
    assert model._is_watched()
    model.generate(**inputs, max_new_tokens=3, stop_at_eos=False, verbose=False)
    assert lengths == [1, 2, 3]
    del block.mlp.forward
    handle = model.unembed.register_forward_pre_hook(lambda module, args: None)
    assert model._is_watched()
    handle.remove()

    class Mine(HookedEncoderDecoder):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    assert Mine(dict(CONFIG))._is_watched() and not model._is_watched()


def test_hooks_act_on_generated_text():
    model = load(tokenizer=t5_tokenizer())
    with model.hooks(
        [("unembed.hook_out", lambda x, hook: x.index_fill(-1, torch.tensor(9), 99.0))]
    ):
        made = model.generate("w1", max_new_tokens=3, do_sample=False, verbose=False)
    assert made == "w6 w6 w6"


def test_a_list_of_texts_gives_what_each_gives():
    model = load(tokenizer=t5_tokenizer())
    options = {"do_sample": False, "max_new_tokens": 8, "verbose": False}
    texts = ["w1 w2 w3 w4", "w9"]
    assert model.generate(texts, **options) == [model.generate(text, **options) for text in texts]
    tokens, mask = model.to_tokens(texts)
    made = model.generate(tokens, mask, **options, return_type="str")
    assert made == model.generate(texts, **options)


def test_generate_leaves_the_model_as_it_was():
    model = load(tokenizer=t5_tokenizer()).train()
    model.generate("w1", max_new_tokens=1, verbose=False)
    assert model.training and model.decoder[0].training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model, inputs = load(dtype=dtype), batch()
    logits, cache = model.run_with_cache(**inputs)
    assert logits.dtype == dtype and cache["encoder.0.attn.hook_q"].dtype == dtype
    assert_close_to(logits, load()(**inputs), atol={torch.bfloat16: 0.1}.get(dtype, 1e-5))
    assert_close_to(model(**inputs), logits, atol={torch.bfloat16: 0.1}.get(dtype, 1e-9))


def test_gradients_reach_every_weight_alike():
    gradients = []
    for looks in (False, True):
        model = load(dtype=torch.float64)
        if looks:
            model.add_hook(lambda name: "pattern" in name, lambda x, hook: None)
        model(**batch()).log_softmax(-1)[..., 5].sum().backward()
        gradients.append({name: leaf.grad for name, leaf in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close_to(gradients[1][name], gradient, atol=1e-7, name=name)
        # What a bias adds to all keys alike, the softmax takes away.
        assert gradient.abs().max() > 1e-3 or name.endswith("b_K"), name


def test_copies_compute_the_same():
    model, inputs = load(), batch()
    model.tokenizer = None
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close_to(copied(**inputs), model(**inputs))


# -- caches, hooks, flags ------------------------------------------------------------------------


def test_a_cache_knows_its_places():
    model = load()
    logits, cache = model.run_with_cache(**batch(), names_filter=lambda name: "resid_post" in name)
    assert isinstance(cache, ActivationCache)
    assert set(cache) == {
        f"{s}.{n}.hook_resid_post" for s in ("encoder", "decoder") for n in (0, 1)
    }
    _, plain = model.run_with_cache(**batch(), return_cache_object=False)
    assert type(plain) is dict
    with pytest.raises(HookNameError, match=r"Nearest: .*decoder\.1"):
        model.run_with_cache(**batch(), names_filter="decoder.1.cross_atn.hook_q")
    with pytest.raises(HookNameError):
        cache.decompose_resid()


def test_one_prompt_without_its_batch_axis():
    model = load()
    tokens, decoder = batch()["input"][:1], batch()["decoder_input"][:1]
    _, cache = model.run_with_cache(tokens, decoder, remove_batch_dim=True, pos_slice=-1)
    assert cache["decoder.1.hook_resid_post"].shape == (1, 16)
    assert cache["decoder.0.cross_attn.hook_pattern"].shape == (4, 1, 30)
    assert cache["encoder.0.attn.rel_pos_hook"].shape == (1, 4, 1, 30)


def test_the_bias_of_a_stack_can_be_edited():
    """TransformerLens makes this hook point and never calls it."""
    model, inputs = load(), batch()
    seen = []
    model.run_with_hooks(
        **inputs, fwd_hooks=[("encoder.0.attn.rel_pos_hook", lambda x, hook: seen.append(x))]
    )
    assert seen[0].shape == (1, 4, 30, 30)
    without = model.run_with_hooks(
        **inputs, fwd_hooks=[(name, lambda x, hook: x * 0) for name in NEW_PLACES]
    )
    for stack in (model.encoder, model.decoder):
        torch.nn.init.zeros_(stack[0].attn.rel_pos_bias.weight)
    assert_close_to(model(**inputs), without)


@pytest.mark.parametrize(
    ("place", "flag"),
    [("decoder.1.hook_cross_attn_in", "use_attn_in"), ("encoder.0.hook_attn_in", "use_attn_in"),
     ("encoder.1.hook_q_input", "use_split_qkv_input"),
     ("decoder.0.hook_mlp_in", "use_hook_mlp_in"),
     ("decoder.0.cross_attn.hook_result", "use_attn_result")],
)  # fmt: skip
def test_places_behind_a_flag(place, flag):
    model, inputs = load(), batch()
    with pytest.raises(FlagError, match=flag):
        model.add_hook(place, lambda x, hook: None)
    logits, cache = model.run_with_cache(**inputs, names_filter=place)
    assert list(cache) == [place] and not getattr(model.cfg, flag)
    assert_close_to(logits, model(**inputs))
    getattr(model, f"set_{flag}")(True)
    assert place in model.run_with_cache(**inputs)[1]


def test_sweeps_refuse_it():
    model = load()
    assert not isinstance(model, PatchableModel)
    with pytest.raises(ValueError, match="HookedEncoderDecoder cannot be swept"):
        check_patchable(model)
    # Outside tests no annotation is checked: the sentence above comes first of all.
    unchecked = inspect.unwrap(patching.sweep)
    with pytest.raises(Exception, match="HookedEncoderDecoder"):
        unchecked(model, "w1", "w2", metric=lambda logits: logits[:, -1, 0])


def test_moving_keeps_the_config_in_step():
    model = load()
    assert model.to(torch.float64) is model and model.cfg.dtype == torch.float64
    assert model.float().cfg.dtype == torch.float32
    assert model.to("cpu", torch.float64).cfg.dtype == torch.float64
    assert model.to(dtype=torch.float32).cfg.dtype == model.W_E.dtype == torch.float32
    assert model.cpu().cfg.device == "cpu"
    assert_close_to(model(**batch()), load()(**batch()))


# -- what is refused -----------------------------------------------------------------------------


def test_configs_that_cannot_be_built():
    with pytest.raises(ConfigError, match="from_pretrained"):
        HookedEncoderDecoder("t5-small")
    with pytest.raises(ConfigError, match="d_vocab is not set"):
        HookedEncoderDecoder({**CONFIG, "d_vocab": -1})
    with pytest.raises(ConfigError, match="relative_positional_bias"):
        HookedEncoderDecoder({**CONFIG, "positional_embedding_type": "standard"})
    model = HookedEncoderDecoder({**CONFIG, "d_vocab": -1}, t5_tokenizer())
    assert model.cfg.d_vocab == model.cfg.d_vocab_out == VOCAB


def test_a_seed_gives_weights_and_other_arguments_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        first = HookedEncoderDecoder({**CONFIG, "seed": 5}, hooked=True)
    assert "ignores hooked" in caplog.text
    second = HookedEncoderDecoder({**CONFIG, "seed": 5})
    assert torch.equal(first.W_Q, second.W_Q) and bool(first.W_Q.isfinite().all())
    assert bool(first(**batch()).isfinite().all())


def test_inputs_that_do_not_fit():
    model, inputs = load(), batch()
    with pytest.raises(ValueError, match="without decoder_input"):
        model(inputs["input"])
    with pytest.raises(TokenError, match="needs a tokenizer"):
        model("w1")
    with pytest.raises(ShapeError, match="one_zero_attention_mask"):
        model(**{**inputs, "one_zero_attention_mask": inputs["one_zero_attention_mask"][:, 1:]})
    with pytest.raises(ShapeError, match="decoder_input must be"):
        model(**{**inputs, "decoder_input": inputs["decoder_input"][:1]})
    with pytest.raises(ShapeError, match="integer tokens"):
        model._input(torch.randn(1, 3), None)
    with pytest.raises(ValueError, match="'logits' or None"):
        model(**inputs, return_type="loss")
    with pytest.raises(TokenError, match="return_type='string'"):
        model.generate(inputs["input"], return_type="string")
    with pytest.raises(TokenError, match="EOS"):
        model.generate(inputs["input"], verbose=False)


def test_the_start_of_the_decoder():
    assert load()._start(2).tolist() == [[PAD], [PAD]]
    with pytest.raises(TokenError, match="decoder_start_token_id"):
        ours_t5()._start(1)
    assert ours_t5(decoder_start_token_id=7)._start(1).tolist() == [[7]]
    # A checkpoint's start token is not always its tokenizer's pad token.
    assert ours_t5(t5_tokenizer(), decoder_start_token_id=7)._start(1).tolist() == [[7]]
    assert ours_t5(t5_tokenizer())._start(1).tolist() == [[PAD]]


def test_padding_that_is_not_masked_is_noticed(caplog):
    model, inputs = load(tokenizer=t5_tokenizer()), batch()
    del inputs["one_zero_attention_mask"]
    with caplog.at_level(logging.WARNING):
        model(**inputs)
        assert not caplog.text
        inputs["input"][0, -3:] = PAD
        model(**inputs)
    assert "one_zero_attention_mask" in caplog.text


def test_a_tokenizer_that_cannot_pad():
    tokenizer = copy.deepcopy(t5_tokenizer())
    tokenizer.pad_token = None
    model = load(tokenizer=tokenizer)
    assert model.to_tokens("w1 w2")[0].shape == (1, 3)
    with pytest.raises(TokenError, match="no pad token"):
        model.to_tokens(["w1", "w2 w3"])


def test_attention_stays_fused_in_a_cache_and_patterns_are_derived():
    model = load(dtype=torch.float64)
    _, cache = model.run_with_cache(**batch())
    _, stored = model.run_with_cache(**batch(), lazy=False)
    entries = dict.items(cache.cache_dict)
    lazy = {name for name, entry in entries if isinstance(entry, Derived)}
    assert any("encoder" in name and name.endswith("hook_pattern") for name in lazy)
    for name in stored:
        assert_close_to(cache[name], stored[name], atol=1e-12, rtol=1e-12, name=name)
