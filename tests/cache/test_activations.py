from types import SimpleNamespace

import pytest
import torch

from fastlens.cache import ActivationCache
from fastlens.errors import FlagError, HookNameError, LayerError, ShapeError

PLACES = [
    "hook_embed",
    *(
        f"blocks.{i}.{place}"
        for i in range(3)
        for place in (
            "hook_resid_pre", "attn.hook_q", "attn.hook_pattern", "attn.hook_result",
            "ln2.hook_scale", "mlp.hook_post",
        )
    ),
    "ln_final.hook_scale",
]  # fmt: skip


def make_model(**cfg) -> SimpleNamespace:
    return SimpleNamespace(
        cfg=SimpleNamespace(n_layers=3, use_attn_result=False, **cfg),
        hook_dict=dict.fromkeys(PLACES),
        required_flag=lambda name: "use_attn_result" if name.endswith("hook_result") else None,
    )


def make_cache(batch: int = 2, leave_out: tuple[str, ...] = ("hook_result",)) -> ActivationCache:
    shapes = {"hook_q": (4, 2, 8), "hook_pattern": (2, 4, 4), "hook_scale": (4, 1)}
    held = {
        name: torch.randn(batch, *shapes.get(name.rsplit(".", 1)[-1], (4, 6)))
        for name in PLACES
        if not name.endswith(leave_out)
    }
    return ActivationCache(held, make_model())


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("blocks.1.attn.hook_q", "blocks.1.attn.hook_q"),
        ("hook_embed", "hook_embed"),
        ("embed", "hook_embed"),
        ("q1", "blocks.1.attn.hook_q"),
        ("scale2ln2", "blocks.2.ln2.hook_scale"),
        ("scale", "ln_final.hook_scale"),
        (("resid_pre", 2), "blocks.2.hook_resid_pre"),
        (("attn", 1), "blocks.1.attn.hook_pattern"),
        (("scale", 1, "ln2"), "blocks.1.ln2.hook_scale"),
        (("post", 0, "mlp"), "blocks.0.mlp.hook_post"),
        (("embed",), "hook_embed"),
        (("embed", None), "hook_embed"),
        (("q", "1"), "blocks.1.attn.hook_q"),
        (("q", -1), "blocks.2.attn.hook_q"),
        (("q", -3, "a"), "blocks.0.attn.hook_q"),
    ],
)
def test_every_form_of_key_gives_the_stored_tensor(key, name):
    cache = make_cache()
    assert cache[key] is cache.cache_dict[name]
    assert key in cache


def test_editing_in_place_edits_the_cache():
    cache = make_cache()
    cache["q", 0][:, 1] = 7.0
    assert (cache["blocks.0.attn.hook_q"][:, 1] == 7).all()


def test_it_is_a_mapping_in_firing_order():
    cache = make_cache()
    names = [name for name in PLACES if not name.endswith("hook_result")]
    assert list(cache) == list(cache.keys()) == names
    assert len(cache) == len(cache.values()) == len(cache.items()) == len(names)
    assert all(value is cache[name] for name, value in cache.items())
    assert [value.shape for value in cache.values()] == [cache[name].shape for name in cache]
    assert dict(cache.items()).keys() == dict(cache).keys() == cache.cache_dict.keys()
    assert cache.has_embed and not cache.has_pos_embed


@pytest.mark.parametrize(
    "key", ["hook_embd", ("q", 3), ("q", -4), ("z", 0), (), 3, ("q", 0, "a", 1)]
)
def test_what_is_not_here_is_not_in_it(key):
    assert key not in make_cache()


def message(cache: ActivationCache, key) -> str:
    with pytest.raises(KeyError) as caught:
        cache[key]
    assert isinstance(caught.value, HookNameError)
    return str(caught.value)


def test_a_typo_gets_near_names():
    text = message(make_cache(), "blocks.1.attn.hook_qq")
    assert "'blocks.1.attn.hook_qq' in this cache of 17" in text
    assert "Nearest: 'blocks.1.attn.hook_q'" in text


def test_a_short_key_is_shown_with_the_name_it_stands_for():
    assert "'blocks.7.attn.hook_q' (from ('q', 7))" in message(make_cache(), ("q", 7))


def test_a_place_left_out_says_how_to_have_it():
    cache = make_cache(leave_out=("hook_q", "hook_result"))
    text = message(cache, ("q", 1))
    assert "a place of this model" in text and "names_filter" in text
    assert "Add 'blocks.1.attn.hook_q'" in text


