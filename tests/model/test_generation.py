import functools
import inspect
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlens.errors import ShapeError, TokenError
from fastlens.model.hooked_transformer import HookedTransformer
from tests.close import assert_close_to
from tests.configs import TINY_CONFIGS, tiny
from tests.fixtures_tokens import gpt2_like, llama_like, pad_is_eos, t5_like

COMPARED = [
    "transformer_lens.HookedTransformer.HookedTransformer.generate",
    "transformer_lens.HookedTransformer.HookedTransformer.generate_stream",
]

PROMPTS = ["the cat in the can", "Hi", " an"]
N_NEW = 5


def model_of(name, tokenizer=gpt2_like, **changes):
    """A tiny model whose weights are large enough that what it says depends on what was said."""
    cfg = tiny(name, **{"d_vocab": 271, "init_weights": False, **changes})
    model = HookedTransformer(cfg, tokenizer=None if tokenizer is None else tokenizer())
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in model.named_parameters():
        centre = 1.0 if parameter_name.endswith(".w") else 0.0
        scale = 1.0 if parameter_name in ("embed.W_E", "unembed.W_U") else 0.2
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(centre + scale * noise)
    return model


def greedy(model, prompt, **options):
    """The new tokens only, as lists."""
    options = {"max_new_tokens": N_NEW, "stop_at_eos": False, **options}
    tokens = model.generate(prompt, do_sample=False, verbose=False, return_type="tokens", **options)
    return tokens[:, -options["max_new_tokens"] :].tolist()


@pytest.fixture(scope="module")
def gpt2():
    return model_of("gpt2")


# -- the same, however it is run -----------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_batch_says_what_each_prompt_alone_says_with_and_without_cache(name):
    model = model_of(name)
    alone = [greedy(model, prompt)[0] for prompt in PROMPTS]
    assert len({tuple(row) for row in alone}) > 1
    assert greedy(model, PROMPTS) == alone
    assert greedy(model, PROMPTS, use_past_kv_cache=False) == alone
    assert [greedy(model, p, use_past_kv_cache=False)[0] for p in PROMPTS] == alone


@pytest.mark.parametrize("make", [gpt2_like, llama_like, pad_is_eos, t5_like])
@pytest.mark.parametrize(
    ("name", "prepend_bos"), [("gpt2", True), ("llama", True), ("gpt2", False)]
)
def test_any_tokenizer_and_any_padding_of_the_tokens(name, prepend_bos, make):
    model = model_of(name, make, n_layers=1)
    options = {"prepend_bos": prepend_bos, "max_new_tokens": 3}
    alone = [greedy(model, prompt, **options)[0] for prompt in PROMPTS]
    assert greedy(model, PROMPTS, **options) == alone
    left = model.to_tokens(PROMPTS, prepend_bos=prepend_bos, padding_side="left")
    right = model.to_tokens(PROMPTS, prepend_bos=prepend_bos, padding_side="right")
    assert greedy(model, left, padding_side="left", **options) == alone
    # Left padding is seen for what it is without being told.
    assert greedy(model, left, use_past_kv_cache=False, **options) == alone
    assert greedy(model, right, **options) == alone
    assert greedy(model, right, use_past_kv_cache=False, **options) == alone


def test_a_lone_bos_is_text(gpt2):
    with_text = gpt2.tokenizer.bos_token_id
    full = gpt2(torch.tensor([[with_text]]), attention_mask=torch.ones(1, 1, dtype=torch.long))
    expected = full[0, -1].argmax().item()
    assert greedy(gpt2, "", max_new_tokens=1) == [[expected]]
    assert greedy(gpt2, torch.full((3, 1), with_text), max_new_tokens=1) == [[expected]] * 3
    assert greedy(gpt2, ["", PROMPTS[0]])[0] == greedy(gpt2, "")[0]


def test_greedy_follows_the_forward():
    model = model_of("softcap")
    tokens = model.to_tokens(PROMPTS[0])
    for _ in range(N_NEW):
        logits = model(tokens)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert (
        model.generate(
            PROMPTS[0],
            N_NEW,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            return_type="tokens",
        ).tolist()
        == tokens.tolist()
    )


def test_embeddings_say_what_their_tokens_say(gpt2):
    tokens = gpt2.to_tokens(PROMPTS[0])
    for cache in (True, False):
        new = greedy(gpt2, gpt2.embed(tokens), use_past_kv_cache=cache)
        assert new == greedy(gpt2, tokens)


