"""The places of a module tree: their names, the structures they reach into, taps that come off.

What hooks and caches do there is in tests/model/test_hooked_module.py.
"""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn

from fastlens.hooks.places import Place, Places, Rule, mapped, parameter_names

X = torch.ones(2)


@dataclass
class Record:
    inner: list
    text: str = "kept"


def places_of(module):
    places = Places()
    places.list_modules(module)
    return places


def test_every_tensor_of_a_structure_is_shown_under_its_path():
    value = {"a": X, "b": (X + 1, [X + 2, None]), "c": Record([X + 3]), "d": "text", 5: X + 4}
    seen = {}

    def show(name, tensor):
        seen[name] = tensor
        return tensor

    assert mapped(value, "hook_out", show) is value
    assert list(seen) == [f"hook_out.{path}" for path in ("a", "b.0", "b.1.0", "c.inner.0", "5")]
    assert seen["hook_out.c.inner.0"][0] == 4


def test_what_is_replaced_is_replaced_in_a_copy():
    value = OrderedDict(a=X, b=(X, Record([X, X + 1])))

    def show(name, tensor):
        return tensor * 0 if name == "hook_out.b.1.inner.1" else tensor

    new = mapped(value, "hook_out", show)
    assert type(new) is OrderedDict and new["a"] is X
    assert new["b"][1].inner[0] is X and new["b"][1].text == "kept"
    assert new["b"][1].inner[1].sum() == 0
    assert value["b"][1].inner[1].sum() == 4


def test_results_of_torch_functions_keep_their_type():
    result = torch.max(torch.eye(3), 0)
    new = mapped(result, "hook_out", lambda name, tensor: tensor + 1)
    assert type(new) is type(result) and new.values[0] == 2


def test_arguments_are_named_after_parameters():
    class Net(nn.Module):
        def forward(self, x, mask=None, *others, scale=1.0, **more):
            return x

    assert parameter_names(Net()) == (["x", "mask"], "others")
    assert parameter_names(nn.Linear(2, 2)) == (["input"], "args")


def test_places_are_found_by_module_call_and_part():
    places = places_of(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU()))
    assert list(places.points) == [
        f"{prefix}{end}" for prefix in ("", "0.", "0.0.", "1.") for end in ("hook_in", "hook_out")
    ]
    found = places.find("0.0@3.hook_out.a.1")
    assert isinstance(found, Place)
    assert (found.module_name, found.only, found.rest) == ("0.0", 3, "hook_out.a.1")
    assert places.find("0.0@3.hook_out.a.1") is found
    assert found.layer() == 0
    assert places.points["1.hook_in"].numbered(2) == "1@2.hook_in"  # type: ignore[attr-defined]
    for name in ("2.hook_out", "0.0@x.hook_out", "0.0.hook_outs", "0.0", "hook_ou"):
        assert places.find(name) is None
    with pytest.raises(ValueError, match="no numbered module"):
        places.points["hook_in"].layer()


def test_only_what_is_looked_at_and_what_is_around_it_is_tapped():
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    places = places_of(net)
    tapped = lambda: [name for name, m in net.named_modules() if m._forward_hooks]  # noqa: E731
    place = places.points["0.0.hook_out"]
    place.add_hook(lambda value, hook: None)
    assert tapped() == ["", "0", "0.0"]
    handle = places.points["1.hook_in"].register_forward_pre_hook(lambda module, args: None)
    assert tapped() == ["", "0", "0.0", "1"]
    handle.remove()
    place.remove_hooks()
    assert tapped() == [] and not places.taps
    places.add_rule(Rule(lambda name: name == "1.hook_in", print, "fwd", False, None, False))
    assert len(tapped()) == 4 and len(places.points["1.hook_in"].fwd_hooks) == 1
    places.rules.clear()
    places.points["1.hook_in"].remove_hooks()
    assert tapped() == []
