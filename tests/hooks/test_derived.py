"""Entries computed when read: values, sources that were edited, and every way to read a dict."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastlens.errors import EditedError
from fastlens.hooks.derived import CacheDict, Derived


def made() -> tuple[CacheDict, torch.Tensor, list[int]]:
    """A stored entry, one derived from it that counts its computations, and one from that."""
    source, computed = torch.arange(6.0).view(2, 3), []

    def plus_one(x):
        computed.append(1)
        return x + 1

    cache = CacheDict(a=source)
    first = Derived("b", plus_one, {"a": source}, source.shape, source.dtype)
    cache.put("b", first)
    cache.put("c", Derived("c", torch.neg, {"b": first}, source.shape, source.dtype))
    return cache, source, computed


def test_read_once_and_kept():
    cache, source, computed = made()
    assert not computed
    assert torch.equal(cache["b"], source + 1)
    assert cache["b"] is cache["b"]
    assert len(computed) == 1
    assert isinstance(cache.entry("b"), torch.Tensor)


def test_what_is_on_the_way_is_computed_and_not_kept():
    cache, source, computed = made()
    assert torch.equal(cache["c"], -(source + 1))
    assert isinstance(cache.entry("b"), Derived)
    assert torch.equal(cache["b"], source + 1)
    assert len(computed) == 2


READERS = {
    "get": lambda cache: {name: cache.get(name) for name in cache},
    "values": lambda cache: dict(zip(cache, cache.values(), strict=True)),
    "items": lambda cache: dict(cache.items()),
    "dict": dict,
    "unpacked": lambda cache: {**cache},
    "update": lambda cache: [found := {}, found.update(cache)][0],
    "copy": lambda cache: dict(cache.copy()),
    "or": lambda cache: cache | {},
    "ror": lambda cache: {} | cache,
    "pop": lambda cache: {name: cache.pop(name) for name in list(cache)},
    "popitem": lambda cache: dict(cache.popitem() for _ in range(len(cache))),
    "setdefault": lambda cache: {name: cache.setdefault(name, 0) for name in cache},
    "deepcopy": copy.deepcopy,
    "shallow": copy.copy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


def test_copies_and_files_leave_the_original_as_it_was():
    for reader in (copy.deepcopy, copy.copy, pickle.dumps):
        cache, _, _ = made()
        reader(cache)
        assert isinstance(cache.entry("b"), Derived)


def test_a_value_that_was_read_and_edited_is_no_source():
    cache, _, _ = made()
    cache["b"].zero_()
    with pytest.raises(EditedError, match="'b', which it is computed from, was edited"):
        cache["c"]


def test_under_autocast_and_in_inference_mode_the_value_is_the_same():
    source = torch.randn(8, 8)
    for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        entry = Derived("b", torch.matmul, {"a": source, "c": source}, (8, 8), torch.float32)
        with context:
            value = entry.read()
        assert torch.equal(value, source @ source)
        assert not value.is_inference()


def test_threads_that_read_one_entry():
    for _ in range(20):
        cache, source, _ = made()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(cache.__getitem__, ["c", "b"] * 8))
        assert all(torch.equal(value.abs(), source + 1) for value in found)


def test_a_place_captured_twice():
    cache = CacheDict()
    cache.capture("a", torch.ones(1))
    assert not cache.repeated
    cache.capture("a", torch.ones(1))
    assert cache.repeated


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_every_way_to_read_gives_tensors(reader):
    cache, source, _ = made()
    found = reader(cache)
    assert set(found) == {"a", "b", "c"}
    assert all(type(dict.__getitem__(found, name)) is torch.Tensor for name in found)
    assert torch.equal(found["c"], -(source + 1))


def test_saved_by_torch_and_loaded_as_weights_only():
    cache, source, _ = made()
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["c"], -(source + 1))


def test_other_uses_of_a_dict():
    cache, _, computed = made()
    assert "b" in cache and len(cache) == 3 and list(cache) == ["a", "b", "c"]
    assert isinstance(cache, dict)
    assert cache.get("d") is None and cache.get("d", 1) == 1 and cache.pop("d", 2) == 2
    with pytest.raises(KeyError):
        cache.pop("d")
    with pytest.raises(KeyError):
        cache["d"]
    with pytest.raises(KeyError):
        CacheDict().popitem()
    assert not computed
    cache["b"] = torch.zeros(1)
    assert torch.equal(cache["b"], torch.zeros(1))
    del cache["b"]
    assert "b" not in cache
    assert "tensor" in repr(cache)


def test_a_source_edited_before_the_first_read():
    cache, source, _ = made()
    source.add_(1)
    for name in ("b", "c"):
        with pytest.raises(EditedError, match="'a', which it is computed from, was edited"):
            cache[name]


def test_a_view_of_a_source_edited():
    cache, source, _ = made()
    source[0].zero_()
    with pytest.raises(EditedError, match="lazy=False"):
        cache["b"]


def test_a_source_edited_afterwards():
    cache, source, _ = made()
    before = cache["b"].clone()
    source.add_(1)
    assert torch.equal(cache["b"], before)


def test_sources_are_let_go_when_read():
    cache, source, _ = made()
    entry = cache.entry("b")
    assert next(entry.held()) is source
    value = entry.read()
    assert [held is value for held in entry.held()] == [True]


def test_changed_and_moved_entries():
    cache, source, _ = made()
    row = cache.entry("c").then(lambda x: x[0], (3,))
    assert row.shape == (3,)
    assert torch.equal(row.read(), -(source + 1)[0])
    doubled = cache.entry("b").on(lambda tensor: tensor * 2)
    assert torch.equal(doubled.read(), source * 2 + 1)
    entry = cache.entry("b")
    value = entry.read()
    assert torch.equal(entry.on(lambda tensor: tensor * 2).read(), value * 2)


def test_a_part():
    source = torch.arange(12.0).view(1, 2, 2, 3)

    def part(x, heads, rows):
        return x[:, heads][:, :, rows]

    entry = Derived("p", torch.clone, {"x": source}, source.shape, source.dtype, part)
    assert torch.equal(entry.read_part([1], [0]), source[:, 1:, :1])
    entry.read()
    assert entry.read_part([1], [0]) is None


def test_gradients_are_not_recorded():
    source = torch.ones(2, requires_grad=True)
    entry = Derived("b", torch.exp, {"a": source}, (2,), torch.float32)
    assert not entry.read().requires_grad
