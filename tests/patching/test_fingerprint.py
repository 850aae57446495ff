"""Fingerprints: the same for the same numbers, different for any changed bit."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, SweepError
from fastlens.patching import fingerprint
from fastlens.patching.fingerprint import config_fingerprint, weights_fingerprint
from tests.configs import tiny
from tests.models import ours, prompts


class Bag(nn.Module):
    """The given tensors as buffers, parameters where that is possible."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor)
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


def flipped(tensor, byte, bit):
    """A copy with one bit turned over."""
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    copied.view(-1).view(torch.uint8)[byte] ^= 1 << bit
    return copied


def test_equal_models_have_equal_fingerprints():
    first, second = ours("llama"), ours("llama")
    digest = weights_fingerprint(first)
    assert len(digest) == 32 and int(digest, 16)
    assert weights_fingerprint(second) == digest
    assert weights_fingerprint(copy.deepcopy(first)) == digest


def test_a_model_loaded_again_has_the_same_fingerprint():
    model, other = ours("gpt2"), ours("gpt2")
    with torch.no_grad():
        for leaf in other.parameters():
            leaf.zero_()
    assert weights_fingerprint(other) != weights_fingerprint(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert weights_fingerprint(other) == weights_fingerprint(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_changed_bit_of_any_weight_is_seen(name):
    model = ours(name)
    before = weights_fingerprint(model)
    seen = {before}
    leaves = [*model.named_parameters(), *model.named_buffers()]
    for i, (_, leaf) in enumerate(leaves):
        if leaf.numel() == 0:
            continue
        kept = leaf.detach().clone()
        changed = flipped(leaf, (i * 131) % kept.nbytes, i % 8)
        with torch.no_grad():
            leaf.copy_(changed)
        seen.add(weights_fingerprint(model))
        with torch.no_grad():
            leaf.copy_(kept)
    assert len(seen) == 1 + sum(leaf.numel() > 0 for _, leaf in leaves)
    assert weights_fingerprint(model) == before


DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_every_dtype_counts(dtype):
    size = 3 * dtype.itemsize
    # Any bytes are a value, NaN of any payload among them; a bool is 0 or 1.
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (size,)).to(torch.uint8)
    bits = [0] if dtype is torch.bool else range(8)
    variants = [data, *(flipped(data, byte, bit) for byte in range(size) for bit in bits)]
    prints = {weights_fingerprint(Bag(w=v.view(dtype))) for v in variants}
    assert len(prints) == len(variants)


def test_signed_zeros_and_empty_and_scalar_tensors():
    prints = [
        weights_fingerprint(Bag(w=w))
        for w in (
            torch.tensor(0.0), torch.tensor(-0.0), torch.zeros(1), torch.zeros(1, 1),
            torch.zeros(0), torch.zeros(0, 3), torch.zeros(3, 0), torch.tensor(0),
        )
    ]  # fmt: skip
    assert len(set(prints)) == len(prints)


def test_names_shapes_dtypes_and_places_count():
    w, v = torch.arange(6.0), torch.ones(6)
    bags = [
        Bag(a=w, b=v), Bag(a=v, b=w), Bag(a=w, c=v), Bag(a=w), Bag(a=w.view(2, 3), b=v),
        Bag(a=w.view(torch.int32), b=v), Bag(),
    ]  # fmt: skip
    prints = [weights_fingerprint(bag) for bag in bags]
    assert len(set(prints)) == len(prints)


def test_order_sharing_and_kind_do_not_count():
    w, v = torch.randn(4, 3), torch.randn(2)
    expected = weights_fingerprint(Bag(a=w, b=w.clone(), c=v))
    shared = nn.Parameter(w)
    assert weights_fingerprint(Bag(c=v, b=shared, a=shared)) == expected
    as_buffers = nn.Module()
    for name, tensor in (("c", v), ("a", w), ("b", w)):
        as_buffers.register_buffer(name, tensor, persistent=False)
    assert weights_fingerprint(as_buffers) == expected


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.randoms(), st.integers(1, 40))
def test_strides_do_not_count(shape, random, piece):
    """For any order of the axes in memory, in whatever pieces the bytes are read."""
    order = list(range(len(shape)))
    random.shuffle(order)
    values = torch.arange(float(torch.tensor(shape).prod())).view(shape)
    turned = values.permute(order).contiguous()
    back = turned.permute([order.index(i) for i in range(len(shape))])
    assert torch.equal(back, values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "PIECE_BYTES", 4 * piece)
        pieces = list(fingerprint._pieces(back))
        assert all(part.numel() <= piece for part in pieces)
        assert torch.equal(torch.cat([part.reshape(-1) for part in pieces]), values.view(-1))
        assert weights_fingerprint(Bag(w=back)) == weights_fingerprint(Bag(w=values))
    expanded = torch.ones(1, 1).expand(5, 3)
    assert weights_fingerprint(Bag(w=expanded)) == weights_fingerprint(Bag(w=torch.ones(5, 3)))


