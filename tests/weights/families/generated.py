"""The tests of a family, generated from its table and some tiny configs; truth is transformers.

    class TestGptJ(FamilyTests):
        family = FAMILY
        cases = {"plain": {"vocab_size": 60, "n_embd": 32, ...}}

A case holds the arguments of transformers' config class for a model of about 3 layers and 32
channels, with a vocabulary of 60. Its weights are random, gains and biases too.
"""

import atexit
import contextlib
import copy
import functools
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlens import HookedTransformer
from fastlens.errors import ConfigError, WeightsError
from fastlens.patching.metrics import answer_logit
from fastlens.patching.query import plan
from fastlens.patching.sites import available_sites
from fastlens.patching.strategy import WAVE
from fastlens.weights.family import Family
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.patching import against_hooks
from tests.weights.families.facts import check_defaults

VOCAB = 60
TOLERANCE = 1e-5
# Flags whose hooks are off by default.
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


def tokens_of(batch: int = 2, n_pos: int = 12, seed: int = 3) -> Tensor:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 50, (batch, n_pos), generator=generator)


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """transformers takes norms, softmax and rotary tables to float32; in here to float64."""
    real = {name: getattr(Tensor, name) for name in ("to", "float", "type")}
    softmax, tensor_softmax, arange = F.softmax, Tensor.softmax, torch.arange

    def wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple(wide(arg) for arg in args)
        return real["to"](self, *args, **{key: wide(value) for key, value in kwargs.items()})

    def as_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return real["type"](self, *(wide(arg) for arg in args), **kwargs)

    def widened(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **{key: wide(value) for key, value in kwargs.items()})

        return call

    with contextlib.ExitStack() as patches:
        for owner, name, new in (
            (Tensor, "to", to),
            (Tensor, "type", as_type),
            (Tensor, "float", lambda self: real["to"](self, torch.float64)),
            (Tensor, "softmax", widened(tensor_softmax)),
            (F, "softmax", widened(softmax)),
            (torch, "softmax", widened(torch.softmax)),
            (torch, "arange", widened(arange)),
            (torch, "tensor", widened(torch.tensor)),
        ):
            patches.enter_context(mock.patch.object(owner, name, new))
        yield


