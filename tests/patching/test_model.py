"""What patching asks of a model, and finding hooks on it."""

import pytest
import torch

from fastlens.errors import SweepError
from fastlens.patching.model import PatchableModel, check_patchable, modules_with_hooks, walk
from tests.models import ours


def test_a_hooked_transformer_can_be_patched():
    assert isinstance(ours("gpt2"), PatchableModel)
    assert not isinstance(torch.nn.Linear(2, 2), PatchableModel)


def test_what_cannot_be_patched_is_told_so():
    check_patchable(ours("gpt2"))
    with pytest.raises(SweepError, match=r"a Linear cannot be swept: .*run_with_hooks"):
        check_patchable(torch.nn.Linear(2, 2))


def test_hooks_of_every_kind_are_found():
    model = ours("gpt2")
    assert modules_with_hooks(model) == []
    model.add_hook("blocks.1.hook_resid_pre", lambda x, hook: x)
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda module, args: None)
    assert modules_with_hooks(model) == ["blocks.0.mlp", "blocks.1.hook_resid_pre"]
    handle.remove()
    model.reset_hooks()
    assert modules_with_hooks(model) == []
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert modules_with_hooks(model) != []
    everywhere.remove()
    assert modules_with_hooks(model) == []


def test_backward_hooks_do_not_count():
    """Nothing is differentiated in a sweep."""
    model = ours("gpt2")
    model.add_hook("hook_embed", lambda grad, hook: None, dir="bwd")
    assert [name for name in modules_with_hooks(model) if "hook_embed" in name] == []


def test_every_module_is_walked_once():
    for name in ("llama", "no_norm"):
        model = ours(name)
        found = list(walk(model))
        assert sorted(path for path, _ in found) == sorted(dict(model.named_modules()))
        assert dict(found) == dict(model.named_modules())
        order = [path for path, _ in found]
        assert all(
            order.index(path.rpartition(".")[0]) < order.index(path) for path in order if path
        )
