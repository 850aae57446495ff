"""`run_with_cache(dtype=, into=)`: each entry is an activation rounded once, in its own memory."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from fastlens import HookedEncoder
from fastlens.errors import ConfigError
from fastlens.hooks.derived import CacheDict, Derived
from fastlens.model.hooked_module import HookedModule
from fastlens.ops.outlier_rows import Int8OutlierRows
from tests.configs import TINY_CONFIGS
from tests.encoders import inputs as encoder_inputs
from tests.encoders import ours as encoder
from tests.models import ours, prompts
from tests.smollm2 import smollm2


def assert_owns_its_memory(cache: Any) -> None:
    """No entry that is stored keeps more than itself alive."""
    for name, entry in cache._entries():
        for tensor in entry if isinstance(entry, Int8OutlierRows) else [entry]:
            if isinstance(tensor, Tensor):
                assert tensor.untyped_storage().nbytes() <= tensor.nbytes, name


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_every_entry_is_rounded_once(family: str):
    model = ours(family)
    _, full = model.run_with_cache(prompts(), lazy=False)
    _, small = model.run_with_cache(prompts(), dtype="bf16")
    assert list(small) == list(full)
    assert_owns_its_memory(small)
    for name in full:
        wanted, found = rounded(full[name], torch.bfloat16), small[name]
        assert found.dtype == wanted.dtype
        # Patterns made anew from queries and keys may differ in their last bit.
        torch.testing.assert_close(found, wanted, rtol=8e-3, atol=1e-6, msg=name)
        if not name.endswith(("hook_pattern", "hook_attn_scores")):
            assert torch.equal(found, wanted), name


@pytest.mark.parametrize("dtype", ["fp16", torch.float16, "float64", torch.float32])
@pytest.mark.parametrize(
    "how",
    [
        {"pos_slice": (2, 5)},
        {"pos_slice": [1, 3]},
        {"pos_slice": -1},
        {"heads": [1]},
        {"device": "cpu"},
        {"lazy": False},
        {"return_cache_object": False},
    ],
)
def test_with_every_other_option(dtype: Any, how: dict[str, Any]):
    model = ours("gpt2")
    _, full = model.run_with_cache(prompts(), **how)
    _, small = model.run_with_cache(prompts(), dtype=dtype, **how)
    wanted = {"fp16": torch.float16, "float64": torch.float64}.get(dtype, dtype)
    for name in full:
        assert small[name].dtype == (wanted if full[name].is_floating_point() else torch.int64)
        assert small[name].shape == full[name].shape
        torch.testing.assert_close(small[name].float(), full[name].float(), rtol=2e-3, atol=1e-3)
    if how.get("return_cache_object", True):
        assert_owns_its_memory(small)


def test_gradients_and_the_batch_axis():
    model = ours("gpt2")
    options: dict[str, Any] = {"return_type": "loss", "incl_bwd": True}
    options["remove_batch_dim"] = True
    _, full = model.run_with_cache(prompts(1), **options)
    _, small = model.run_with_cache(prompts(1), dtype="bf16", **options)
    name = "blocks.0.hook_resid_post_grad"
    assert torch.equal(small[name], full[name].bfloat16()) and small[name].ndim == 2


def test_one_activation_at_two_places_is_kept_once():
    model = ours("gpt2")
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    for dtype in ("bf16", "int8"):
        _, cache = model.run_with_cache(prompts(), names_filter=names, dtype=dtype)
        post, pre = (cache.cache_dict.entry(name) for name in names)
        assert post is pre
        assert cache.nbytes == post.nbytes

    def doubled(value: Tensor, hook: Any) -> None:
        value.mul_(2)

    with model.hooks([("blocks.0.hook_resid_post", doubled)]), torch.no_grad():
        _, cache = model.run_with_cache(prompts(), names_filter=names, dtype="bf16")
    assert torch.equal(cache[names[0]], cache[names[1]])


def test_patterns_come_from_queries_and_keys_as_they_were():
    model = ours("llama")
    tokens = prompts(2, 16)
    _, full = model.run_with_cache(tokens)
    _, small = model.run_with_cache(tokens, dtype="bf16")
    name = "blocks.1.attn.hook_pattern"
    torch.testing.assert_close(
        small[name].float(), full[name].bfloat16().float(), rtol=8e-3, atol=1e-6
    )
    # From rounded queries and keys it would be another.
    assert (small[name].float() - full[name]).abs().max() <= 2**-8


def test_int8_entries_are_packed_read_anew_and_sliced():
    model = ours("gpt2")
    _, full = model.run_with_cache(prompts(), lazy=False)
    _, cache = model.run_with_cache(prompts(), dtype="int8")
    name = "blocks.0.hook_resid_post"
    entry = cache.cache_dict.entry(name)
    assert isinstance(entry, Int8OutlierRows)
    assert cache[name] is not cache[name] and cache.cache_dict.entry(name) is entry
    assert cache[name].dtype == full[name].dtype
    assert (cache[name] - full[name]).norm() / full[name].norm() < 0.01
    assert cache.nbytes < 0.6 * full.nbytes
    # What would not get smaller is exact.
    scale = "blocks.0.ln1.hook_scale"
    assert torch.equal(cache[scale], full[scale])
    one = cache.apply_slice_to_batch_dim(1)
    assert isinstance(one.cache_dict.entry(name), Int8OutlierRows)
    assert torch.equal(one[name], cache[name][1])
    some = cache.apply_slice_to_batch_dim((1, 3))
    assert torch.equal(some[name], cache[name][1:3])
    assert torch.equal(dict(cache.cache_dict)[name], cache[name])
    moved = cache.to("cpu")
    assert isinstance(moved.cache_dict.entry(name), Int8OutlierRows)
    _, alone = model.run_with_cache(prompts(1), dtype="int8", names_filter=name)
    assert alone.remove_batch_dim()[name].ndim == 2
    assert cache.decompose_resid().shape[-1] == model.cfg.d_model


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_other_rows_of_the_batch_and_padding_change_nothing(dtype: str):
    model = ours("llama", dtype=torch.float64)
    tokens = prompts(3, 9)
    name = "blocks.1.hook_resid_post"
    _, whole = model.run_with_cache(tokens, names_filter=name, dtype=dtype)
    _, alone = model.run_with_cache(tokens[1:2], names_filter=name, dtype=dtype)
    _, short = model.run_with_cache(tokens[:, :5], names_filter=name, dtype=dtype)
    # Never more apart than one step of the rounding.
    step = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(alone[name][0], whole[name][1], **step)
    torch.testing.assert_close(short[name], whole[name][:, :5], **step)


class Told(CacheDict):
    """Notes what comes, and takes nothing that is computed later."""

    takes_derived = False

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def capture(self, name: str, value: Any) -> None:
        self.told.append(name)
        super().capture(name, value)


@pytest.mark.parametrize("dtype", [None, "bf16", "int8"])
def test_into_gets_every_entry_through_capture(dtype: str | None):
    model = ours("llama")
    told = Told()
    _, cache = model.run_with_cache(prompts(), into=told, dtype=dtype)
    _, full = model.run_with_cache(prompts(), lazy=False)
    assert cache.cache_dict is told and sorted(told.told) == sorted(full)
    assert len(set(told.told)) == len(told.told)
    assert not any(isinstance(entry, Derived) for _, entry in told.entries())
    if dtype is None:
        for name in full:
            torch.testing.assert_close(cache[name], full[name])


def test_into_an_ordinary_cache_dict_stays_lazy():
    into = CacheDict()
    _, cache = ours("gpt2").run_with_cache(prompts(), into=into)
    assert cache.cache_dict is into
    assert any(isinstance(entry, Derived) for _, entry in into.entries())


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_encoders_and_other_modules(dtype: str):
    model = encoder()
    assert isinstance(model, HookedEncoder)
    _, full = model.run_with_cache(**encoder_inputs())
    _, small = model.run_with_cache(**encoder_inputs(), dtype=dtype)
    name = "blocks.0.hook_resid_pre"
    assert small[name].dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    assert (small[name] - full[name]).norm() / full[name].norm() < 0.01

    net = HookedModule(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64)))
    x = torch.randn(3, 4)
    _, full = net.run_with_cache(x)
    _, small = net.run_with_cache(x, dtype=dtype)
    entry = small.cache_dict["2.hook_out"]
    assert (entry - full["2.hook_out"]).norm() / full["2.hook_out"].norm() < 0.01
    assert small.nbytes < full.nbytes


@pytest.mark.parametrize("dtype", ["bf17", torch.int64, "int4"])
def test_a_dtype_that_is_none_says_which_are(dtype: Any):
    with pytest.raises(ConfigError, match=r"dtype=.*Give one of .*bf16.*int8"):
        ours("gpt2").run_with_cache(prompts(), dtype=dtype)


@pytest.mark.slow
def test_int8_of_smollm2s_residuals():
    """Done when: at most 1 % a row, 0.27 of the memory, and 0.01 nat for activations put back."""
    model = smollm2()
    tokens = model.to_tokens(
        (__doc__ or "") + Told.__doc__ + "The capital of France is Paris. " * 8
    )
    names = [n for n in model.hook_dict if n.endswith(("hook_resid_pre", "hook_resid_post"))]
    with torch.no_grad():
        options: dict[str, Any] = {"names_filter": names, "return_type": "loss"}
        loss, full = model.run_with_cache(tokens, **options)
        _, small = model.run_with_cache(tokens, dtype="int8", **options)
        assert small.nbytes <= 0.27 * full.nbytes
        for name in names:
            off = (small[name] - full[name]).norm(dim=-1) / full[name].norm(dim=-1)
            assert off.max() <= 0.01, name
        for layer in (0, 1, 2, 15, 28, 29):
            name = f"blocks.{layer}.hook_resid_post"
            put = [(name, lambda value, hook, name=name: small[name])]
            patched = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=put)
            assert abs(patched - loss) <= 0.01, name