def test_lazily_conjugated_weights_count_with_their_values():
    w = torch.randn(3, dtype=torch.complex64)
    assert w.conj().is_conj()
    assert weights_fingerprint(Bag(w=w.conj())) == weights_fingerprint(
        Bag(w=w.conj().resolve_conj())
    )
    assert weights_fingerprint(Bag(w=w.conj())) != weights_fingerprint(Bag(w=w))


def test_threads_do_not_count(monkeypatch):
    model = ours("gpt2")
    expected = weights_fingerprint(model)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert weights_fingerprint(model) == expected


@pytest.mark.gpu
def test_the_device_does_not_count():
    model = ours("llama")
    expected = weights_fingerprint(model)
    assert weights_fingerprint(model.to("cuda")) == expected


def test_a_long_prompt_grows_tables_and_not_the_fingerprint(monkeypatch):
    from fastlens.components.attention import AbstractAttention

    monkeypatch.setattr(AbstractAttention, "ROTARY_INITIAL_CACHE_SIZE", 8)
    model = ours("llama")
    before, rows = weights_fingerprint(model), model.blocks[0].attn.rotary_cos.shape[0]
    model(prompts(1, 11))
    assert model.blocks[0].attn.rotary_cos.shape[0] > rows
    assert weights_fingerprint(model) == before
    model.blocks[1].attn.rotary_sin[3, 0] += 1e-3
    assert weights_fingerprint(model) != before


def test_nothing_about_the_model_changes():
    model = ours("llama")
    places = {name: (leaf.data_ptr(), leaf.stride()) for name, leaf in model.named_parameters()}
    weights_fingerprint(model)
    assert places == {n: (leaf.data_ptr(), leaf.stride()) for n, leaf in model.named_parameters()}
    assert all(leaf.requires_grad and leaf.grad is None for leaf in model.parameters())


class Named(torch.Tensor):
    """A tensor subclass, whose bytes may be elsewhere."""


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        (torch.empty(2, device="meta"), "'w' is a tensor on the meta device"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.ones(2).as_subclass(Named), "'w' is a Named"),
    ],
    ids=["meta", "sparse", "subclass"],
)
def test_weights_without_plain_bytes_are_refused(weight, found):
    with pytest.raises(SweepError, match=f"{found}.*Sweep without an output folder"):
        weights_fingerprint(Bag(w=weight))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_torchs_own_quantised_dtypes_are_refused():
    weight = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(SweepError, match="'w' is a tensor of dtype torch.qint8"):
        weights_fingerprint(Bag(w=weight))


# -- configs -------------------------------------------------------------------------------------


def config(**changes):
    return HookedTransformerConfig(**tiny("llama", **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 3}, {"device": "meta"}, {"model_name": "another"}, {"tokenizer_name": "gpt2"},
        {"init_weights": False}, {"initializer_range": 0.5}, {"original_architecture": "Other"},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_no_number_does_not_count(changes):
    assert config_fingerprint(config(**changes)) == config_fingerprint(config())


@pytest.mark.parametrize(
    "changes",
    [
        {"eps": 3e-4}, {"rotary_base": 500.0}, {"act_fn": "gelu"}, {"dtype": torch.bfloat16},
        {"n_ctx": 128}, {"use_attn_result": True}, {"attn_scores_soft_cap": 30.0},
        {"use_local_attn": True, "window_size": 4, "attn_types": ["local", "global", "global"]},
        {"use_local_attn": True, "window_size": 4, "attn_types": ["global", "local", "global"]},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_a_number_counts(changes):
    assert config_fingerprint(config(**changes)) != config_fingerprint(config())


def test_config_fingerprints_differ_from_each_other():
    layouts = (["local", "global", "global"], ["global", "local", "global"])
    local = [config(use_local_attn=True, window_size=4, attn_types=types) for types in layouts]
    assert config_fingerprint(local[0]) != config_fingerprint(local[1])


def test_whole_floats_are_integers():
    whole, text = config(rotary_base=10000.0), config(rotary_base=10000)
    assert config_fingerprint(whole) == config_fingerprint(text)
    assert config_fingerprint(config(use_qk_norm=True)) != config_fingerprint(config())


def test_a_field_that_cannot_be_written_down_is_refused():
    cfg = config()
    cfg.rotary_base = torch.tensor(3.0)
    with pytest.raises(ConfigError, match="config field rotary_base=tensor.*cannot be written"):
        config_fingerprint(cfg)