# -- against Hugging Face ------------------------------------------------------------------------


def gpt2_pair():
    """A tiny random GPT-2 of transformers and ours with its weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=271,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=268,
        eos_token_id=268,
    )
    hf = GPT2LMHeadModel(config).eval()
    return hf, ours_of(hf, gpt2_like())


def llama_pair():
    """A tiny random Llama of transformers, with grouped heads, and ours with its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=271,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    hf = LlamaForCausalLM(config).eval()
    return hf, ours_of(hf, llama_like())


def ours_of(hf, tokenizer):
    return HookedTransformer.from_pretrained_no_processing(
        hf.config.model_type, hf_model=hf, tokenizer=tokenizer, device="cpu"
    )


@pytest.mark.parametrize("pair", [gpt2_pair, llama_pair])
def test_greedy_equals_hugging_face(pair):
    hf, model = pair()
    tokens = model.to_tokens(PROMPTS, padding_side="left")
    mask = model._tokenize(PROMPTS, None, "left")[1]
    assert_close_to(model(tokens[:1]), hf(tokens[:1]).logits, atol=2e-5)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    pad = model.tokenizer.pad_token_id
    theirs = hf.generate(tokens, attention_mask=mask, pad_token_id=pad, **options)[:, -20:].tolist()
    alone = [
        hf.generate(row[kept][None], attention_mask=row.new_ones(1, int(kept.sum())), **options)
        for row, kept in zip(tokens, mask.bool(), strict=True)
    ]
    assert [row[0, -20:].tolist() for row in alone] == theirs
    assert greedy(model, PROMPTS, max_new_tokens=20) == theirs
    assert greedy(model, PROMPTS, max_new_tokens=20, use_past_kv_cache=False) == theirs


def test_stopping_equals_hugging_face():
    hf, model = gpt2_pair()
    tokens = model.to_tokens(PROMPTS, padding_side="left")
    mask = model._tokenize(PROMPTS, None, "left")[1]
    said = greedy(model, PROMPTS, max_new_tokens=12)
    ends = [said[0][2], said[1][5], said[2][3]]
    pad = model.tokenizer.eos_token_id
    theirs = hf.generate(
        tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=ends,
        pad_token_id=pad,
    )  # fmt: skip
    ours = model.generate(
        tokens, 12, eos_token_id=ends, do_sample=False, verbose=False, return_type="tokens"
    )
    assert ours.tolist() == theirs.tolist() and ours.shape[1] < tokens.shape[1] + 12