def test_a_place_behind_a_flag_names_the_flag():
    cache = make_cache()
    text = message(cache, ("result", 1))
    assert "use_attn_result" in text and "compute_head_results" in text
    cache.model.cfg.use_attn_result = True
    assert "Add 'blocks.1.attn.hook_result' to names_filter" in message(cache, ("result", 1))


def test_a_missing_gradient_names_incl_bwd():
    assert "incl_bwd=True" in message(make_cache(), "blocks.0.attn.hook_q_grad")


def test_malformed_keys_and_layers():
    assert "a key is a name" in message(make_cache(), ())
    assert "a key is a name" in message(make_cache(), (1, "q"))
    with pytest.raises(LayerError, match="3 layers"):
        make_cache()["q", -4]


def test_a_missing_activation_names_the_method_that_needs_it():
    cache = make_cache(leave_out=("hook_q", "hook_result"))
    with pytest.raises(
        HookNameError, match=r"stack_activation\(\) needs .* 'blocks.0.attn.hook_q'"
    ):
        cache.stack_activation("q")


def test_a_cache_without_its_model_is_still_a_mapping():
    cache = make_cache()
    cache.model = None
    assert cache["q", 1] is cache["blocks.1.attn.hook_q"]
    assert "Nearest: 'blocks.1.attn.hook_q'" in message(cache, "blocks.1.attn.hook_qq")
    assert "17 activations" in repr(cache)


def test_repr_folds_layers_together():
    cache = make_cache(leave_out=("hook_result", "blocks.1.attn.hook_q"))
    lines = repr(cache).splitlines()
    assert lines[0].startswith("ActivationCache: 16 activations, 0.0 MiB, with a batch axis")
    assert "  blocks.0,2.attn.hook_q [2, 4, 2, 8]" in lines
    assert "  blocks.0-2.hook_resid_pre [2, 4, 6]" in lines
    assert "  hook_embed [2, 4, 6]" in lines
    assert len(lines) == 8


def test_to_moves_everything_and_returns_itself():
    cache = make_cache()
    held = cache.cache_dict
    moved = cache.to("meta")
    assert moved is cache and all(value.device.type == "meta" for value in cache.values())
    assert all(value.device.type == "cpu" for value in held.values())


def test_toggle_autodiff(caplog):
    make_cache().toggle_autodiff(False)
    assert not torch.is_grad_enabled()
    make_cache().toggle_autodiff(True)
    assert torch.is_grad_enabled()
    assert "autodiff" in caplog.text


def test_remove_batch_dim(caplog):
    cache = make_cache(batch=1)
    # Starts with positions times heads, not with the batch.
    cache.cache_dict["blocks.0.attn.q_norm.hook_scale"] = torch.randn(8, 1)
    before = dict(cache.items())
    assert cache.remove_batch_dim() is cache
    assert not cache.has_batch_dim
    for name, value in cache.items():
        kept_whole = name.endswith("q_norm.hook_scale")
        assert torch.equal(value, before[name] if kept_whole else before[name][0])
    assert not caplog.text
    assert cache.remove_batch_dim() is cache
    assert "already" in caplog.text
    with pytest.raises(ShapeError, match="this has 2"):
        make_cache(batch=2).remove_batch_dim()
    with pytest.raises(AssertionError):
        make_cache(batch=2).remove_batch_dim()


@pytest.mark.parametrize(
    "chosen", [1, -1, (1, 3), (None, None, 2), [2, 0], torch.tensor([1]), None]
)
def test_apply_slice_to_batch_dim(chosen):
    cache = make_cache(batch=3)
    cache.cache_dict["flat"] = torch.randn(24, 1)
    sliced = cache.apply_slice_to_batch_dim(chosen)
    index = slice(*chosen) if isinstance(chosen, tuple) else chosen
    index = slice(None) if index is None else index
    assert sliced is not cache and cache.has_batch_dim
    assert sliced.has_batch_dim == (not isinstance(chosen, int))
    for name, value in cache.items():
        assert torch.equal(sliced[name], value if name == "flat" else value[index])


def test_a_removed_batch_cannot_be_sliced():
    cache = make_cache(batch=1).remove_batch_dim()
    with pytest.raises(AssertionError, match="removed"):
        cache.apply_slice_to_batch_dim(0)
    assert not cache.apply_slice_to_batch_dim(None).has_batch_dim


def test_an_error_of_a_cache_is_not_a_flag_error():
    with pytest.raises(HookNameError) as caught:
        make_cache()["result", 0]
    assert not isinstance(caught.value, FlagError)
