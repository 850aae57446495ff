"""A cache that stores little gives what one that stores everything gives, entry by entry."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlens import ActivationCache, HookedEncoder, TransformerLensKeyValueCache
from fastlens.errors import EditedError, HookNameError, LayerError, ShapeError
from fastlens.hooks.derived import CacheDict, Derived
from tests.close import assert_close_to
from tests.configs import TINY_CONFIGS, tiny
from tests.models import ours, prompts, theirs

FAMILIES = sorted(TINY_CONFIGS)
PATTERN = "blocks.1.attn.hook_pattern"


def caches(name: str, tokens: Tensor | None = None, **how: Any) -> tuple[Any, Any]:
    """One run's cache, lazy, and another's that stores everything."""
    model = ours(name, dtype=torch.float64)
    tokens = prompts() if tokens is None else tokens
    _, lazy = model.run_with_cache(tokens, **how)
    _, stored = model.run_with_cache(tokens, lazy=False, **how)
    return lazy, stored


def derived(cache: Any) -> set[str]:
    """The entries that are not computed yet."""
    entries = dict.items(cache.cache_dict)
    return {name for name, entry in entries if isinstance(entry, Derived)}


def assert_same(lazy: Any, stored: Any) -> None:
    """The same names in the same order, shapes, types, and values."""
    assert list(lazy.keys()) == list(stored.keys())
    for name in stored:
        found, expected = lazy[name], stored[name]
        assert found.dtype == expected.dtype, name
        if name.endswith(("hook_pattern", "hook_attn_scores")):
            assert_close_to(found.nan_to_num(0), expected.nan_to_num(0), atol=1e-14, name=name)
            assert torch.equal(found.isinf(), expected.isinf()), name
        else:
            assert torch.equal(found, expected), name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_entry_of_every_family(name):
    lazy, stored = caches(name)
    assert not derived(stored)
    kinds = {entry.rpartition(".")[2] for entry in derived(lazy)}
    assert {"hook_pattern", "hook_attn_scores"} <= kinds
    assert_same(lazy, stored)
    assert not derived(lazy)


@pytest.mark.tl
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "softcap", "post_norm", "solu_ln"])
def test_every_entry_is_transformer_lens_own(name):
    pytest.importorskip("transformer_lens")
    tokens = prompts()
    _, cache = ours(name, dtype=torch.float64).run_with_cache(tokens)
    _, expected = theirs(name, dtype=torch.float64).run_with_cache(tokens)
    for entry in expected:
        assert_close_to(cache[entry], expected[entry], atol=1e-5, rtol=1e-5, name=entry)


def test_what_is_derived():
    lazy, _ = caches("gpt2")
    of_layer = {name.split(".", 2)[2] for name in derived(lazy) if name.startswith("blocks.1.")}
    assert of_layer == {
        *("attn.hook_attn_scores", "attn.hook_pattern", "hook_resid_mid", "mlp.hook_post"),
        *("ln1.hook_normalized", "ln2.hook_normalized"),
    }
    assert "ln_final.hook_normalized" in derived(lazy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_other_precisions_to_the_bit_but_for_scores(dtype):
    model, tokens = ours("llama", dtype=dtype), prompts()
    _, lazy = model.run_with_cache(tokens)
    _, stored = model.run_with_cache(tokens, lazy=False)
    for name in stored:
        if name.endswith(("hook_pattern", "hook_attn_scores")):
            assert lazy[name].dtype == dtype
        else:
            assert torch.equal(lazy[name], stored[name]), name


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name, side):
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = 0
    mask = mask if side == "left" else mask.flip(1)
    lazy, stored = caches(name, attention_mask=mask)
    assert_same(lazy, stored)


@pytest.mark.parametrize("name", ["gpt2", "llama", "local"])
def test_with_a_kv_cache(name):
    model, tokens = ours(name, dtype=torch.float64), prompts()
    found = []
    for lazy in (True, False):
        kept = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 3)
        model(tokens[:, :6], past_kv_cache=kept)
        found.append(model.run_with_cache(tokens[:, 6:], past_kv_cache=kept, lazy=lazy)[1])
    assert found[0][PATTERN].shape == (3, 4, 5, 11)
    assert_same(*found)


HOW = {
    "positions": {"pos_slice": [0, 4]},
    "a range": {"pos_slice": (2, 9, 3)},
    "one position": {"pos_slice": 5},
    "the last": {"pos_slice": [-1]},
    "heads": {"heads": [3, 1]},
    "heads of a layer": {"heads": {1: [2]}},
    "both": {"heads": [2], "pos_slice": [1, -1]},
    "no batch": {"remove_batch_dim": True},
    "all of it": {"heads": [0, 3], "pos_slice": [-2], "remove_batch_dim": True, "device": "cpu"},
}


@pytest.mark.parametrize("name", ["gpt2", "llama", "qk_norm"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_slices(name, how):
    tokens = prompts(batch=1) if how.get("remove_batch_dim") else prompts()
    lazy, stored = caches(name, tokens, **how)
    assert_same(lazy, stored)


def test_heads_are_query_heads_and_the_kv_heads_they_read():
    model, tokens = ours("llama"), prompts()
    _, whole = model.run_with_cache(tokens)
    _, cache = model.run_with_cache(tokens, heads=[3])
    assert torch.equal(cache["q", 0], whole["q", 0][:, :, [3]])
    assert torch.equal(cache["k", 0], whole["k", 0][:, :, [1]])
    assert torch.equal(cache["resid_pre", 0], whole["resid_pre", 0])
    assert_close_to(cache["pattern", 0], whole["pattern", 0][:, [3]], atol=1e-6)
    with pytest.raises(ShapeError, match="has 4 heads: give some of 0 to 3"):
        model.run_with_cache(tokens, heads=[4])
    with pytest.raises(ShapeError, match="4 heads"):
        model.run_with_cache(tokens, names_filter=PATTERN, heads=[-1])


def test_only_chosen_heads_and_rows_are_made():
    model = ours("gpt2", n_ctx=96, attn_only=False)
    tokens = prompts(batch=1, pos=90)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                o.numel()
                for o in (out if isinstance(out, tuple) else [out])
                if isinstance(o, Tensor)
            )
            return out

    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
    with torch.no_grad(), Sizes():
        model.run_with_cache(tokens, names_filter=patterns, heads=[1], return_type=None)
    assert max(sizes) < 2 * 90 * 90  # one head; four have 4 * 90 * 90
    sizes.clear()
    with torch.no_grad(), Sizes():
        model.run_with_cache(tokens, names_filter=patterns, pos_slice=[5], return_type=None)
    assert max(sizes) < 90 * 90 * 1.6


def test_patterns_alone_keep_queries_and_keys_only_where_that_is_less():
    model = ours("gpt2")
    # Checked types read the first entry of a dict, so that is another one.
    names = ["hook_embed", PATTERN]
    for length, lazy in ((5, False), (30, True)):
        _, cache = model.run_with_cache(prompts(pos=length), names_filter=names)
        assert (PATTERN in derived(cache)) is lazy
        assert list(cache.keys()) == names
        whole = model.run_with_cache(prompts(pos=length), lazy=False)[1]
        assert_close_to(cache[PATTERN], whole[PATTERN], atol=1e-6)


def test_a_source_that_is_not_captured_means_stored():
    model = ours("gpt2")
    names = ["blocks.0.hook_resid_mid", "blocks.0.mlp.hook_post", "blocks.0.hook_resid_pre"]
    _, cache = model.run_with_cache(prompts(), names_filter=names)
    assert not derived(cache)


EDITS = {
    "hook_resid_mid": "blocks.1.hook_resid_mid",
    "hook_post": "blocks.1.mlp.hook_post",
    "hook_normalized": "blocks.1.ln2.hook_normalized",
    "hook_scale": "blocks.1.ln1.hook_scale",
    "hook_pattern": PATTERN,
    "hook_attn_scores": "blocks.1.attn.hook_attn_scores",
    "hook_q": "blocks.1.attn.hook_q",
    "hook_resid_pre": "blocks.1.hook_resid_pre",
    "hook_attn_out": "blocks.1.hook_attn_out",
}


@pytest.mark.parametrize("place", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("in_place", [True, False])
def test_what_a_users_hook_made_is_what_the_cache_has(place, in_place):
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()

    def edit(activation: Tensor, hook: Any) -> Tensor | None:
        if in_place:
            activation[:, 1:3] *= 0.5
            return None
        activation = activation.clone()
        activation[:, 1:3] *= 0.5
        return activation

    with model.hooks([(place, edit)]):
        _, lazy = model.run_with_cache(tokens)
        _, stored = model.run_with_cache(tokens, lazy=False)
    assert place not in derived(lazy)
    assert_same(lazy, stored)


def test_a_foreign_part_is_captured_as_it_is():
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()
    block = model.blocks[1]
    block.mlp.forward = lambda x, old=block.mlp.forward: 2 * old(x)
    model.blocks[0].ln2.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model.blocks[2].attn.apply_causal_mask = lambda scores, *_: scores
    _, lazy = model.run_with_cache(tokens)
    assert not {"blocks.1.mlp.hook_post", "blocks.0.ln2.hook_normalized"} & derived(lazy)
    assert "blocks.2.attn.hook_pattern" not in derived(lazy)
    _, stored = model.run_with_cache(tokens, lazy=False)
    assert_same(lazy, stored)


FLAGS = ["use_attn_in", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_result"]


@pytest.mark.parametrize("flag", FLAGS)
def test_flags(flag):
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()
    getattr(model, f"set_{flag}")(True)
    hooked = {"use_attn_in": "hook_attn_in", "use_hook_mlp_in": "hook_mlp_in"}.get(flag)
    hooks = [(f"blocks.1.{hooked}", lambda x, hook: x * 0.9)] if hooked else []
    with model.hooks(hooks):
        _, lazy = model.run_with_cache(tokens)
        _, stored = model.run_with_cache(tokens, lazy=False)
    assert_same(lazy, stored)


def test_weights_edited_after_the_run_change_nothing():
    model, tokens = ours("llama", dtype=torch.float64), prompts()
    _, lazy = model.run_with_cache(tokens)
    _, stored = model.run_with_cache(tokens, lazy=False)
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.zero_()
    model.set_ungroup_grouped_query_attention(True)
    assert_same(lazy, stored)


def test_a_captured_tensor_edited_before_its_entry_is_read():
    model, tokens = ours("gpt2"), prompts()
    _, cache = model.run_with_cache(tokens)
    cache["q", 1][:, 0] = 0
    with pytest.raises(EditedError, match=r"'blocks\.1\.attn\.hook_q'.*was edited.*lazy=False"):
        cache["pattern", 1]
    assert cache["pattern", 0].shape == (3, 4, 11, 11)


def test_editing_the_stream_of_a_lazy_cache_is_told_too():
    model, tokens = ours("gpt2"), prompts()
    _, cache = model.run_with_cache(tokens)
    cache["resid_pre", 0].zero_()
    with pytest.raises(EditedError, match="hook_resid_pre"):
        cache["normalized", 0, "ln1"]
    _, cache = model.run_with_cache(tokens, lazy=False)
    cache["resid_pre", 0].zero_()
    assert cache["normalized", 0, "ln1"].abs().sum() > 0


def test_gradients_and_hooks_that_stay_store_everything():
    model, tokens = ours("gpt2"), prompts()
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert isinstance(cache, ActivationCache) and f"{PATTERN}_grad" in cache
    assert not derived(cache)
    _, cache = model.run_with_cache(tokens, reset_hooks_end=False)
    assert not derived(cache)
    before = cache[PATTERN]
    model(tokens.flip(1))
    assert not torch.equal(cache[PATTERN], before)
    model.reset_hooks()


def test_inference_tensors_are_stored():
    # Writes to them cannot be noticed.
    model = ours("gpt2")
    with torch.inference_mode():
        _, cache = model.run_with_cache(prompts())
    assert not derived(cache)


def test_taps_come_off_when_the_run_fails():
    model, tokens = ours("gpt2"), prompts()

    def fail(activation: Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    with model.hooks([("blocks.1.hook_resid_pre", fail)]), pytest.raises(KeyboardInterrupt):
        model.run_with_cache(tokens)
    assert all(block.attn.tap is None for block in model.blocks)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_plain_dict_where_one_is_asked_for():
    model, tokens = ours("gpt2"), prompts()
    _, found = model.run_with_cache(tokens, return_cache_object=False)
    assert type(found) is dict
    assert all(isinstance(value, Tensor) for value in found.values())
    assert type(model.run_with_cache(tokens, lazy=False)[1].cache_dict) is dict
    assert type(model.run_with_cache(tokens)[1].cache_dict) is CacheDict


def test_whole_caches_are_changed_without_computing():
    model, tokens = ours("llama", dtype=torch.float64), prompts(batch=1)
    _, cache = model.run_with_cache(tokens)
    _, stored = model.run_with_cache(tokens, lazy=False)
    n_derived = len(derived(cache))
    sliced = cache.apply_slice_to_batch_dim(0)
    moved = model.run_with_cache(tokens)[1].to("cpu")
    assert "MiB" in repr(cache)
    assert len(derived(cache)) == len(derived(sliced)) == len(derived(moved)) == n_derived
    cache.remove_batch_dim()
    assert len(derived(cache)) == n_derived
    for name in stored:
        expected = stored[name]
        expected = expected[0] if expected.shape[0] == 1 and "norm.hook" not in name else expected
        for found in (cache, sliced):
            assert_close_to(found[name], expected, atol=1e-13, name=name)
        assert_close_to(moved[name], stored[name], atol=1e-13, name=name)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_some_rows_of_a_pattern(name):
    model, tokens = ours(name, dtype=torch.float64), prompts()
    for lazy in (True, False):
        _, cache = model.run_with_cache(tokens, lazy=lazy)
        _, other = model.run_with_cache(tokens, lazy=False)
        rows = cache.pattern_rows(-1, heads=[2, 0], query_pos=range(3, 6))
        assert_close_to(rows, other["pattern", -1][:, [2, 0], 3:6], atol=1e-14)
        scores = cache.pattern_rows(0, query_pos=torch.tensor([4]), scores=True)
        assert torch.equal(scores.isinf(), other["attn_scores", 0][:, :, [4]].isinf())
        assert (PATTERN in derived(cache)) is lazy
    one = model.run_with_cache(tokens[:1], remove_batch_dim=True)[1]
    assert_close_to(one.pattern_rows(1, [3]), other[PATTERN][0, [3]], atol=1e-14)


def test_memory_of_a_full_cache_is_what_must_be_stored():
    # Per token and layer: resid_pre, q, k, v, z, attn_out, mlp_out and four of pre; two scales.
    model, tokens = ours("gpt2"), prompts(batch=1, pos=30)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, return_type=None)
    width, layers = model.cfg.d_model, model.cfg.n_layers
    numbers = 30 * ((7 * width + model.cfg.d_mlp + 2) * layers + 3 * width + 1)
    assert cache.nbytes == numbers * 4
    _, stored = model.run_with_cache(tokens, return_type=None, lazy=False)
    assert stored.nbytes > 1.7 * cache.nbytes


def test_a_dict_of_activations_keeps_neither_model_nor_graph_alive():
    model, tokens = ours("gpt2"), prompts()
    _, cache = model.run_with_cache(tokens, return_cache_object=False)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert not any(value.requires_grad for value in cache.values())


def test_encoders_derive_too():
    cfg = {**tiny("bidirectional"), "d_vocab": 50, "act_fn": "gelu", "dtype": torch.float64}
    model = HookedEncoder(cfg).eval()
    tokens = prompts() % 50
    _, lazy = model.run_with_cache(tokens)
    _, stored = model.run_with_cache(tokens, lazy=False)
    assert "blocks.0.ln1.hook_normalized" in derived(lazy)
    assert "blocks.1.attn.hook_pattern" in derived(lazy)
    assert_same(lazy, stored)


# -- what an adversary found -----------------------------------------------------------------------


@pytest.mark.parametrize("place", ["hook_attn_in", "hook_q_input", "hook_mlp_in"])
def test_flags_are_on_before_it_is_decided_what_follows_from_what(place):
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()
    part = "ln2" if place == "hook_mlp_in" else "ln1"
    source = "hook_resid_mid" if place == "hook_mlp_in" else "hook_resid_pre"
    names = [f"blocks.0.{one}" for one in (source, place, f"{part}.hook_scale")]
    names.append(f"blocks.0.{part}.hook_normalized")
    # A hook from when the flag was on.
    model.hook_dict[f"blocks.0.{place}"].add_hook(lambda x, hook: x * 0.5)
    _, lazy = model.run_with_cache(tokens, names_filter=names)
    _, stored = model.run_with_cache(tokens, names_filter=names, lazy=False)
    assert_same(lazy, stored)
    assert not (model.cfg.use_attn_in or model.cfg.use_split_qkv_input or model.cfg.use_hook_mlp_in)


def test_a_hook_of_torch_on_the_last_block_changes_what_is_normalised():
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()
    model.blocks[-1].register_forward_hook(lambda module, args, out: out + 1.0)
    lazy, stored = (model.run_with_cache(tokens, lazy=lazy)[1] for lazy in (True, False))
    assert_same(lazy, stored)


@pytest.mark.parametrize("place", ["hook_attn_out", "attn.hook_v", "attn.hook_q"])
def test_a_run_within_a_run(place):
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()
    found = []
    for lazy in (True, False):
        is_within = []

        def run(activation: Tensor, hook: Any, is_within: list = is_within) -> None:
            if not is_within:
                is_within.append(True)
                model(tokens.flip(1))

        with model.hooks([(f"blocks.1.{place}", run)]):
            found.append(model.run_with_cache(tokens, lazy=lazy)[1])
    assert_same(*found)


def test_a_cached_run_within_a_cached_run_leaves_the_outer_one_its_patterns():
    model, tokens = ours("gpt2", dtype=torch.float64), prompts()
    is_within: list[bool] = []

    def run(activation: Tensor, hook: Any) -> None:
        if not is_within:
            is_within.append(True)
            model.run_with_cache(tokens.flip(1))

    with model.hooks([("blocks.1.hook_resid_pre", run)]):
        _, cache = model.run_with_cache(tokens)
    _, plain = model.run_with_cache(tokens)
    assert_close_to(cache["pattern", 2], plain["pattern", 2], atol=1e-14)
    assert all(block.attn.tap is None for block in model.blocks)


def test_heads_of_ungrouped_keys():
    model, tokens = ours("llama", dtype=torch.float64), prompts()
    model.set_ungroup_grouped_query_attention(True)
    _, whole = model.run_with_cache(tokens)
    _, cache = model.run_with_cache(tokens, heads=[0, 3])
    assert torch.equal(cache["k", 1], whole["k", 1][:, :, [0, 3]])


def test_an_activation_function_of_somebody_elses_is_not_run_again():
    model, tokens = ours("llama", dtype=torch.float64), prompts()
    silu = torch.nn.functional.silu
    for function in (lambda x: silu(x, inplace=True), torch.nn.functional.dropout):
        model.blocks[1].mlp.act_fn = function
        _, cache = model.run_with_cache(tokens)
        mlp = model.blocks[1].mlp
        assert_close_to(cache["post", 1] @ mlp.W_out + mlp.b_out, cache["mlp_out", 1], atol=1e-12)


METHODS = {"attn": "calculate_qkv_matrices _rotated _biased", "mlp": "_after_activation"}


@pytest.mark.parametrize(
    ("part", "method"), [(part, name) for part in METHODS for name in METHODS[part].split()]
)
def test_a_method_replaced_on_a_part(part, method):
    model, tokens = ours("llama", dtype=torch.float64), prompts()
    module = getattr(model.blocks[1], part)
    old = getattr(module, method)

    def other(*args: Any) -> Any:
        out = old(*args)
        return tuple(x * 1.5 for x in out) if isinstance(out, tuple) else out * 1.5

    setattr(module, method, other)
    seen = {}
    hooks = [(PATTERN, lambda x, hook: seen.update({PATTERN: x}))]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    lazy, stored = (model.run_with_cache(tokens, lazy=lazy)[1] for lazy in (True, False))
    assert_same(lazy, stored)
    assert_close_to(lazy[PATTERN], seen[PATTERN], atol=1e-14)


@pytest.mark.parametrize("place", ["hook_resid_mid", "hook_resid_pre", "attn.hook_pattern"])
def test_places_whose_hooks_see_another_form(place):
    class Doubled:
        def convert(self, value: Tensor) -> Tensor:
            return value * 2

        def revert(self, value: Tensor) -> Tensor:
            return value / 2

    model, tokens = ours("gpt2", dtype=torch.float64), prompts()
    model.hook_dict[f"blocks.1.{place}"].enable_reshape(Doubled())
    seen = {}
    hooks = [(f"blocks.1.{place}", lambda x, hook: seen.update(x=x))]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    lazy, stored = (model.run_with_cache(tokens, lazy=lazy)[1] for lazy in (True, False))
    assert_same(lazy, stored)
    assert_close_to(lazy[f"blocks.1.{place}"], seen["x"], atol=1e-14)


@pytest.mark.parametrize("choice", [[1, 0], (0, 2), torch.tensor([True, False, True]), 2, -1])
def test_some_examples_of_a_cache_that_is_not_computed(choice):
    lazy, stored = caches("llama")
    some, expected = (c.apply_slice_to_batch_dim(choice) for c in (lazy, stored))
    assert derived(some) == derived(lazy)
    # Computed from the chosen examples alone, so edits of others do not matter.
    for name in stored:
        assert_close_to(some[name].nan_to_num(0), expected[name].nan_to_num(0), atol=1e-13)


def test_a_slice_of_a_cache_holds_only_its_examples():
    lazy, stored = caches("gpt2", prompts(batch=6))
    assert lazy.apply_slice_to_batch_dim([0]).nbytes * 5.9 < lazy.nbytes
    sliced = lazy.apply_slice_to_batch_dim([1, 0])
    lazy["pattern", 0].zero_()
    assert_close_to(sliced["pattern", 0], stored["pattern", 0][[1, 0]], atol=1e-14)


def test_heads_and_rows_that_are_no_indices():
    model, tokens = ours("gpt2"), prompts()
    with pytest.raises(ShapeError, match="give a list of whole numbers"):
        model.run_with_cache(tokens, heads=[True, False])
    with pytest.raises(LayerError, match="names layer 5, and the model has layers 0 to 2"):
        model.run_with_cache(tokens, heads={5: [1]})
    _, cache = model.run_with_cache(tokens)
    with pytest.raises(ShapeError, match="query_pos"):
        cache.pattern_rows(0, query_pos=torch.ones(11, dtype=torch.bool))
    with pytest.raises(HookNameError, match=r"blocks\.7\.attn\.hook_pattern"):
        cache.pattern_rows(7)