# -- against TransformerLens ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tl_pair():
    """Both libraries' GPT-2-like and Llama-like models with the same weights and tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tl = pytest.importorskip("transformer_lens")

    made = {}

    def build(name):
        if name not in made:
            ours = model_of(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cfg = tl.HookedTransformerConfig(**tiny(name, d_vocab=271))
                theirs = tl.HookedTransformer(cfg)
                theirs.tokenizer = ours.tokenizer
                theirs.cfg.tokenizer_prepends_bos = True
                theirs.load_state_dict(ours.state_dict())
            made[name] = ours, theirs
        return made[name]

    return build


@pytest.mark.tl
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8},
        {"freq_penalty": 1.5},
        {"use_past_kv_cache": False},
        {"prepend_bos": False},
        {"do_sample": False},
        {"temperature": 0.0},
    ],
)
def test_a_seed_says_what_transformer_lens_says(tl_pair, name, options):
    ours, theirs = tl_pair(name)
    tokens = torch.arange(8).view(2, 4)
    prompts = [PROMPTS[0], tokens]
    # With a cache, TransformerLens gives embeddings the wrong learned positions.
    if "freq_penalty" not in options and (name == "llama" or "use_past_kv_cache" in options):
        prompts.append(ours.embed(tokens))
    for prompt in prompts:
        return_types = ("input", "tokens", "str", "embeds") if not options else ("input",)
        for return_type in return_types:
            arguments = {"max_new_tokens": 8, "verbose": False, "return_type": return_type}
            results = []
            for model in (theirs, ours):
                torch.manual_seed(4)
                results.append(model.generate(prompt, **arguments, **options))
            if isinstance(results[0], torch.Tensor):
                assert_close_to(results[1], results[0], atol=1e-6)
            else:
                assert results[1] == results[0]


@pytest.mark.tl
def test_stopping_as_transformer_lens(tl_pair):
    ours, theirs = tl_pair("gpt2")
    said = greedy(ours, "the cat in", max_new_tokens=10)[0]
    tokens = torch.arange(8).view(2, 4)
    for eos in (None, said[3], [said[3], said[5]], (said[5],)):
        for prompt in ("the cat in", tokens):
            results = [
                model.generate(
                    prompt, 10, eos_token_id=eos, do_sample=False, verbose=False,
                    return_type="tokens",
                ).tolist()
                for model in (theirs, ours)
            ]  # fmt: skip
            assert results[0] == results[1]


@pytest.mark.tl
def test_logits_as_transformer_lens(tl_pair):
    ours, theirs = tl_pair("gpt2")
    results = [
        model.generate(
            "the cat in", 5, do_sample=False, verbose=False, stop_at_eos=False, output_logits=True,
            return_dict_in_generate=True,
        )
        for model in (theirs, ours)
    ]  # fmt: skip
    assert type(results[1]) is type(results[0])
    assert results[1].sequences.tolist() == results[0].sequences.tolist()
    assert len(results[1].logits) == 5
    for got, want in zip(results[1].logits, results[0].logits, strict=True):
        assert_close_to(got, want, atol=1e-5)


@pytest.mark.tl
@pytest.mark.parametrize("method", ["generate", "generate_stream"])
def test_arguments_as_transformer_lens(tl_pair, method):
    ours, theirs = tl_pair("gpt2")
    want = inspect.signature(getattr(theirs, method)).parameters.values()
    got = inspect.signature(getattr(ours, method)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in got] == [(p.name, p.default, p.kind) for p in want]


@pytest.mark.tl
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens_per_yield": 1},
        {"max_tokens_per_yield": 3, "temperature": 0.7, "top_k": 5},
        {"max_tokens_per_yield": 10, "top_p": 0.8},
        {"max_tokens_per_yield": 12, "freq_penalty": 1.5},
        {"max_tokens_per_yield": 3, "use_past_kv_cache": False, "return_type": "tensor"},
        {"max_tokens_per_yield": 2, "prepend_bos": False, "do_sample": False},
        {"max_tokens_per_yield": 4, "stop_at_eos": False, "temperature": 0.0},
        {"max_new_tokens": 0},
    ],
)
def test_a_seed_streams_what_transformer_lens_streams(tl_pair, name, options):
    ours, theirs = tl_pair(name)
    arguments = {"max_new_tokens": 8, "verbose": False, **options}
    for prompt in (PROMPTS[0], torch.arange(8).view(2, 4)):
        results = []
        for model in (theirs, ours):
            torch.manual_seed(4)
            # TransformerLens leaves gradients on, and grows a graph.
            with torch.no_grad():
                results.append(list(model.generate_stream(prompt, **arguments)))
        assert [piece.tolist() for piece in results[1]] == [piece.tolist() for piece in results[0]]
        assert all(ours.dtype == want.dtype for ours, want in zip(*results, strict=True))


@pytest.mark.tl
def test_streams_stop_as_transformer_lens(tl_pair):
    ours, theirs = tl_pair("gpt2")
    said = greedy(ours, "the cat in", max_new_tokens=10)[0]
    options = {"do_sample": False, "verbose": False}
    for eos in (None, said[3], [said[3], said[5]], (said[5],)):
        for size in (1, 2, 5, 9, 50):
            for prompt in ("the cat in", torch.arange(8).view(2, 4)):
                with torch.no_grad():
                    want, got = (
                        [
                            piece.tolist()
                            for piece in model.generate_stream(
                                prompt, 10, size, eos_token_id=eos, **options
                            )
                        ]
                        for model in (theirs, ours)
                    )
                assert got == want


# -- results -------------------------------------------------------------------------------------


def test_what_comes_back(gpt2):
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    text = gpt2.generate(PROMPTS[0], **options)
    assert isinstance(text, str) and text.startswith(PROMPTS[0]) and len(text) > len(PROMPTS[0])
    assert gpt2.generate([PROMPTS[0]], **options) == text
    texts = gpt2.generate(PROMPTS, **options)
    assert texts[0] == text and [t.startswith(p) for t, p in zip(texts, PROMPTS, strict=True)]
    tokens = gpt2.to_tokens(PROMPTS[0])
    whole = gpt2.generate(tokens, **options)
    assert whole.shape == (1, tokens.shape[1] + 4) and torch.equal(whole[:, :-4], tokens)
    assert torch.equal(gpt2.generate(tokens[0], **options), whole)
    assert gpt2.generate(tokens, return_type="str", **options) == text
    embeds = gpt2.generate(PROMPTS[0], return_type="embeds", **options)
    assert torch.equal(embeds, gpt2.embed(whole))
    assert torch.equal(gpt2.generate(gpt2.embed(tokens), **options), embeds)
    new = gpt2.generate(gpt2.embed(tokens), return_type="tokens", **options)
    assert torch.equal(new, whole[:, -4:])
    assert (
        gpt2.generate(gpt2.embed(tokens), return_type="str", **options) == text[len(PROMPTS[0]) :]
    )
    assert gpt2.generate(PROMPTS[0], **{**options, "max_new_tokens": 0}) == PROMPTS[0]
    # Right-padded tokens come back as they were given.
    padded = gpt2.to_tokens(PROMPTS)
    assert torch.equal(gpt2.generate(padded, **options)[:, :-4], padded)


def test_logits_of_every_step_are_of_the_last_position(gpt2):
    made = gpt2.generate(
        PROMPTS[0], 3, do_sample=False, stop_at_eos=False, verbose=False, output_logits=True
    )
    logits = gpt2(made.sequences)[:, -4:-1]
    assert_close_to(torch.stack(made.logits, 1), logits)


def test_results_can_be_trained_on(gpt2):
    tokens = gpt2.generate(PROMPTS[0], 3, verbose=False, return_type="tokens", stop_at_eos=False)
    assert not tokens.is_inference()
    gpt2(tokens, return_type="loss").backward()
    assert gpt2.W_E.grad.abs().sum() > 0
    gpt2.zero_grad()


def test_stopped_rows_are_filled_with_eos(gpt2):
    said = greedy(gpt2, PROMPTS)
    end = said[0][1]
    assert all(end not in row for row in said[1:])
    tokens = gpt2.generate(
        PROMPTS, N_NEW, eos_token_id=[end], do_sample=False, verbose=False, return_type="tokens"
    )
    eos = gpt2.tokenizer.eos_token_id
    assert tokens[0, -N_NEW:].tolist() == [*said[0][:2], eos, eos, eos]
    assert tokens[1, -N_NEW:].tolist() == said[1]


# -- cost ----------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Shapes of everything computed."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, torch.Tensor):
                self.shapes.add(tuple(item.shape))
        return out


def logits_computed(model, **options):
    """The most positions whose logits were computed at once."""
    with Shapes() as watch:
        greedy(model, torch.arange(10)[None], **options)
    shapes = [shape for shape in watch.shapes if shape and shape[-1] == model.cfg.d_vocab_out]
    return max(torch.Size(shape[:-1]).numel() for shape in shapes if shape[-2:] != (32, 271))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "softcap", "no_norm"])
def test_only_the_last_position_is_unembedded(name, cache):
    assert logits_computed(model_of(name), use_past_kv_cache=cache) == 1


def test_all_positions_are_unembedded_if_someone_looks():
    seen = []
    model = model_of("gpt2")
    expected = greedy(model, PROMPTS)
    for name in ("unembed.hook_in", "unembed.hook_out", "ln_final.hook_scale"):
        model.add_hook(name, lambda x, hook: seen.append(x.shape[1]))
        assert greedy(model, PROMPTS) == expected
        assert seen[0] > 1 and seen[1:] == [1] * (N_NEW - 1)
        seen.clear()
        model.reset_hooks()
    native = model.ln_final.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    assert greedy(model, PROMPTS) == expected and seen[0] > 1
    native.remove()


def test_replaced_parts_are_called():
    def changed(part):
        class Changed(torch.nn.Module):
            def forward(self, x):
                return part(x).flip(-1)

        return Changed()

    model = model_of("gpt2")
    plain = greedy(model, PROMPTS)
    for name in ("unembed", "ln_final"):
        part = getattr(model, name)
        setattr(model, name, changed(part))
        replaced = greedy(model, PROMPTS)
        setattr(model, name, part)
        real = functools.partial(type(part).forward, part)
        part.forward = lambda x, real=real: real(x).flip(-1)
        assert greedy(model, PROMPTS) == replaced != plain
        del part.forward
    real = model.forward
    model.forward = lambda *a, **k: real(*a, **k).flip(-1)
    flipped = greedy(model, PROMPTS)
    assert flipped != plain
    del model.forward
    assert greedy(model, PROMPTS) == plain


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_part_that_keeps_no_keys_makes_no_difference(name, layer):
    """Positions were counted by the keys of the first layer."""

    class Mean(torch.nn.Module):
        """Attends evenly, and knows nothing of caches."""

        def forward(self, query_input, **others):
            counts = torch.arange(1, query_input.shape[1] + 1)
            return query_input.cumsum(1) / counts[:, None]

    model = model_of(name)
    model.blocks[layer].attn = Mean()
    assert greedy(model, PROMPTS[0]) == greedy(model, PROMPTS[0], use_past_kv_cache=False)
    embeddings = model.embed(model.to_tokens(PROMPTS[0]))
    assert greedy(model, embeddings) == greedy(model, PROMPTS[0])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_part_that_forgets_old_keys_later_makes_no_difference(name):
    """It kept all keys of the first steps."""
    model = model_of(name)
    attn = model.blocks[1].attn
    forward, sizes = attn.forward, []

    def forgetful(*args, past_kv_cache_entry=None, **kwargs):
        out = forward(*args, past_kv_cache_entry=past_kv_cache_entry, **kwargs)
        if past_kv_cache_entry is not None:
            sizes.append(past_kv_cache_entry.past_keys.shape[1])
            past_kv_cache_entry.past_keys = past_kv_cache_entry.past_keys[:, -8:]
            past_kv_cache_entry.past_values = past_kv_cache_entry.past_values[:, -8:]
        return out

    prompt = torch.arange(6)[None]
    for given in (prompt, prompt.expand(2, -1), model.embed(prompt)):
        expected = greedy(model, given)
        attn.forward = forgetful
        assert greedy(model, given) == expected
        del attn.forward
    assert sizes == [6, 7, 8, 9] * 3


def test_a_model_without_layers():
    model = model_of("gpt2", n_layers=0)
    assert greedy(model, PROMPTS) == greedy(model, PROMPTS, use_past_kv_cache=False)


def test_with_a_cache_each_token_is_run_once(gpt2):
    for cache, expected in ((True, [8, 1, 1]), (False, [8, 9, 10])):
        seen = []
        with gpt2.hooks(
            [("blocks.0.hook_resid_pre", lambda x, hook, seen=seen: seen.append(x.shape[1]))]
        ):
            greedy(gpt2, torch.arange(8)[None], max_new_tokens=3, use_past_kv_cache=cache)
        assert seen == expected


# -- hooks and state -----------------------------------------------------------------------------


def test_hooks_act_at_every_step(gpt2):
    def steer(x, hook):
        return x + 3 * torch.linspace(-1, 1, x.shape[-1])

    plain = greedy(gpt2, PROMPTS)
    with gpt2.hooks([("blocks.1.hook_resid_post", steer)]):
        steered = greedy(gpt2, PROMPTS)
        assert steered == [greedy(gpt2, prompt)[0] for prompt in PROMPTS]
        assert steered == greedy(gpt2, PROMPTS, use_past_kv_cache=False)
    assert steered != plain and greedy(gpt2, PROMPTS) == plain
    with gpt2.hooks([("hook_embed", lambda x, hook: torch.zeros_like(x))]):
        assert greedy(gpt2, "Hi") == greedy(gpt2, "x") != [plain[1]]


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi", "shortformer"])
@pytest.mark.parametrize("cache", [True, False])
def test_a_hook_that_writes_in_place_writes_to_no_prompt(name, cache):
    def double(x, hook):
        x *= 2

    model = model_of(name)
    tokens = model.to_tokens(PROMPTS[0])
    embeddings = model.embed(tokens).detach()
    before = embeddings.clone()
    with model.hooks([("blocks.0.hook_resid_pre", lambda x, hook: 2 * x)]):
        expected = greedy(model, tokens)
    with model.hooks([("blocks.0.hook_resid_pre", double)]):
        assert greedy(model, tokens, use_past_kv_cache=cache) == expected
        assert greedy(model, embeddings, use_past_kv_cache=cache) == expected
    assert torch.equal(embeddings, before)


def test_hooks_on_tokens_act_at_every_step():
    model = model_of("gpt2", use_hook_tokens=True)
    tokens = model.to_tokens(PROMPTS[0])
    before = tokens.clone()

    def next_token(x, hook):
        x += 1

    plain = greedy(model, tokens)
    with model.hooks([("hook_tokens", next_token)]):
        shifted = greedy(model, tokens)
        assert shifted == greedy(model, tokens, use_past_kv_cache=False) != plain
    with model.hooks([("hook_embed", lambda x, hook: model.W_E[tokens + 1])]):
        assert greedy(model, tokens, max_new_tokens=1) == [shifted[0][:1]]
    assert torch.equal(tokens, before)


def test_training_mode_is_put_back_even_if_a_hook_raises():
    model = model_of("gpt2").train()
    model.blocks[1].eval()

    def check(x, hook):
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with model.hooks([("blocks.0.hook_resid_pre", check)]):
            greedy(model, "Hi")
    assert model.training and model.blocks[0].training and not model.blocks[1].training
    assert model.tokenizer.padding_side == "right"


# -- limits and errors ---------------------------------------------------------------------------


def test_learned_positions_that_run_out_end_the_text_with_a_warning():
    model = model_of("gpt2", n_ctx=8)
    prompts = torch.tensor([[268, 268, 257, 258], [257, 258, 259, 260]])
    alone = greedy(model, prompts[1:], max_new_tokens=5)
    with pytest.warns(UserWarning, match=r"20 new tokens.*8 positions.*after 5"):
        new = model.generate(
            prompts, 20, do_sample=False, stop_at_eos=False, verbose=False, padding_side="left"
        )
    assert new.shape == (2, 9) and new[1:, -5:].tolist() == alone
    with pytest.raises(TokenError, match="has 9 tokens, and this model 8 positions"):
        greedy(model, new)
    said = alone[0]
    stopped = model.generate(prompts[1:], 20, eos_token_id=said[-1], do_sample=False, verbose=False)
    assert stopped[0, 4:].tolist() == said[: said.index(said[-1]) + 1]


def test_rotary_positions_do_not_run_out():
    assert (
        len(greedy(model_of("llama", n_ctx=8), torch.arange(6)[None], max_new_tokens=20)[0]) == 20
    )


def test_unknown_arguments_are_named():
    model = model_of("gpt2")
    with pytest.warns(UserWarning, match=r"unsupported generation kwargs: max_tokens, num_beams\."):
        greedy(model, "Hi", max_tokens=3, num_beams=2)
    with pytest.warns(UserWarning, match=r"Nearest: 'temperature'"):
        greedy(model, "Hi", temprature=3)


@pytest.mark.parametrize("penalty", ["freq_penalty", "repetition_penalty"])
def test_a_penalty_on_embeddings_is_not_silently_dropped(gpt2, penalty):
    embeds = gpt2.embed(gpt2.to_tokens("Hi"))
    with pytest.warns(UserWarning, match=f"{penalty} counts tokens"):
        gpt2.generate(embeds, 1, verbose=False, stop_at_eos=False, **{penalty: 2.0})


def test_a_repetition_penalty_ends_repetition(gpt2):
    options = {"temperature": 0.0, "verbose": False, "stop_at_eos": False, "return_type": "tokens"}
    prompt = torch.tensor([[5, 6, 7]])
    plain = gpt2.generate(prompt, 30, **options)[0].tolist()
    freed = gpt2.generate(prompt, 30, repetition_penalty=1e6, **options)[0].tolist()
    assert len(set(plain)) < len(plain) and len(set(freed)) == len(freed)


# -- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("size", [1, 4, 9, 100])
def test_pieces_are_what_generate_gives(gpt2, size, cache):
    options = {"do_sample": False, "verbose": False, "use_past_kv_cache": cache}
    padded = gpt2.to_tokens(PROMPTS)
    for prompt in (PROMPTS[0], PROMPTS, padded, padded.int(), padded[0], gpt2.embed(padded[:1])):
        whole = gpt2.generate(prompt, 6, return_type="tokens", **options)
        pieces = list(gpt2.generate_stream(prompt, 6, size, **options))
        assert torch.equal(torch.cat(pieces, 1), whole)
        assert pieces[0].dtype == whole.dtype
        assert all(piece.shape[1] == size for piece in pieces[1:-1])


def test_each_piece_comes_before_the_next_is_run(gpt2):
    seen = []
    with gpt2.hooks([("blocks.0.hook_resid_pre", lambda x, hook: seen.append(x.shape[1]))]):
        stream = gpt2.generate_stream(
            torch.arange(8)[None], 4, 1, do_sample=False, verbose=False, stop_at_eos=False
        )
        assert seen == []
        assert next(stream).shape == (1, 9) and seen == [8]
        assert next(stream).shape == (1, 1) and seen == [8, 1]
        stream.close()
    assert seen == [8, 1]


def test_a_stream_leaves_modes_alone():
    model = model_of("gpt2").train()
    stream = model.generate_stream("Hi", 3, 1, verbose=False, stop_at_eos=False)
    with torch.enable_grad():
        piece = next(stream)
        assert torch.is_grad_enabled() and not piece.is_inference() and not model.training
    with torch.no_grad():
        next(stream)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    stream.close()
    assert model.training and torch.is_grad_enabled()


def test_a_stream_continues_what_it_was_given(gpt2):
    tokens = gpt2.to_tokens("Hi")
    options = {"verbose": False, "stop_at_eos": False, "do_sample": False}
    expected = gpt2.generate(tokens, 3, **options)
    stream = gpt2.generate_stream(tokens, 3, **options)
    tokens.zero_()
    assert torch.equal(torch.cat(list(stream), 1), expected)


def test_what_a_stream_refuses_or_warns_of(gpt2):
    with pytest.raises(TokenError, match="an empty prompt"):
        gpt2.generate_stream("", prepend_bos=False)
    with pytest.warns(UserWarning, match="gives tokens.*not return_type='str'"):
        pieces = list(gpt2.generate_stream("Hi", 1, return_type="str", verbose=False))
    assert isinstance(pieces[0], torch.Tensor)
    model = model_of("gpt2", n_ctx=6)
    stream = model.generate_stream(
        torch.arange(4)[None], 9, 1, verbose=False, stop_at_eos=False, do_sample=False
    )
    assert [piece.shape[1] for piece in (next(stream), next(stream), next(stream))] == [5, 1, 1]
    with pytest.warns(UserWarning, match=r"9 new tokens.*6 positions.*after 3"):
        assert list(stream) == []


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        (
            "Hi",
            {"return_type": "tensor"},
            TokenError,
            "return_type='tensor'.*Nearest: 'str'|'input'",
        ),
        (["Hi", 3], {}, TokenError, "found list"),
        (["", "Hi"], {"prepend_bos": False}, TokenError, "an empty prompt"),
        ("", {"prepend_bos": False}, TokenError, "an empty prompt"),
        (torch.zeros(1, 0, dtype=torch.long), {}, TokenError, "an empty prompt"),
        (torch.zeros(1, 2, 3), {}, ShapeError, r"\[batch, pos, 32\], found \[1, 2, 3\]"),
        (torch.zeros(1, 2, 3, dtype=torch.long), {}, ShapeError, r"found \[1, 2, 3\]"),
        ("Hi", {"top_k": 0}, AssertionError, "top_k=0"),
        ("Hi", {"repetition_penalty": 0}, AssertionError, "repetition_penalty=0.0"),
        ("Hi", {"padding_side": "middle"}, Exception, "padding_side"),
    ],
)
def test_what_cannot_be_continued_is_refused(gpt2, prompt, options, error, message):
    with pytest.raises(error, match=message):
        gpt2.generate(prompt, verbose=False, **options)


def test_a_model_without_tokenizer():
    model = model_of("gpt2", tokenizer=None)
    tokens = torch.arange(5)[None]
    with pytest.raises(TokenError, match=r"needs an EOS token.*no tokenizer.*stop_at_eos=False"):
        model.generate(tokens, verbose=False)
    assert len(greedy(model, tokens)[0]) == N_NEW
    assert model.generate(tokens, eos_token_id=[3], verbose=False).shape[0] == 1
    with pytest.raises(TokenError, match="needs a tokenizer"):
        model.generate("Hi", verbose=False)
    with pytest.raises(TokenError, match="needs a tokenizer"):
        model.generate(tokens, verbose=False, stop_at_eos=False, return_type="str")
