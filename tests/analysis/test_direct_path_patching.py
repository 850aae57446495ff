"""Direct path patching against TransformerLens 3.9, and against the edge written out."""

import warnings

import pytest
import torch

from fastlens.analysis.direct_path_patching import (
    get_act_patch_direct_path,
    get_act_patch_direct_path_all_sources,
)
from fastlens.components.norms import norm_behind
from fastlens.errors import HookNameError, LayerError, MetricError, ShapeError, SweepError
from fastlens.patching import logit_diff
from tests.close import assert_close_to
from tests.configs import TINY_CONFIGS
from tests.models import ours, prompts, theirs

# What tests here compare with TransformerLens 3.9, on equal weights.
COMPARED = [
    "transformer_lens.tools.analysis.direct_path_patching.get_act_patch_direct_path",
    "transformer_lens.tools.analysis.direct_path_patching.get_act_patch_direct_path_all_sources",
]


def metric(logits):
    return (logits[:, -1, 3] - logits[:, -1, 7]).mean()


def caches(model, clean, corrupted):
    with torch.no_grad():
        return model.run_with_cache(clean)[1], model.run_with_cache(corrupted)[1]


@pytest.mark.tl
@pytest.mark.parametrize("component", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "attn_only"])
def test_values_are_those_of_transformer_lens(name, component):
    pytest.importorskip("transformer_lens")
    from transformer_lens.tools.analysis import direct_path_patching as tl

    # Keys and values of grouped heads fail there.
    changes = {"n_key_value_heads": None} if name == "llama" and component != "q" else {}
    a, b = theirs(name, **changes), ours(name, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a.process_weights_()
    b.process_weights_()
    clean, corrupted = prompts(2, 7), prompts(2, 7, 1)
    arguments = [(m, corrupted, *caches(m, clean, corrupted), metric) for m in (a, b)]
    want = tl.get_act_patch_direct_path(*arguments[0], 0, 2, component, verbose=False)
    got = get_act_patch_direct_path(*arguments[1], 0, 2, component, verbose=False)
    assert got.dtype == want.dtype
    assert_close_to(got, want, atol=1e-5)
    assert (want[0] == 0).all() and (want[1:].std() > 1e-4)
    if component == "q":
        every = tl.get_act_patch_direct_path_all_sources(*arguments[0], "q", verbose=False)
        got = get_act_patch_direct_path_all_sources(*arguments[1], "q", verbose=False)
        assert_close_to(got, every, atol=1e-5)


def by_the_edge(model, clean, corrupted, clean_cache, corrupted_cache, source, component):
    """The destination's input from an edited stream, every norm linear at the corrupted scale."""
    layer, head = source
    cfg = model.cfg
    z = f"blocks.{layer}.attn.hook_z"
    change = clean_cache[z][:, :, head] - corrupted_cache[z][:, :, head]
    sent = change @ model.blocks[layer].attn.W_O[head]

    def through(norm, name, x):
        if cfg.normalization_type is None:
            return x
        if cfg.normalization_type.startswith("LN"):
            x = x - x.mean(-1, keepdim=True)
        return x / corrupted_cache[f"{name}.hook_scale"] * norm.w

    behind = norm_behind(cfg, "ln1")
    if behind is not None:
        sent = through(getattr(model.blocks[layer], behind), f"blocks.{layer}.{behind}", sent)
    values = torch.zeros(cfg.n_layers, cfg.n_heads, dtype=torch.float64)
    for after in range(layer + 1, cfg.n_layers):
        block = model.blocks[after]
        read = sent
        if not cfg.norm_after_sublayer:
            read = through(block.ln1, f"blocks.{after}.ln1", sent)
        for own in range(cfg.n_heads):
            added = read @ getattr(block.attn, f"W_{component.upper()}")[own]

            def add(x, hook, own=own, added=added):
                x = x.clone()
                x[:, :, own] += added
                return x

            with torch.no_grad():
                hooks = [(f"blocks.{after}.attn.hook_{component}", add)]
                values[after, own] = metric(model.run_with_hooks(corrupted, fwd_hooks=hooks))
    return values


@pytest.mark.parametrize("component", ["q", "k", "v"])
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_every_family_with_unfolded_norms(name, component):
    model = ours(name, dtype=torch.float64)
    clean, corrupted = prompts(2, 7), prompts(2, 7, 1)
    clean_cache, corrupted_cache = caches(model, clean, corrupted)
    grouped = model.cfg.n_key_value_heads is not None and component != "q"
    if grouped:
        # The reference edits what one query head reads, which grouped heads share.
        model.set_ungroup_grouped_query_attention(True)
    truth = by_the_edge(model, clean, corrupted, clean_cache, corrupted_cache, (0, 1), component)
    if grouped:
        model.set_ungroup_grouped_query_attention(False)
    found = get_act_patch_direct_path(
        *(model, corrupted, clean_cache, corrupted_cache, metric, 0, 1, component)
    )
    assert_close_to(found, truth.to(found.dtype), atol=1e-6)
    assert not model.cfg.ungroup_grouped_query_attention


def test_without_norms_it_is_path_patching_along_one_edge():
    from fastlens.analysis.path_patching import path_patching

    model = ours("no_norm", n_layers=3, dtype=torch.float64)
    clean, corrupted = prompts(1, 7), prompts(1, 7, 1)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q *= 30
    found = get_act_patch_direct_path_all_sources(
        *(model, corrupted, *caches(model, clean, corrupted), metric, "q")
    )
    scores = path_patching(
        *(model, clean, corrupted),
        receivers=(2, 1, "q"),
        metric=logit_diff(3, 7),
        mlps="freeze",
        direction="denoising",
    )
    change = scores.values[:2] - scores.reference
    assert change.abs().max() > 1e-4
    # TransformerLens answers in float32.
    assert_close_to(found[:2, :, 2, 1].double() - scores.reference, change, atol=1e-6)


def test_split_inputs_one_prompt_and_sources():
    model = ours("gpt2")
    clean, corrupted = prompts(1, 7), prompts(1, 7, 1)
    plain = get_act_patch_direct_path(
        *(model, corrupted, *caches(model, clean, corrupted), metric, 0, 1)
    )
    model.set_use_split_qkv_input(True)
    found = caches(model, clean, corrupted)
    assert found[1]["blocks.1.ln1.hook_scale"].ndim == 4
    model.set_use_split_qkv_input(False)
    split = get_act_patch_direct_path(model, corrupted[0], *found, logit_diff(3, 7), 0, 1)
    assert_close_to(split, plain, atol=1e-5)
    last = get_act_patch_direct_path(model, corrupted, *found, metric, 2, 0)
    assert not last.any()


def test_what_is_refused():
    model = ours("gpt2")
    clean, corrupted = prompts(2, 7), prompts(2, 7, 1)
    found = caches(model, clean, corrupted)
    with pytest.raises(SweepError, match="'q', 'k' or 'v'"):
        get_act_patch_direct_path_all_sources(model, corrupted, *found, metric, "z")
    for source in ((3, 0), (0, 4), (-1, 0)):
        with pytest.raises(LayerError, match="out of range"):
            get_act_patch_direct_path(model, corrupted, *found, metric, *source)
    with pytest.raises(MetricError, match="for each of 2 examples"):
        get_act_patch_direct_path(model, corrupted, *found, logit_diff(3, 7), 0, 0)
    _, little = model.run_with_cache(corrupted, names_filter="blocks.0.attn.hook_z")
    with pytest.raises(HookNameError, match=r"ln1.hook_scale.*corrupted_cache"):
        get_act_patch_direct_path(model, corrupted, found[0], little, metric, 0, 0)
    _, none = model.run_with_cache(clean, names_filter="hook_embed")
    with pytest.raises(KeyError, match=r"hook_z.*clean_cache"):
        get_act_patch_direct_path(model, corrupted, none, found[1], metric, 0, 0)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("options", [{"pos_slice": -1}, {"remove_batch_dim": True}, {"n_pos": 1}])
def test_caches_of_other_positions(which, options):
    """They would be broadcast over all positions."""
    model = ours("gpt2")
    tokens = [prompts(1, 7), prompts(1, 7, 1)]
    found = list(caches(model, *tokens))
    n_pos = options.get("n_pos", 7)
    kept = {name: value for name, value in options.items() if name != "n_pos"}
    _, found[which] = model.run_with_cache(tokens[which][:, :n_pos], **kept)
    name = ("clean_cache", "corrupted_cache")[which]
    with pytest.raises(ShapeError, match=f"hook_z of {name} has shape"):
        get_act_patch_direct_path(model, tokens[1], *found, metric, 0, 0)
