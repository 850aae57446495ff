"""A run that returns nothing stops behind the last place at which anybody looks."""

from typing import Any

import pytest
import torch

from fastlens import HookedTransformer, TransformerLensKeyValueCache
from fastlens.model.stop_early import layers_needed
from tests.models import ours, prompts


def calls_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which blocks, norm and unembedding run from now on."""
    called: list[str] = []
    parts = {f"blocks.{i}": block for i, block in enumerate(model.blocks)}
    parts |= {"ln_final": model.ln_final, "unembed": model.unembed}
    names = {id(part): name for name, part in parts.items()}
    plain = torch.nn.Module.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) in names:
            called.append(names[id(self)])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    return called


@pytest.mark.parametrize(
    ("names", "ran"),
    [
        ("hook_embed", []),
        ("blocks.0.attn.hook_q", ["blocks.0"]),
        ("blocks.0.attn.hook_pattern", ["blocks.0"]),
        (["hook_embed", "blocks.1.hook_resid_pre"], ["blocks.0", "blocks.1"]),
        ("ln_final.hook_scale", ["blocks.0", "blocks.1", "blocks.2", "ln_final"]),
    ],
)
def test_no_layer_behind_the_last_captured_one_runs(names, ran, monkeypatch):
    model = ours("gpt2")
    _, full = model.run_with_cache(prompts(), names_filter=names)
    called = calls_of(model, monkeypatch)
    output, cache = model.run_with_cache(prompts(), return_type=None, names_filter=names)
    assert output is None and called == ran
    assert list(cache) == list(full)
    for name in full:
        assert torch.equal(cache[name], full[name])


def test_positional_return_type_and_what_is_returned(monkeypatch):
    model = ours("gpt2")
    called = calls_of(model, monkeypatch)
    assert model.run_with_cache(prompts(), None, names_filter="hook_embed")[0] is None
    assert called == []
    # Logits and losses that are returned need everything, and so does a stop of the user's own.
    model.run_with_cache(prompts(), names_filter="hook_embed")
    assert called == ["blocks.0", "blocks.1", "blocks.2", "ln_final", "unembed"]
    called.clear()
    residual, _ = model.run_with_cache(
        prompts(), return_type=None, names_filter="hook_embed", stop_at_layer=1
    )
    assert residual.shape[-1] == model.cfg.d_model and called == ["blocks.0"]


def test_hooks_further_on_still_run():
    model = ours("gpt2")
    seen: list[str] = []

    def look(value: Any, hook: Any) -> None:
        seen.append(hook.name)

    with model.hooks([("blocks.1.mlp.hook_post", look)]):
        model.run_with_cache(prompts(), return_type=None, names_filter="hook_embed")
    assert seen == ["blocks.1.mlp.hook_post"]
    handle = model.blocks[1].register_forward_hook(lambda *_: seen.append("torch's"))
    model.run_with_cache(prompts(), return_type=None, names_filter="hook_embed")
    handle.remove()
    assert seen[1:] == ["torch's"]
    assert layers_needed(model) == 0


def test_foreign_modules_and_forwards_still_run(monkeypatch):
    model = ours("gpt2")
    seen: list[str] = []

    class Mine(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            seen.append("mine")
            return x

    model.blocks[1].mlp = Mine()
    model.run_with_cache(prompts(), return_type=None, names_filter="hook_embed")
    assert seen == ["mine"]

    class Subclass(HookedTransformer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append("subclass")
            return super().forward(*args, **kwargs)

    other = Subclass(ours("gpt2").cfg)
    called = calls_of(other, monkeypatch)
    other.run_with_cache(prompts(), return_type=None, names_filter="hook_embed")
    assert seen[1:] == ["subclass"] and "blocks.1" in called


def test_a_kv_cache_is_filled_whole():
    model = ours("gpt2")
    past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 3)
    model.run_with_cache(prompts(), return_type=None, names_filter="hook_embed", past_kv_cache=past)
    assert past[1].past_keys.shape[1] == prompts().shape[1]


def test_a_hook_for_all_modules_runs_everything(monkeypatch):
    model = ours("gpt2")
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert layers_needed(model) is None
    finally:
        handle.remove()