def built(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """What ``make`` makes of transformers, in a dtype and in eval mode."""
    before = torch.get_default_dtype()
    how = float64_throughout() if dtype == torch.float64 else contextlib.nullcontext()
    try:
        torch.set_default_dtype(dtype)
        with how:
            torch.manual_seed(0)
            return make().to(dtype).eval()
    finally:
        torch.set_default_dtype(before)


def saved(model: Any) -> Path:
    """A folder of the model, which is there until the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="family-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.save_pretrained(folder)
    return folder


@functools.cache
def _build(tests: type["FamilyTests"], case: str, dtype: torch.dtype) -> Any:
    """transformers' model of a case, every parameter random."""
    model = built(lambda: tests.transformers_model(case), dtype)
    if dtype == torch.float64:
        model.load_state_dict(_build(tests, case, torch.float32).state_dict())
        return model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tests.randomise(name, parameter, generator)
    return model


@functools.cache
def _folder(tests: type["FamilyTests"], case: str) -> Path:
    return saved(_build(tests, case, torch.float32))


@functools.cache
def _ours(tests: type["FamilyTests"], case: str, dtype: torch.dtype) -> HookedTransformer:
    """Our model of the case with no processing. Tests must not change it."""
    return HookedTransformer.from_pretrained_no_processing(
        "case", hf_model=_build(tests, case, torch.float32), dtype=dtype, verbose=False
    ).eval()


class FamilyTests:
    """What every family of causal language models is held to. Subclasses give the table.

    Attributes:
        family: The table.
        cases: Name -> arguments of transformers' config class.
        float64_tolerance: Largest difference of logits in float64.
        processed_tolerance: The same for log-probabilities in float32 after folding.
    """

    family: ClassVar[Family]
    cases: ClassVar[Mapping[str, Mapping[str, Any]]]
    float64_tolerance: ClassVar[float] = 1e-9
    processed_tolerance: ClassVar[float] = 2e-5

    # -- what a family may give in another way ---------------------------------------------------

    @classmethod
    def transformers_model(cls, case: str) -> Any:
        """transformers' model of a case, with whatever weights it starts with."""
        import transformers

        config_class = getattr(transformers, cls.family.config_class)
        config = config_class(**{"bos_token_id": 0, "eos_token_id": 1, **cls.cases[case]})
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")

    @classmethod
    def randomise(cls, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Give one parameter of transformers' model random values; gains around one."""
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.15
        is_gain = name.endswith("weight") and (parameter.ndim == 1 or "norm" in name.split(".")[-2])
        parameter.copy_(noise + (1.0 if is_gain else 0.0))

    @classmethod
    def logits(cls, case: str, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """transformers' logits."""
        model = _build(cls, case, dtype)
        how = float64_throughout() if dtype == torch.float64 else contextlib.nullcontext()
        with torch.no_grad(), how:
            return model(tokens).logits

    # -- the tests -------------------------------------------------------------------------------

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test a case."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", list(self.cases))
        elif "first_case" in metafunc.fixturenames:
            metafunc.parametrize("first_case", list(self.cases)[:1])

    def model(self, case: str, dtype: torch.dtype = torch.float64) -> HookedTransformer:
        """Ours, unprocessed, shared between tests."""
        return _ours(type(self), case, dtype)

    def load(self, case: str, **options: Any) -> HookedTransformer:
        """Ours, processed, from the saved folder."""
        folder = _folder(type(self), case)
        return HookedTransformer.from_pretrained(str(folder), verbose=False, **options).eval()

    def test_defaults_are_transformers(self) -> None:
        check_defaults(self.family)

    def test_logits_and_loss(self, case: str) -> None:
        tokens = tokens_of()
        want = self.logits(case, tokens)
        assert want.std() > 0.05, "the logits are all alike: the test shows nothing"
        with torch.no_grad():
            logits, loss = self.model(case, torch.float32)(tokens, return_type="both")
        assert_close_to(logits, want, atol=TOLERANCE, name="logits")
        truth = F.cross_entropy(want[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert_close_to(loss, truth, atol=TOLERANCE, name="loss")

    def test_logits_in_float64(self, case: str) -> None:
        tokens = tokens_of()
        with torch.no_grad():
            logits = self.model(case)(tokens)
        want = self.logits(case, tokens, torch.float64)
        assert_close_to(logits, want, atol=self.float64_tolerance, name="logits")

    def test_folder_and_processing(self, case: str) -> None:
        tokens = tokens_of()
        want = self.logits(case, tokens)
        with torch.no_grad():
            logits = self.load(case)(tokens)
            streamed = self.load(case, offload="disk")(tokens)
        assert torch.equal(streamed, logits)
        atol = self.processed_tolerance
        assert_close_to(logits.log_softmax(-1), want.log_softmax(-1), atol=atol, name="log p")
        folder = str(_folder(type(self), case))
        plain = HookedTransformer.from_pretrained_no_processing(folder, verbose=False)
        for name, parameter in self.model(case, torch.float32).named_parameters():
            assert torch.equal(parameter, plain.get_parameter(name)), name

    def test_saved_and_copied(self, first_case: str, tmp_path: Path) -> None:
        """A folder that fastlens wrote, a pickle and a deep copy give the same logits."""
        model, tokens = self.model(first_case, torch.float32), tokens_of()
        model.save_pretrained(tmp_path)
        saved = HookedTransformer.from_pretrained_no_processing(str(tmp_path), verbose=False)
        with torch.no_grad():
            want = model(tokens)
            for one in (saved, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                # One joint product or three: the last bits differ.
                assert_close_to(one.eval()(tokens), want, atol=TOLERANCE)

    def test_stream_and_gradients(self, case: str) -> None:
        """The residual stream between layers, and the loss' gradients there, are transformers'."""
        tokens = tokens_of()
        theirs = _build(type(self), case, torch.float64)
        with float64_throughout():
            found = theirs(tokens, output_hidden_states=True)
            states = found.hidden_states[1:-1]
            loss = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            grads = torch.autograd.grad(loss, states)
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(len(states))]
        _, cache = self.model(case).run_with_cache(
            tokens, return_type="loss", names_filter=names, incl_bwd=True
        )
        atol = max(self.float64_tolerance, 1e-9)
        for name, state, grad in zip(names, states, grads, strict=True):
            assert_close_to(cache[name], state, atol=atol, name=name)
            assert_close_to(cache[f"{name}_grad"], grad, atol=atol, name=f"{name}_grad")

    def test_hooks(self, case: str) -> None:
        """Every hook fires with the axes it names, and looking at it changes nothing."""
        model, tokens = copy.deepcopy(self.model(case)), tokens_of(2, 7)
        cfg = model.cfg
        for flag in FLAGS:
            if flag != "use_attn_in" or cfg.n_key_value_heads is None:
                setattr(cfg, flag, True)
        if cfg.attn_only:
            cfg.use_hook_mlp_in = False
        sizes = {
            "batch": 2, "pos": 7, "query_pos": 7, "key_pos": 7, "one": 1, "d_model": cfg.d_model,
            "head": cfg.n_heads, "kv_head": cfg.n_key_value_heads or cfg.n_heads,
            "d_head": cfg.d_head, "d_mlp": cfg.d_mlp, "d_vocab": cfg.d_vocab,
        }  # fmt: skip
        seen = {}

        def look(activation: Tensor, hook: Any) -> None:
            seen[hook.name] = tuple(activation.shape)

        with torch.no_grad():
            everything = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, look)])
        assert_close_to(everything, self.model(case)(tokens), atol=1e-9, name="logits")
        for name, shape in seen.items():
            axes = (model.hook_dict[name].axes or "").split()
            if axes and "..." not in axes and set(axes) <= set(sizes):
                assert shape == tuple(sizes[axis] for axis in axes), name
        with torch.no_grad():
            _, cache = self.model(case).run_with_cache(tokens)
        assert set(cache) <= set(seen)
        for layer in range(cfg.n_layers):
            for place in ("hook_resid_pre", "attn.hook_q", "attn.hook_pattern", "hook_resid_post"):
                assert f"blocks.{layer}.{place}" in cache

    def test_generation(self, case: str) -> None:
        """With and without a KV cache, the next token is transformers' most likely one."""
        model, tokens = self.model(case, torch.float32), tokens_of(2, 6)
        options = {"do_sample": False, "stop_at_eos": False, "verbose": False}
        made = model.generate(tokens, max_new_tokens=5, **options)
        again = model.generate(tokens, max_new_tokens=5, use_past_kv_cache=False, **options)
        assert torch.equal(made, again)
        assert torch.equal(self.logits(case, made)[:, 5:-1].argmax(-1), made[:, 6:])

    def test_padding_and_batches(self, case: str) -> None:
        """A row's logits do not depend on its padding, nor on the rows beside it."""
        model, tokens = self.model(case), tokens_of(3, 9)
        with torch.no_grad():
            for side in ("left", "right"):
                real = slice(3, None) if side == "left" else slice(None, -3)
                mask = torch.ones_like(tokens)
                mask[1, : 3 if side == "left" else 0] = 0
                mask[1, tokens.shape[1] - (3 if side == "right" else 0) :] = 0
                logits = model(tokens, attention_mask=mask)
                alone = model(tokens[1:2, real])
                assert_close_to(logits[1:2, real], alone, atol=1e-9, name=f"{side} padding")
                other = model(tokens[:1])
                assert_close_to(logits[:1], other, atol=1e-9, name="a row beside others")

    def test_low_precision(self, first_case: str) -> None:
        want = self.logits(first_case, tokens_of())
        with torch.no_grad():
            logits = self.load(first_case, dtype="bfloat16")(tokens_of()).float()
        gap = (logits.log_softmax(-1) - want.log_softmax(-1)).abs().max()
        assert gap <= 0.1 * max(1.0, float(want.max() - want.min()))

    def test_wave(self, case: str) -> None:
        """Every site goes by the wave, which gives what hooked runs give."""
        model = self.model(case)
        clean, corrupted = tokens_of(1, 4, 0), tokens_of(1, 4, 1)
        for site in available_sites(model.cfg, model.hook_dict):
            query = plan(model, clean, corrupted, sites=site, metric=answer_logit(0))
            assert query.strategy.name == WAVE, (site, query.strategy)
        batch, n_pos = 2, 6
        mask = against_hooks.mask_of("left", batch, n_pos)
        cache = against_hooks.every_activation(model, batch, n_pos, mask)
        number = list(self.cases).index(case)
        runs = against_hooks.mixed_runs(model, batch, n_pos, cache, n_multi=4)
        # All sites, modes and sources in the first case; of each other case, other ones.
        runs = runs if number == 0 else runs[number % 4 :: 4]
        pair = against_hooks.pairs(batch, n_pos)
        against_hooks.check(against_hooks.planned(model, *pair, runs, mask=mask))

    def test_what_is_not_accounted_for_is_refused(self) -> None:
        case = next(iter(self.cases))
        theirs = copy.deepcopy(_build(type(self), case, torch.float32))
        theirs.register_parameter("surprise", torch.nn.Parameter(torch.ones(3)))
        with pytest.raises(WeightsError, match=r"unknown: surprise \[3\]"):
            open_source("x", hf_model=theirs)
        del theirs.surprise
        theirs.config.surprise = 3
        with pytest.raises(ConfigError, match="does not account for .*surprise=3"):
            open_source("x", hf_model=theirs)
