"""TransformerLens' own toy models: loaded as TransformerLens loads them."""

import warnings

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.errors import ConfigError, WeightsError
from fastlens.patching.metrics import answer_logit
from fastlens.patching.query import plan
from fastlens.patching.sites import available_sites
from fastlens.patching.strategy import WAVE
from fastlens.weights.families.neel import FAMILY
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.patching import against_hooks
from tests.weights.families.facts import check_aliases
from tests.weights.families.generated import tokens_of
from tests.weights.toys import RUN, SIZES, random_weights, save_toy

CONFIG = {**SIZES, **RUN}
CASES = {
    "solu": {},
    "gelu": {"act_fn": "gelu"},
    "attn_only": {"attn_only": True},
    "shortformer": {"attn_only": True, "shortformer_pos": True},
    "pile": {"final_rms": True},
    "rms": {"normalization": "RMS", "act_fn": "gelu"},
    "folded": {"normalization": "LNPre"},
    "no_norms": {"normalization": None, "act_fn": "relu"},
    "nine_layers": {"n_layers": 9, "d_mlp": 8},
}


def config_of(case: str) -> dict:
    return {**CONFIG, **CASES[case]}


def as_transformer_lens_loads_it(config: dict, weights: dict, old: bool = False):
    """TransformerLens' model, by its own conversion of config and state dict."""
    transformer_lens = pytest.importorskip("transformer_lens")
    from transformer_lens import loading_from_pretrained as loading
    from transformer_lens.pretrained.weight_conversions import convert_neel_solu_old_weights

    name = "NeelNanda/SoLU_1L_v9_old" if old else "NeelNanda/SoLU_1L512W_C4_Code"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(loading.utils, "download_file_from_hf", lambda *_, **__: config)
        fields = loading.convert_neel_model_config(name)
        cfg = transformer_lens.HookedTransformerConfig(
            **{**fields, "tokenizer_name": None, "device": "cpu", "init_weights": False}
        )
        model = transformer_lens.HookedTransformer(cfg)
        state = convert_neel_solu_old_weights(weights, cfg) if old else dict(weights)
        state = {k: v for k, v in state.items() if not k.endswith(("mask", "IGNORE"))}
        model.load_state_dict(state, strict=False)
    return model.eval()


@pytest.mark.tl
@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformer_lens(case, tmp_path):
    config = config_of(case)
    weights = random_weights(config)
    theirs = as_transformer_lens_loads_it(config, weights)
    folder = save_toy(tmp_path, config, weights)
    ours = HookedTransformer.from_pretrained_no_processing(folder, verbose=False)
    tokens = tokens_of()
    with torch.no_grad():
        want = theirs(tokens)
        assert_close_to(ours(tokens), want, atol=1e-5, name="logits")
        folded = HookedTransformer.from_pretrained(folder, verbose=False)
        got = folded(tokens).log_softmax(-1)
        assert_close_to(got, want.log_softmax(-1), atol=2e-5, name="log p")
    for name in ("positional_embedding_type", "normalization_type", "final_rms", "act_fn",
                 "attn_only", "n_ctx", "d_vocab", "eps", "default_prepend_bos"):  # fmt: skip
        assert getattr(ours.cfg, name) == getattr(theirs.cfg, name), name


@pytest.mark.tl
@pytest.mark.parametrize("n_layers", [2, 8, 10])
def test_old_layouts(n_layers, tmp_path):
    """Up to 6 layers all matrices lie transposed, up to 8 the positions, and norms are `norm`."""
    config = {**config_of("solu"), "n_layers": n_layers, "d_mlp": 40}
    today = random_weights(config)
    stored = {}
    for name, tensor in today.items():
        turned = "W_" in name and n_layers <= (8 if "W_pos" in name else 6)
        name = name.replace("ln_final", "norm").replace("ln", "norm")
        stored[name] = tensor.transpose(-2, -1).contiguous() if turned else tensor
    theirs = as_transformer_lens_loads_it(config, dict(stored), old=True)
    folder = save_toy(tmp_path / "SoLU_9L_v7_old", config, stored)
    ours = HookedTransformer.from_pretrained_no_processing(folder, verbose=False)
    with torch.no_grad():
        assert_close_to(ours(tokens_of()), theirs(tokens_of()), atol=1e-5, name="logits")
    assert ours.cfg.original_architecture == "neel-solu-old"


@pytest.mark.parametrize("case", ["solu", "shortformer", "pile"])
def test_sweeps_go_by_the_wave(case, tmp_path):
    """Every site, and what it gives is what hooked runs give."""
    config = config_of(case)
    folder = save_toy(tmp_path, config, random_weights(config))
    model = HookedTransformer.from_pretrained_no_processing(
        folder, verbose=False, dtype=torch.float64
    )
    clean, corrupted = tokens_of(1, 4, 0), tokens_of(1, 4, 1)
    for site in available_sites(model.cfg, model.hook_dict):
        query = plan(model, clean, corrupted, sites=site, metric=answer_logit(0))
        assert query.strategy.name == WAVE, (site, query.strategy)
    mask = against_hooks.mask_of("left", 2, 6)
    cache = against_hooks.every_activation(model, 2, 6, mask)
    runs = against_hooks.mixed_runs(model, 2, 6, cache, n_multi=4)
    pair = against_hooks.pairs(2, 6)
    against_hooks.check(against_hooks.planned(model, *pair, runs, mask=mask))


def test_biases_that_are_absent_are_zero(tmp_path):
    config = config_of("gelu")
    weights = {k: v for k, v in random_weights(config).items() if not k.endswith("unembed.b_U")}
    folder = save_toy(tmp_path, config, weights)
    model = HookedTransformer.from_pretrained_no_processing(folder, verbose=False)
    assert not model.b_U.any() and model.b_Q.any()


def test_what_is_not_accounted_for(tmp_path):
    config = config_of("gelu")
    weights = random_weights(config)
    folder = save_toy(tmp_path, config, {**weights, "surprise": torch.ones(3)})
    with pytest.raises(WeightsError, match=r"unknown: surprise \[3\]"):
        open_source(folder)
    del weights["blocks.1.mlp.W_in"]
    with pytest.raises(WeightsError, match=r"missing: blocks\.1\.mlp\.W_in"):
        open_source(save_toy(tmp_path, config, weights))
    # Settings of a run say nothing about the model; fields of a model's config may.
    for stated in ({"window_size": 9}, {"neuron_temp": 2.0}, {"gated_mlp": True}):
        with pytest.raises(ConfigError, match=f"does not account for .*{next(iter(stated))}"):
            open_source(save_toy(tmp_path, {**config, **stated}, weights))
    with pytest.raises(ConfigError, match="architecture is oddgpt"):
        open_source(save_toy(tmp_path, {**config, "architecture": "oddgpt"}, weights))


@pytest.mark.tl
def test_names():
    assert check_aliases(FAMILY, "solu-8l", "attn-only-3l", "redwood", "wiki", "pile") >= 90
