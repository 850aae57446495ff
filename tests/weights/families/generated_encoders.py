"""The tests of an encoder's family, generated from its table; truth is transformers.

    class TestRoberta(EncoderTests):
        family = FAMILY
        cases = {"plain": {**TINY, "hidden_act": "relu"}}

A case holds the arguments of transformers' config class. Its weights are random, gains and biases
too. What causal families are held to is in `generated`.
"""

import contextlib
import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlens import ActivationCache
from fastlens.errors import ConfigError, TokenError, WeightsError
from fastlens.hooks.root import HookedRootModule
from fastlens.model.hooked_encoder import HookedEncoder
from fastlens.patching import generic_activation_patch, get_act_patch_resid_pre
from fastlens.weights.family import Family
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.weights.families.facts import check_defaults
from tests.weights.families.generated import built, float64_throughout, saved, tokens_of

TOLERANCE = 1e-5
MASK_TOKEN = 4
N_POS = 12
TINY = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
HEADS = {"mlm_head", "nsp_head", "pooler", "rtd_head"}


@functools.cache
def _build(
    tests: type["EncoderTests"], case: str, dtype: torch.dtype, architecture: str | None = None
) -> Any:
    """transformers' model of a case, in eval mode, every parameter random."""
    import transformers

    architecture = architecture or tests.family.architectures[0]
    config = getattr(transformers, tests.family.config_class)(**tests.cases[case])
    kind = getattr(transformers, architecture)
    model = built(lambda: kind._from_config(config, attn_implementation="eager"), dtype)
    model.config.architectures = [architecture]
    if dtype == torch.float64:
        model.load_state_dict(_build(tests, case, torch.float32, architecture).state_dict())
        return model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = name.endswith("weight") and (
                parameter.ndim == 1 or "norm" in name.split(".")[-2].lower()
            )
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(noise + (1.0 if is_gain else 0.0))
            if tests.is_zero(name):
                parameter.zero_()
    return model


@functools.cache
def _folder(tests: type["EncoderTests"], case: str) -> Path:
    return saved(_build(tests, case, torch.float32))


@functools.cache
def _ours(tests: type["EncoderTests"], case: str, dtype: torch.dtype) -> HookedEncoder:
    """Our model of the case. Tests must not change it."""
    theirs = _build(tests, case, torch.float32)
    return HookedEncoder.from_pretrained("x", hf_model=theirs, dtype=dtype, verbose=False).eval()


class EncoderTests:
    """What every family of encoders is held to. Subclasses give the table.

    Attributes:
        family: The table.
        cases: Name -> arguments of transformers' config class.
        moves_with_padding: Whether positions count padding on the left, as BERT's do.
        return_type: What `HookedEncoder.forward` is asked for.
    """

    family: ClassVar[Family]
    cases: ClassVar[Mapping[str, Mapping[str, Any]]]
    moves_with_padding: ClassVar[bool] = False
    return_type: ClassVar[str] = "logits"

    @classmethod
    def is_zero(cls, name: str) -> bool:
        """Whether a parameter of transformers' model must be zero to be loaded."""
        return False

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test a case, and one an architecture."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", list(self.cases))
        if "architecture" in metafunc.fixturenames:
            metafunc.parametrize("architecture", self.family.architectures)

    def model(self, case: str, dtype: torch.dtype = torch.float64) -> HookedEncoder:
        """Ours, shared between tests."""
        return _ours(type(self), case, dtype)

    def given(self, case: str, padding: str = "none", n_pos: int = N_POS) -> dict[str, Tensor]:
        """Tokens of three texts with a masked token, and a mask: padded, or with a hole in it."""
        tokens, mask = tokens_of(3, n_pos), torch.ones(3, n_pos, dtype=torch.long)
        tokens[0, 3] = MASK_TOKEN
        if padding == "hole":
            mask[0, 5] = 0
        elif padding != "none":
            mask[1, slice(0, 4) if padding == "left" else slice(-4, None)] = 0
            config = _build(type(self), case, torch.float32).config
            tokens[mask == 0] = config.pad_token_id
        return {"input": tokens, "one_zero_attention_mask": mask}

    def theirs(self, case: str, given: dict[str, Tensor], dtype: torch.dtype, **kwargs: Any) -> Any:
        """What transformers' model gives, under the names of its own."""
        renamed = {"input_ids": given["input"], "attention_mask": given["one_zero_attention_mask"]}
        how = float64_throughout() if dtype == torch.float64 else contextlib.nullcontext()
        model = _build(type(self), case, dtype)
        with how:
            return model(**renamed, **kwargs)

    @staticmethod
    def logits_of(output: Any) -> Tensor:
        """Of masked tokens."""
        return output.logits if "logits" in output else output.prediction_logits

    # -- the tests -------------------------------------------------------------------------------

    def test_defaults_are_transformers(self) -> None:
        check_defaults(self.family)

    @pytest.mark.parametrize("padding", ["none", "left", "right", "hole"])
    def test_logits(self, case: str, padding: str) -> None:
        given = self.given(case, padding)
        real = given["one_zero_attention_mask"].bool()
        for dtype, atol in ((torch.float32, TOLERANCE), (torch.float64, 1e-9)):
            with torch.no_grad():
                want = self.logits_of(self.theirs(case, given, dtype))
                logits = self.model(case, dtype)(**given, return_type=self.return_type)
            assert want.std() > 0.05, "the logits are all alike: the test shows nothing"
            assert_close_to(logits[real], want[real], atol=atol, name=f"{dtype} logits")

    def test_logits_without_a_mask(self, case: str) -> None:
        """Padding that nobody points out counts as text, here and there."""
        given = self.given(case, "right")
        del given["one_zero_attention_mask"]
        theirs = _build(type(self), case, torch.float64)
        with torch.no_grad(), float64_throughout():
            want = self.logits_of(theirs(given["input"]))
        with torch.no_grad():
            logits = self.model(case)(**given, return_type=self.return_type)
        assert_close_to(logits, want, atol=1e-9, name="logits")

    def test_token_types(self, case: str) -> None:
        """Second texts are read as transformers does, or refused where there are no types."""
        model, given = self.model(case), self.given(case)
        types = (torch.arange(N_POS) > 6).long().repeat(3, 1)
        if model.encoder.n_token_types < 2:
            with pytest.raises(TokenError, match="knows one type of token"):
                model(**given, token_type_ids=types)
            types = torch.zeros_like(types)
            want = self.theirs(case, given, torch.float64)
        else:
            want = self.theirs(case, given, torch.float64, token_type_ids=types)
        logits = model(**given, token_type_ids=types, return_type=self.return_type)
        assert_close_to(logits, self.logits_of(want), atol=1e-9, name="logits")

    def test_stream_and_patterns(self, case: str) -> None:
        """Each layer's stream and attention are transformers'."""
        given = self.given(case, "right")
        real = given["one_zero_attention_mask"].bool()
        model, n_layers = self.model(case), self.model(case).cfg.n_layers
        with torch.no_grad():
            found = self.theirs(
                case, given, torch.float64, output_hidden_states=True, output_attentions=True
            )
        _, cache = model.run_with_cache(**given, return_type=self.return_type)
        for layer, pattern in enumerate(found.attentions):
            ours = cache[f"blocks.{layer}.attn.hook_pattern"].transpose(1, 2)[real]
            assert_close_to(ours, pattern.transpose(1, 2)[real], atol=1e-9, name=f"pattern {layer}")
        for layer, state in enumerate(found.hidden_states[:-1]):
            stream = self.stream_name(model, layer)
            assert_close_to(cache[stream][real], state[real], atol=1e-9, name=stream)
        last = model.encoder_output(given["input"], None, given["one_zero_attention_mask"])
        assert_close_to(last[real], found.hidden_states[n_layers][real], atol=1e-9, name="output")

    @staticmethod
    def stream_name(model: HookedEncoder, layer: int) -> str:
        """The hook of what enters a layer."""
        if layer == 0:
            return "hook_full_embed"
        place = "resid_post" if model.encoder.pre_norm else "normalized_resid_post"
        return f"blocks.{layer - 1}.hook_{place}"

    def test_gradients(self, case: str) -> None:
        """The gradients of the streams and of the token embedding are transformers'."""
        given = self.given(case, "right")
        real = given["one_zero_attention_mask"].bool()
        target = given["input"][real]

        def loss_of(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits[real], target)

        theirs = _build(type(self), case, torch.float64)
        found = self.theirs(case, given, torch.float64, output_hidden_states=True)
        leaves = [*found.hidden_states[:-1], theirs.get_input_embeddings().weight]
        want = torch.autograd.grad(loss_of(self.logits_of(found)), leaves)
        model = copy.deepcopy(self.model(case))
        untied = "unembed" not in dict(model.named_children()) or not self.is_tied(case)
        names = [self.stream_name(model, layer) for layer in range(model.cfg.n_layers)]
        seen: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            seen[hook.name] = activation

        logits = model.run_with_hooks(
            **given, return_type=self.return_type, fwd_hooks=[(name, keep) for name in names]
        )
        weights = [model.W_E] if untied else [model.W_E, model.W_U]
        got = torch.autograd.grad(loss_of(logits), [*(seen[name] for name in names), *weights])
        for name, mine, grad in zip(names, got, want, strict=False):
            assert_close_to(mine[real], grad[real], atol=1e-9, name=name)
        of_embedding = got[len(names)] if untied else got[len(names)] + got[-1].T
        padding = theirs.config.pad_token_id
        of_embedding[padding] = want[-1][padding]  # which transformers leaves without a gradient
        assert_close_to(of_embedding, want[-1], atol=1e-9, name="W_E")

    def is_tied(self, case: str) -> bool:
        """Whether the unembedding is the token embedding."""
        return _build(type(self), case, torch.float32).config.tie_word_embeddings

    def test_decomposition(self, case: str) -> None:
        """What was written sums to the stream, where the stream is a sum."""
        model, given = self.model(case), self.given(case)
        _, cache = model.run_with_cache(**given)
        assert isinstance(cache, ActivationCache)
        written, labels = cache.decompose_resid(return_labels=True)
        last = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
        is_sum = model.encoder.pre_norm
        assert (labels[0] == "embed") == is_sum and len(labels) == 2 * model.cfg.n_layers + is_sum
        assert torch.allclose(written.sum(0), last, rtol=0, atol=1e-9) == is_sum
        if is_sum:
            scaled = cache.decompose_resid(apply_ln=True).sum(0)
            normalized = cache["ln_final.hook_normalized"]
            assert_close_to(scaled, normalized, atol=1e-9, name="normalised")

    def test_hooks(self, case: str) -> None:
        """Every hook fires with the axes it names, and looking at it changes nothing."""
        model, given = copy.deepcopy(self.model(case)), self.given(case, "right", 7)
        cfg, encoder = model.cfg, model.encoder
        for flag in FLAGS:
            setattr(cfg, flag, True)
        # Blocks with norms before their sublayers can split attention's input as well.
        cfg.use_attn_in = encoder.pre_norm
        sizes = {
            "batch": 3, "pos": 7, "query_pos": 7, "key_pos": 7, "one": 1, "d_model": cfg.d_model,
            "head": cfg.n_heads, "kv_head": cfg.n_heads, "d_head": cfg.d_head, "d_mlp": cfg.d_mlp,
            "d_vocab": cfg.d_vocab, "d_embed": encoder.d_embed or cfg.d_model,
        }  # fmt: skip
        seen = {}

        def look(activation: Tensor, hook: Any) -> None:
            seen[hook.name] = tuple(activation.shape)

        with torch.no_grad():
            logits = model.run_with_hooks(
                **given, return_type=self.return_type, fwd_hooks=[(lambda name: True, look)]
            )
            plain = self.model(case)(**given, return_type=self.return_type)
        assert_close_to(logits, plain, atol=1e-9, name="logits")
        for name, shape in seen.items():
            axes = (model.hook_dict[name].axes or "").split()
            narrow = encoder.d_embed is not None and name.startswith(
                ("embed.", "mlm_head.ln", "unembed.hook_in")
            )
            if axes and "..." not in axes and set(axes) <= set(sizes) and not narrow:
                assert shape == tuple(sizes[axis] for axis in axes), name
        silent = [name for name in model.hook_dict if name not in seen]
        # But heads that were not asked for.
        heads = {*HEADS, "unembed"}
        assert not [name for name in silent if name.split(".")[0] not in heads]
        with torch.no_grad():
            _, cache = self.model(case).run_with_cache(**given, return_type=self.return_type)
        for layer in range(cfg.n_layers):
            for place in ("hook_resid_pre", "attn.hook_q", "attn.hook_pattern", "hook_resid_post"):
                assert f"blocks.{layer}.{place}" in cache

    def test_an_edit_acts(self, case: str) -> None:
        """A head without its output is a head whose output weights are zero."""
        model, given = self.model(case), self.given(case, "right")

        def without_head(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, 1] = 0
            return z

        with torch.no_grad():
            logits = model.run_with_hooks(
                **given,
                return_type=self.return_type,
                fwd_hooks=[(lambda name: name.endswith("hook_z"), without_head)],
            )
            edited = copy.deepcopy(model)
            for block in edited.blocks:
                block.attn.W_O[1] = 0
            want = edited(**given, return_type=self.return_type)
        assert_close_to(logits, want, atol=1e-9, name="logits")
        assert not torch.allclose(logits, model(**given, return_type=self.return_type))

    def test_padding_and_batches(self, case: str) -> None:
        """A row's logits do not depend on its padding, nor on the rows beside it."""
        model = self.model(case)
        with torch.no_grad():
            for side in ("right",) if self.moves_with_padding else ("left", "right"):
                given = self.given(case, side)
                real = given["one_zero_attention_mask"][1].bool()
                logits = model(**given, return_type=self.return_type)
                alone = model(given["input"][1:2, real], return_type=self.return_type)
                assert_close_to(logits[1:2, real], alone, atol=1e-9, name=f"{side} padding")
                other = model(given["input"][:1], return_type=self.return_type)
                assert_close_to(logits[:1], other, atol=1e-9, name="a row beside others")

    def test_folders_copies_and_precision(self, case: str) -> None:
        """A folder gives the same weights; copies and casts follow."""
        given, model = self.given(case, "right"), self.model(case, torch.float32)
        folder = str(_folder(type(self), case))
        loaded = HookedEncoder.from_pretrained(folder, verbose=False).eval()
        assert loaded.absent_parts == model.absent_parts
        with torch.no_grad():
            want = model(**given, return_type=self.return_type)
            assert torch.equal(loaded(**given, return_type=self.return_type), want)
            again = HookedEncoder(copy.deepcopy(loaded.cfg))
            again.load_state_dict(loaded.state_dict())
            assert torch.equal(again.eval()(**given, return_type=self.return_type), want)
            exact = copy.deepcopy(loaded).to(torch.float64)
            precise = self.model(case)(**given, return_type=self.return_type)
            assert_close_to(exact(**given, return_type=self.return_type), precise, atol=1e-9)
            half = HookedEncoder.from_pretrained(folder, dtype="bfloat16", verbose=False)
            rough = half(**given, return_type=self.return_type).float()
        assert half.W_Q.dtype == torch.bfloat16
        assert (rough - want).abs().max() <= 0.1 * max(1.0, float(want.max() - want.min()))

    def test_patching(self, case: str) -> None:
        """A sweep over the stream gives what hooked runs give."""
        model = self.model(case)
        clean, corrupted = tokens_of(1, 4, 0), tokens_of(1, 4, 1)
        _, cache = model.run_with_cache(clean)

        def metric(logits: Tensor) -> Tensor:
            return logits[0, -1, 7] - logits[0, 0, 9]

        def setter(activation: Tensor, index: Any, clean_activation: Tensor) -> Tensor:
            activation[:, index[1]] = clean_activation[:, index[1]]
            return activation

        with torch.no_grad():
            got = generic_activation_patch(
                model, corrupted, cache, metric, setter, "resid_pre", ("layer", "pos")
            )
            for layer in range(model.cfg.n_layers):
                for pos in range(4):

                    def patch(x: Tensor, hook: Any, pos: int = pos) -> Tensor:
                        x = x.clone()
                        x[:, pos] = cache[hook.name][:, pos]
                        return x

                    hooks = [(f"blocks.{layer}.hook_resid_pre", patch)]
                    want = metric(model.run_with_hooks(corrupted, fwd_hooks=hooks))
                    assert_close_to(got[layer, pos], want, atol=TOLERANCE, name=f"{layer}, {pos}")
        with torch.no_grad():
            stream = get_act_patch_resid_pre(model, corrupted, cache, metric)
        assert_close_to(stream, got, atol=TOLERANCE, name="get_act_patch_resid_pre")

    def test_every_class_loads(self, architecture: str) -> None:
        """Heads that a class lacks are absent, and its encoder is the same."""
        case = next(iter(self.cases))
        theirs = _build(type(self), case, torch.float32, architecture)
        model = HookedEncoder.from_pretrained("x", hf_model=theirs, verbose=False)
        for name, leaf in model.named_parameters():
            assert bool(leaf.isnan().all()) == (name.split(".")[0] in model.absent_parts), name
        given = self.given(case, "right")
        real = given["one_zero_attention_mask"].bool()
        with torch.no_grad():
            output = model.encoder_output(given["input"], None, given["one_zero_attention_mask"])
            found = theirs(
                given["input"],
                attention_mask=given["one_zero_attention_mask"],
                output_hidden_states=True,
            )
        assert_close_to(output[real], found.hidden_states[-1][real], atol=TOLERANCE)
        if "pooler_output" in found and found.pooler_output is not None:
            assert_close_to(model.pooler(output), found.pooler_output, atol=TOLERANCE)
        if "ForMaskedLM" in architecture:
            assert not model.absent_parts & {"mlm_head", "unembed"}

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


def small(tests: type[EncoderTests], case: str, architecture: str | None = None) -> Any:
    """transformers' model of a case; a copy, to be changed."""
    return copy.deepcopy(_build(tests, case, torch.float32, architecture))


def loaded(theirs: Any, **options: Any) -> HookedEncoder:
    """Ours of a transformers model."""
    model = HookedEncoder.from_pretrained("x", hf_model=theirs, verbose=False, **options)
    assert isinstance(model, HookedRootModule)
    return model.eval()
