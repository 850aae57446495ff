"""Logits computed where a metric looks: the same numbers as plain ones, and no more than asked."""

import copy
import io
import operator
import pickle

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlens.errors import MetricError
from fastlens.patching.lazy_logits import (
    LazyLogits,
    LogitSource,
    RecordingSource,
    plain,
    reads_of,
)
from fastlens.patching.metrics import answer_prob, kl_divergence, logit_diff

BATCH, N_POS, D_VOCAB = 3, 4, 11
# Every logit is another number, so that a misplaced one shows; sums are exact in any order.
FULL = torch.arange(BATCH * N_POS * D_VOCAB).view(BATCH, N_POS, D_VOCAB) * 0.25 - 20.0
ROWS = torch.arange(BATCH * N_POS).view(BATCH, N_POS, 1).expand(BATCH, N_POS, D_VOCAB)
COLUMNS = torch.arange(D_VOCAB).expand(BATCH, N_POS, D_VOCAB)

TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 1]])


class KnownLogits(LogitSource):
    """A source whose logits are known, and that remembers what it was asked."""

    def __init__(self, logits=FULL):
        self.logits, self.dtype, self.device = logits, logits.dtype, logits.device
        self.asked = []

    def block(self, rows, columns):
        everything = torch.arange(self.logits.shape[-1])
        for ids in (rows, columns):
            if ids is not None:
                assert ids.dtype == torch.int64 and ids.device.type == "cpu" and ids.ndim == 1
                assert ids.numel() and (ids[1:] > ids[:-1]).all()
        assert columns is None or columns.numel() < len(everything), "None is the whole vocabulary"
        columns = everything if columns is None else columns
        self.asked.append((set(rows.tolist()), set(columns.tolist())))
        return self.logits.flatten(0, 1)[rows][:, columns]

    @property
    def rows(self):
        return set().union(*(rows for rows, _ in self.asked))

    @property
    def columns(self):
        return set().union(*(columns for _, columns in self.asked))


def lazy_of(logits=FULL):
    source = KnownLogits(logits)
    return LazyLogits(source, *logits.shape), source


def named(*steps):
    """The rows and columns that stay after some steps, from tensors of ids."""
    rows, columns = ROWS, COLUMNS
    for step in steps:
        rows, columns = step(rows), step(columns)
    return set(rows.reshape(-1).tolist()), set(columns.reshape(-1).tolist())


def assert_same(found, expected):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.equal(plain(found), expected)
    assert type(plain(found)) is Tensor


def check(*steps):
    """The steps give what they give of plain logits, and ask for no other logit; one ask."""
    logits, source = lazy_of()
    value, expected, taken = logits, FULL, []
    for step in steps:
        # What comes after the last lazy tensor only looks at what is computed already.
        if isinstance(value, LazyLogits):
            taken.append(step)
        value, expected = step(value), step(expected)
    assert_same(value, expected)
    rows, columns = named(*taken)
    assert (source.rows, source.columns) == (
        (rows, columns) if rows and columns else (set(), set())
    )
    assert len(source.asked) == bool(rows and columns)
    assert_same(value, expected)
    assert len(source.asked) <= 1


# -- what is free --------------------------------------------------------------------------------


def test_what_is_known_without_a_logit():
    logits, source = lazy_of()
    assert logits.shape == (BATCH, N_POS, D_VOCAB) == logits.size()
    assert (logits.dtype, logits.device) == (torch.float32, torch.device("cpu"))
    assert logits.ndim == logits.dim() == logits.ndimension() == 3
    assert logits.size(-1) == logits.shape[-1] == D_VOCAB and len(logits) == BATCH
    assert logits.numel() == torch.numel(logits) == logits.nelement() == FULL.numel()
    assert logits.is_floating_point() and torch.is_floating_point(logits)
    assert not (logits.requires_grad or logits.is_cuda or logits.is_complex() or logits.is_sparse)
    assert logits.element_size() == logits.itemsize == 4 and logits.layout == torch.strided
    assert isinstance(logits, Tensor) and torch.is_tensor(logits)
    assert isinstance(source, LogitSource)
    assert logits in {logits: 1} and logits.grad is None and logits.is_leaf
    assert logits.new_zeros(2).tolist() == [0.0, 0.0]
    assert logits.new_tensor([1, 2]).dtype == torch.float32
    assert FULL.double().to(logits).dtype == FULL.double().type_as(logits).dtype == torch.float32
    assert source.asked == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_the_sources(dtype):
    logits, _ = lazy_of(FULL.to(dtype))
    assert logits.dtype == dtype
    assert_same(logits[:, -1], FULL[:, -1].to(dtype))
    assert_same(logits[0, 0, 1], FULL[0, 0, 1].to(dtype))


def test_casts_follow_each_other():
    third = torch.tensor([[[1 / 3, 70000.0, 1e-9]]], dtype=torch.float64)
    for first, second in [(torch.bfloat16, torch.float32), (torch.float16, torch.float64)]:
        assert_same(lazy_of(third)[0].to(first).to(second)[0], third.to(first).to(second)[0])
        assert_same(lazy_of(third)[0].to(first)[0, 0, 0], third.to(first)[0, 0, 0])


def test_moving_waits_too():
    logits, source = lazy_of()
    moved = logits.to("meta")[0, 1:]
    assert moved.device.type == "meta" and moved.shape == (3, 11) and source.asked == []
    assert moved.full().device.type == "meta" and source.rows == {1, 2, 3}
    assert logits.to("meta", torch.float16)[:0].dtype == torch.float16


# -- every kind of index -------------------------------------------------------------------------

MASK = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
INDICES = {
    "one number": (0, -1, 5),
    "one example": 1,
    "negative": -1,
    "one position": (slice(None), -1),
    "slices with steps": (slice(None, None, 2), slice(1, 4), slice(0, 11, 3)),
    "nothing": (slice(2, 2),),
    "no token": (0, 0, slice(5, 5)),
    "vocabulary slice": (..., slice(None, 10)),
    "ellipsis": (..., -1),
    "empty tuple": (),
    "all": slice(None),
    "just ellipsis": ...,
    "two ellipses": (..., 1, ...),
    "two ellipses and a list": (..., [1, 0], ...),
    "new axes": (None, 0, None, ..., None),
    "new axis in front": (None,),
    "list": [2, 0, 0],
    "range": range(2),
    "list of tokens": (0, -1, [3, 5]),
    "tokens out of order and twice": (slice(None), -1, [7, 3, 3]),
    "tuple of tokens": (0, -1, (3, 5)),
    "numpy": (np.array([0, 2]), -1, np.array([4, 4])),
    "numpy int": (np.int64(1), np.int32(2)),
    "numpy alone": np.array([1, 0]),
    "numpy 2-d": np.array([[1, 0], [2, 2]]),
    "numpy mask": (np.array([True, False, True]),),
    "per example": (torch.arange(3), -1, torch.tensor([4, 0, 4])),
    "range per example": (range(3), [0, 1, 2], range(3)),
    "rows per example": (torch.arange(3), torch.tensor([3, 1, 1])),
    "outer product": (torch.arange(3)[:, None], -1, torch.tensor([[4, 0]])),
    "two answers each": (torch.arange(3)[:, None], -1, torch.tensor([[4, 0], [1, 2], [3, 3]])),
    "apart, so in front": (torch.tensor([0, 1]), slice(None), torch.tensor([2, 3])),
    "int and list apart": (0, slice(None), [1, 2]),
    "in the middle": (slice(None), [0, 2, 0]),
    "2-d": (slice(None), torch.tensor([[0, 1], [3, 3]])),
    "answers to every position": (slice(None), slice(None), torch.tensor([[0, 1], [9, 9]])),
    "negative ids": (slice(None), torch.tensor([-1, 0]), torch.tensor([-11, 10])),
    "int32": (torch.tensor([2, 1], dtype=torch.int32),),
    "0-d": (torch.tensor(1), torch.tensor(-1), torch.tensor(3)),
    "0-d numpy": np.array(1),
    "0-d int32": (torch.tensor(1, dtype=torch.int32),),
    "0-d in front of a list": (torch.tensor(1), slice(None), [0, 1]),
    "mask": MASK,
    "mask of examples": torch.tensor([True, False, True]),
    "mask of positions": (slice(None), torch.tensor([True, False, False, True])),
    "mask of tokens": (..., torch.arange(D_VOCAB) % 3 == 0),
    "mask and token": (MASK, 5),
    "mask and tokens": (MASK, torch.tensor([1, 2, 3, 4])),
    "mask of nothing": torch.zeros(3, 4, dtype=torch.bool),
    "mask of everything": FULL > 10,
    "list mask": ([True, False, True],),
    "empty list": [],
    "empty list of tokens": (0, slice(None), []),
    "true": True,
    "false": (..., False),
    "0-d mask": torch.tensor(True),
    "new axis before a list": (None, [0, 1], None, 2),
    "bounds that are tensors": slice(torch.tensor(1), None),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_an_index_of_each_kind(index):
    check(lambda x: x[index])


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    "index", [[[0, 1], [2, 2]], [[0, 1]], [slice(1), 2], [torch.tensor(1), 2], [0.5]]
)
def test_lists_that_torch_alone_can_read(index):
    check(lambda x: x[index])


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
def test_masks_of_bytes():
    check(lambda x: x[torch.tensor([1, 0, 1], dtype=torch.uint8)])


@pytest.mark.parametrize(
    "steps",
    [
        (lambda x: x[:, -1], lambda x: x[:, [3, 5]]),
        (lambda x: x[:, -1], lambda x: x[torch.arange(3), torch.tensor([1, 1, 2])]),
        (lambda x: x[0], lambda x: x[-1], lambda x: x[5]),
        (lambda x: x[..., [8, 2]], lambda x: x[:, -1], lambda x: x[1]),
        (lambda x: x[:, :, 5], lambda x: x[:, -1]),
        (lambda x: x[MASK], lambda x: x[1:, [0, 4]]),
        (lambda x: x[None], lambda x: x[0, [2, 2]], lambda x: x[..., 1::2]),
        (lambda x: x[:, None, :, None], lambda x: x[..., -1, 0, [1, 2]]),
        (lambda x: x[:0], lambda x: x[:, 0]),
    ],
)
def test_one_index_after_another(steps):
    check(*steps)


STEPS = {
    "gather": lambda x: x[:, -1].gather(1, torch.tensor([[4, 1], [0, 0], [2, 3]])),
    "gather, torch": lambda x: torch.gather(x, dim=2, index=torch.tensor([[[4], [1]], [[2], [3]]])),
    "gather positions": lambda x: x.gather(1, torch.tensor([[[3, 1]], [[0, 0]]])),
    "gather, last axis": lambda x: x.gather(dim=-1, index=torch.zeros(3, 4, 1, dtype=torch.int64)),
    "gather nothing": lambda x: x.gather(-1, torch.zeros(3, 4, 0, dtype=torch.int64)),
    "select": lambda x: x.select(1, -1),
    "select, torch": lambda x: torch.select(x, dim=2, index=3),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "narrow to nothing": lambda x: x.narrow(2, 4, 0),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 0, 0])),
    "index_select tokens": lambda x: torch.index_select(x, -1, torch.tensor([3, 0])),
    "index_select one": lambda x: x.index_select(dim=0, index=torch.tensor(2)),
    "index_select none": lambda x: x.index_select(0, torch.tensor([], dtype=torch.int64)),
    "squeeze": lambda x: x[:, -1:].squeeze(1),
    "squeeze, negative": lambda x: x[1:2].squeeze(-3),
    "squeeze all": lambda x: x[:1, -1:].squeeze(),
    "squeeze some": lambda x: x[:1, -1:].squeeze((0, 1, 2)),
    "squeeze nothing": lambda x: x.squeeze(2),
    "unsqueeze": lambda x: torch.unsqueeze(x[:, -1], 1),
    "unsqueeze at the end": lambda x: x[:, -1].unsqueeze(-1),
    "detach": lambda x: x[:, 0].detach(),
    "data": lambda x: x[:, 0].data,
    "method": lambda x: Tensor.__getitem__(x, (0, slice(1))),
    "double": lambda x: x[:, -1].double(),
    "float": lambda x: x.float()[:, -1, [0, 1]],
    "to": lambda x: x.to(torch.float16)[0],
    "to, twice": lambda x: x[0].to(dtype=torch.bfloat16).to("cpu", torch.float64),
    "to a tensor": lambda x: x.to(torch.zeros(1, dtype=torch.float64))[1],
    "to long": lambda x: x[0].long(),
    "to a copy": lambda x: x[0].to(torch.float32, copy=True),
    "cpu": lambda x: x.cpu()[0],
    "to a device": lambda x: x.to("cpu", non_blocking=True)[0],
    "clone": lambda x: x[:, 1].clone(),
    "contiguous": lambda x: x[:, :-1].contiguous(),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_functions_that_keep_what_they_can(step):
    check(step)


@pytest.mark.parametrize(
    "step",
    [
        *(STEPS[name] for name in ("select", "narrow", "index_select", "squeeze", "detach", "to")),
        lambda x: x[MASK],
        lambda x: x[..., None, :5],
        lambda x: x.unbind()[1],
        lambda x: next(iter(x)),
    ],
)
def test_they_stay_lazy(step):
    logits, source = lazy_of()
    assert isinstance(step(logits), LazyLogits) and source.asked == []
    # And give what was computed, once it was.
    logits.full()
    assert_same(step(logits), step(FULL))
    assert type(step(logits)) is Tensor and len(source.asked) == 1


def test_one_row_after_the_other():
    logits, source = lazy_of()
    for example, expected in zip(logits, FULL, strict=True):
        assert isinstance(example, LazyLogits)
        assert_same(example[-1], expected[-1])
    assert source.rows == {3, 7, 11} and len(source.asked) == 3
    assert_same(torch.unbind(logits, dim=1)[2][:, 5], FULL[:, 2, 5])
    assert len(source.asked) == 4
    # One number after the other: all of them in one ask.
    assert [float(x) for x in logits[0, :, 3]] == FULL[0, :, 3].tolist()
    assert list(logits[0, 0]) == list(FULL[0, 0])
    assert torch.stack(logits.unbind(-1), dim=-1).equal(FULL)
    assert len(source.asked) == 7


def draw_entry(draw, size):
    return draw(
        st.one_of(
            st.integers(-size, size - 1),
            st.builds(
                slice,
                st.none() | st.integers(-size - 1, size + 1),
                st.none() | st.integers(-size - 1, size + 1),
                st.none() | st.integers(1, 3),
            ),
            st.just(slice(None)),
        )
        if size
        else st.just(slice(None))
    )


@st.composite
def index_of(draw, shape):
    """An index that fits the shape: basic entries, and a group of tensors that broadcast."""
    used = draw(st.integers(0, len(shape)))
    entries = [draw_entry(draw, size) for size in shape[:used]]
    group = draw(st.lists(st.integers(0, 2), min_size=1, max_size=2))
    for axis in range(used):
        if shape[axis] == 0 or draw(st.integers(0, 2)) != 0:
            continue
        kind = draw(st.sampled_from(["tensor", "list", "numpy", "mask"]))
        if kind == "mask":
            mask = draw(st.lists(st.booleans(), min_size=shape[axis], max_size=shape[axis]))
            # The trues of a mask broadcast too: one of them, or as many as the group's last.
            entries[axis] = torch.tensor(mask)
            continue
        own = [draw(st.sampled_from([1, n])) for n in group[draw(st.integers(0, len(group) - 1)) :]]
        ids = draw(
            st.lists(
                st.integers(-shape[axis], shape[axis] - 1),
                min_size=int(np.prod(own)),
                max_size=int(np.prod(own)),
            )
        )
        array = np.array(ids, dtype=np.int64).reshape(own)
        entries[axis] = {"tensor": torch.tensor(array), "numpy": array}.get(kind, array.tolist())
    for new in draw(st.lists(st.integers(0, len(entries)), max_size=2)):
        entries.insert(new, None)
    if draw(st.booleans()):
        entries.insert(draw(st.integers(0, len(entries))), ...)
    return tuple(entries)


@settings(max_examples=100)
@given(data=st.data())
def test_any_chain_of_indices_is_that_of_plain_logits(data):
    steps, at = [], FULL
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(index_of(at.shape))
        step = operator.itemgetter(index)
        try:
            at = step(at)
        except IndexError as error:
            logits, source = lazy_of()
            for one in steps:
                logits = one(logits)
            with pytest.raises(IndexError) as raised:
                step(logits)
            assert str(raised.value) == str(error)
            return
        steps.append(step)
    check(*steps)


@pytest.mark.parametrize(
    "index",
    [
        3,
        (0, 4),
        (0, 0, 11),
        (0, 0, -12),
        (0, 0, 0, 0),
        (..., 11),
        ([0, 3],),
        (slice(None), torch.tensor([0, 4])),
        (0, 0, [11]),
        (slice(None), -1, torch.tensor([5, -12])),
        (torch.arange(3), torch.arange(2)),
        (torch.arange(3), -1, torch.arange(2)),
        torch.ones(4, dtype=torch.bool),
        torch.ones(3, 5, dtype=torch.bool),
        torch.ones(3, 4, 11, 1, dtype=torch.bool),
        (MASK, MASK),
        torch.tensor([0.5]),
        (0, "a"),
        "a",
        0.5,
        (0, torch.tensor(11), 0),
        (slice(None, None, -1),),
        slice(0.5, None),
        torch.tensor([0], dtype=torch.int16),
    ],
)
def test_a_wrong_index_is_refused_in_torchs_own_words(index):
    with pytest.raises((IndexError, TypeError, ValueError)) as expected:
        FULL[index]
    logits, source = lazy_of()
    with pytest.raises(expected.type) as found:
        logits[index]
    assert str(found.value) == str(expected.value) and source.asked == []


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.select(3, 0),
        lambda x: x.select(1, 4),
        lambda x: x.narrow(2, 8, 9),
        lambda x: x.unsqueeze(5),
        lambda x: x.index_select(3, torch.tensor([0])),
        lambda x: x.index_select(0, torch.tensor([3])),
        lambda x: x.index_select(2, torch.tensor([0, -1])),
        lambda x: x.gather(2, torch.tensor([[[11]]])),
        lambda x: x.gather(2, torch.zeros(4, 1, 1, dtype=torch.int64)),
        lambda x: x.gather(1, torch.tensor([0])),
        lambda x: x.unbind(3),
        lambda x: x.to("nowhere"),
        lambda x: x.nothing(),
    ],
)
def test_wrong_arguments_are_refused_as_torch_does(step):
    with pytest.raises(Exception) as expected:
        step(FULL)
    with pytest.raises(expected.type):
        step(lazy_of()[0])


# -- everything else -----------------------------------------------------------------------------

OTHERS = {
    "cat": lambda x: torch.cat([x[:, -1], torch.ones(3, 11)]),
    "stack": lambda x: torch.stack([x[0], x[1]], dim=1),
    "difference": lambda x: x[:, 0] - x[:, 1],
    "plain first": lambda x: torch.ones(11) - x[0, 0],
    "number first": lambda x: 1 - x[0, 0],
    "cross entropy": lambda x: F.cross_entropy(x.flatten(0, 1), torch.arange(12) % 11),
    "log softmax": lambda x: x.log_softmax(-1)[:, -1, 5],
    "softmax": lambda x: x[:, -1].softmax(-1)[:, 5],
    "argmax": lambda x: x[:, -1].argmax(-1),
    "max": lambda x: x.max(dim=-1).values,
    "topk": lambda x: torch.topk(x[0], 2).indices,
    "einsum": lambda x: torch.einsum("bpv,v->bp", x, torch.ones(11)),
    "einops": lambda x: einops.rearrange(x, "b p v -> (b p) v"),
    "einops reduce": lambda x: einops.reduce(x[:, -1], "b v -> b", "mean"),
    "matmul": lambda x: x @ torch.ones(11, 2),
    "view": lambda x: x.view(-1, 11),
    "transpose": lambda x: x[0].T,
    "comparison": lambda x: (x[:, -1] > 0).float().mean(),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "power": lambda x: x[0] ** 2,
    "negative": lambda x: -x[:, 0],
    "std": lambda x: x.std(),
    "copy": lambda x: copy.copy(x[0]),
    "deepcopy": lambda x: copy.deepcopy({"logits": x[0]})["logits"],
    "from numpy": lambda x: torch.from_numpy(x[0].numpy()),
    "as array": lambda x: torch.from_numpy(np.asarray(x)),
    "numpy function": lambda x: torch.tensor(np.exp(np.array(x[0]))),
    "tensor": lambda x: torch.tensor(x[0].tolist()),
    "list of rows": lambda x: torch.stack([row[-1] for row in x]),
    "zeros_like": torch.zeros_like,
    "apply to an index": lambda x: torch.arange(11)[x[0, 0].long().clamp(0, 10)],
    "vmap": lambda x: torch.vmap(lambda row: row.sum())(x),
    "jit": lambda x: torch.jit.trace(lambda y: y[0].sum(), FULL)(x),
    "dropout": lambda x: F.dropout(x, 0.0),
    "into a tensor": lambda x: torch.zeros(3, 11).copy_(x[:, -1]).add_(x[:, 0]),
    "gather out=": lambda x: torch.gather(x[0], 0, TOKENS[:1] % 4, out=torch.zeros(1, 4)),
    "out=": lambda x: torch.add(x[0], 1, out=torch.zeros(4, 11)),
}


@pytest.mark.parametrize("step", OTHERS.values(), ids=OTHERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_any_other_function_runs_on_plain_logits(step):
    found = step(lazy_of()[0])
    assert_same(found, step(FULL))
    assert type(found) is Tensor


@pytest.mark.parametrize(
    "step",
    [
        torch.as_tensor,
        lambda x: x[0, 0, x[:, 0, :2].long()],
        lambda x: x.gather(2, x[..., :2].long()),
        lambda x: x.index_select(2, x[0, 0, :2].long()),
    ],
)
def test_lazy_arguments(step):
    ids = torch.arange(132.0).view(3, 4, 11) % 11
    assert_same(step(lazy_of(ids)[0]), step(ids))


def test_what_is_no_tensor():
    logits, _ = lazy_of()
    assert repr(logits[0]) == repr(FULL[0]) and str(logits[:, -1]) == str(FULL[:, -1])
    assert f"{logits[0, 0, 1]:.3f}" == f"{FULL[0, 0, 1]:.3f}"
    assert logits[0, 0, 1].item() == float(logits[0, 0, 1]) == FULL[0, 0, 1].item()
    assert float(logits[:1, 0, 1]) == FULL[0, 0, 1].item()
    assert logits.stride() == FULL.stride() and logits.is_contiguous()
    assert logits.type() == "torch.FloatTensor"
    assert 0.1 not in logits and float(FULL[0, 0, 0]) in logits
    file = io.BytesIO()
    torch.save(logits, file)
    file.seek(0)
    assert torch.equal(torch.load(file), FULL)
    assert torch.equal(pickle.loads(pickle.dumps(logits)), FULL)
    assert plain({"a": [logits, (logits[0], 1)]})["a"][1][0].equal(FULL[0])


def test_what_was_computed_is_kept():
    logits, source = lazy_of()
    last = logits[:, -1]
    assert_same(last.softmax(-1), FULL[:, -1].softmax(-1))
    assert_same(last.argmax(-1), FULL[:, -1].argmax(-1))
    assert_same(last[:, 3] - last[:, 4], FULL[:, -1, 3] - FULL[:, -1, 4])
    assert last.full() is last.full()
    assert len(source.asked) == 1 and source.rows == {3, 7, 11}


def test_operations_that_torch_dispatches_below_its_functions():
    logits, source = lazy_of()
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(logits.sum(-1), FULL.sum(-1))
        assert len(source.asked) == 1
        with pytest.raises(MetricError, match="in place"):
            logits.mul_(2)
        with pytest.raises(MetricError, match="in place"):
            torch.add(FULL, 1, out=logits)


# -- metrics must be pure ------------------------------------------------------------------------


def subtract(x):
    x -= 1


def assign_to_examples(x):
    for row in x:
        row[0] = 1


WRITES = [
    lambda x: operator.setitem(x, (0, 0, 0), 1),
    lambda x: operator.setitem(x[:, -1], (..., 5), -torch.inf),
    lambda x: x.sub_(x.mean()),
    lambda x: torch.relu_(x[0]),
    lambda x: F.relu(x[0].detach()).add_(1) + torch.sigmoid_(x),
    subtract,
    assign_to_examples,
    lambda x: subtract(x[:, -1]),
    lambda x: subtract(x.float()),
    lambda x: torch.add(FULL, 1, out=x),
    lambda x: torch.max(FULL, -1, out=(x[..., 0], torch.zeros(3, 4, dtype=torch.int64))),
    lambda x: x.requires_grad_(),
    lambda x: setattr(x, "requires_grad", True),
    lambda x: x.unsqueeze(0).zero_(),
]


@pytest.mark.parametrize("write", WRITES)
def test_writing_into_the_logits_is_refused(write):
    logits, _ = lazy_of()
    with pytest.raises(MetricError, match=r"in place \(.*clone\(\)"):
        write(logits)
    assert_same(logits, FULL)


@pytest.mark.parametrize(
    ("view", "again"),
    [
        (lambda x: x.view(-1), lambda x: x[0, 0, 0]),
        (lambda x: x[:, -1].reshape(33), lambda x: x[:, 0]),
        (lambda x: x[:, -1].T, lambda x: x.softmax(-1)),
        (lambda x: x[0].mT, lambda x: x.gather(1, torch.zeros(3, 1, 1, dtype=torch.int64))),
        (lambda x: x[0].flatten(), lambda x: x.double()),
        (lambda x: x[0].flatten(), lambda x: next(iter(x))),
        (lambda x: [x.full(), x[0]][1], lambda x: x[0]),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_reading_again_what_was_written_through_a_view_is_refused(view, again, grad):
    with torch.set_grad_enabled(grad):
        logits, _ = lazy_of()
        changed = view(logits)
        assert type(changed) is Tensor
        again(logits)
        changed += 1
        with pytest.raises(MetricError, match="through a view.*clone"):
            again(logits)


def test_a_view_may_be_written_to_where_the_logits_are_not_read_again():
    """As here: what is seen is what plain logits would show."""

    def metric(x):
        last = einops.rearrange(x[:, -1], "b v -> (b v)")
        last -= last.max()
        last.exp_()
        return last.mean()

    assert_same(metric(lazy_of()[0]), metric(FULL.clone()))


@pytest.mark.parametrize(
    "copied",
    [
        lambda x: x.clone(),
        lambda x: x[:, -1].clone(),
        lambda x: x.to(torch.float32, copy=True),
        lambda x: x.double()[:, -1].float(),
        lambda x: x[:, -1].half().float(),
        lambda x: x.double().float()[:, -1],
        lambda x: x[[0, 1, 2]],
        lambda x: x[[0, 1, 2]][1:, -1],
        lambda x: x[MASK],
        lambda x: x[:, -1, [3, 4, 5]],
        lambda x: x[torch.arange(3), -1].log_softmax(-1),
        lambda x: x.index_select(1, torch.tensor([0, 1])),
        lambda x: x.gather(1, torch.zeros(3, 2, 11, dtype=torch.int64)),
        lambda x: x[torch.arange(3), -1, torch.arange(3)][None],
        lambda x: x.softmax(-1),
        copy.deepcopy,
    ],
)
def test_copies_are_the_metrics_own(copied):
    def metric(x):
        own = copied(x)
        own[0] = own[0] * 2 - 1
        own += 1
        own[0].sub_(3)
        return torch.stack([own.sum(), x.sum(), x[0, 0, 0]])

    assert_same(metric(lazy_of()[0]), metric(FULL.clone()))


def test_a_copy_that_two_tensors_look_into_is_not_written_to():
    """Neither would see what is written into the other, if each is computed on its own."""
    logits, _ = lazy_of()
    own = logits[[0, 1]]
    last = own[:, -1]
    number = own[0, 0, 0]
    for write in (lambda: own.add_(1), lambda: last.add_(1), lambda: subtract(own)):
        with pytest.raises(MetricError, match="clone"):
            write()
    flat = last.view(-1)
    del last, number
    with pytest.raises(MetricError, match="clone"):
        own += 1
    del flat
    own += 1
    assert_same(own, FULL[[0, 1]] + 1)
    own = logits.double()
    last = own[:, -1]
    for one in (own, last):
        with pytest.raises(MetricError, match="clone"):
            one += 1
    changed = last.view(-1)
    changed += 1
    with pytest.raises(MetricError, match="through a view"):
        own.sum()
    assert_same(last, FULL[:, -1].double() + 1)


def test_what_is_not_tracked_in_inference_mode():
    with torch.inference_mode():
        logits, _ = lazy_of(FULL.clone())
        assert_same(logits[:, -1].softmax(-1), FULL[:, -1].softmax(-1))
        own = logits.double()
        own += 1
        assert_same(own, FULL.double() + 1)


def test_what_is_kept_of_an_index_outlives_inference_mode():
    """Autograd refuses ids that were made in it."""
    leaf = torch.ones(5, 2, 3, requires_grad=True)

    def metric(x):
        return (x[[4, 0, 4]][:, 0].sum(-1) * x[range(3), [1, 1, 0], [0, 2, 2]]).sum()

    with torch.inference_mode():
        metric(lazy_of(leaf.detach())[0])
    metric(lazy_of(leaf)[0]).backward()
    assert leaf.grad.abs().sum() > 0


# -- what it costs -------------------------------------------------------------------------------


def test_an_index_is_worked_out_once_for_all_runs(monkeypatch):
    """A sweep calls a metric for each run, with other logits and the same indices."""
    answers, wrong = torch.tensor([1, 5, 2]), [3, 3, 4]

    def metric(x):
        ids = answers[:, None]
        last = x[:, -1].gather(1, ids)[:, 0] - x[torch.arange(3), -1, wrong]
        return last + x[0, -1, 3] + x[..., 1:3][:, 0].sum() + x.select(dim=0, index=1)[2, 3]

    expected = metric(FULL)
    assert_same(metric(lazy_of()[0]), expected)
    with monkeypatch.context() as patch:
        patch.setattr("fastlens.patching.logit_index.LogitIndex.__init__", None)
        logits, source = lazy_of(FULL + 1)
        assert_same(metric(logits), metric(FULL + 1))
        assert len(source.asked) == 5
    # What an index names is known by its content.
    answers[0] = 7
    assert_same(metric(lazy_of()[0]), metric(FULL))
    assert not torch.equal(metric(FULL), expected)


def test_like_looking_indices_are_not_taken_for_each_other():
    pairs = [
        (1, True),
        (([0, 1],), ((0, 1),)),
        (([True, False, True],), ([1, 0, 1],)),
        (torch.tensor([1, 0, 1]), torch.tensor([1, 0, 1]).bool()),
        (torch.tensor([0, 1]), torch.tensor([[0], [1]])),
        (torch.tensor([1, 0], dtype=torch.int32), torch.tensor([1])),
        (np.array([0, 1]), torch.tensor([1, 0])),
        (slice(1), (1,)),
        (np.array([True, False, True]), np.array([1, 0, 1], dtype=np.int8)),
        (slice(None, 2), slice(2, None)),
    ]
    for index in [one for pair in pairs for one in (*pair, *reversed(pair))]:
        assert_same(lazy_of()[0][index], FULL[index])


# -- what a metric reads -------------------------------------------------------------------------

LAST = {3, 7, 11}
ALL_ROWS = set(range(12))
IO, S = torch.tensor([2, 5, 7]), torch.tensor([4, 4, 0])
ANSWERS = torch.stack([IO, S], dim=1)
CLEAN = F.log_softmax(FULL[:, -1] * 0.1, dim=-1)
ENDS = torch.tensor([1, 3, 2])


def ioi_logit_diff(logits):
    return logits[0, -1, 2] - logits[0, -1, 4]


def logits_to_ave_logit_diff(logits, per_prompt=False):
    final_logits = logits[:, -1, :]
    answer_logits = final_logits.gather(dim=-1, index=ANSWERS)
    diff = answer_logits[:, 0] - answer_logits[:, 1]
    return diff if per_prompt else diff.mean()


def ioi_metric(logits):
    return (logits_to_ave_logit_diff(logits) - 0.5) / (2.0 - 0.5)


def at_each_end(logits):
    io_logits = logits[range(logits.size(0)), ENDS, IO]
    return io_logits - logits[range(logits.size(0)), ENDS, S]


def batched_answers(logits):
    return (logits[:, -1, IO] - logits[:, -1, S]).diagonal().mean()


def prob_of_answer(logits):
    return logits[:, -1].softmax(dim=-1)[torch.arange(len(IO)), IO]


def kl_at_the_end(logits):
    log_probs = F.log_softmax(logits[:, -1, :], dim=-1)
    return F.kl_div(log_probs, CLEAN, log_target=True, reduction="none").sum(-1).mean()


def lm_loss(logits):
    log_probs = F.log_softmax(logits, dim=-1)
    predicted = log_probs[..., :-1, :].gather(dim=-1, index=TOKENS[..., 1:, None])[..., 0]
    return -predicted.mean()


def hugging_face_loss(logits):
    shifted = logits[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, shifted.size(-1)), TOKENS[:, 1:].reshape(-1))


def top_1_accuracy(logits):
    return (logits[:, -1].argmax(dim=-1) == IO).float()


def year_greater_than(logits):
    probs = logits[:, -1, :].float().softmax(-1)
    return (probs[:, 6:].sum(-1) - probs[:, :6].sum(-1)).mean()


def copying_of_the_first_half(logits):
    rows = logits[:, N_POS // 2 :].log_softmax(-1)
    return torch.gather(rows, -1, TOKENS[:, :2, None]).squeeze(-1).mean(-1)


def rank_of_answer(logits):
    last = logits[0, -1]
    return (last > last[2]).sum().float()


def shape_only(logits):
    return torch.tensor(float(logits.shape[0]))


@pytest.mark.parametrize(
    ("metric", "rows", "columns", "n_asks"),
    [
        (ioi_logit_diff, {3}, {2, 4}, 2),
        (logits_to_ave_logit_diff, LAST, {0, 2, 4, 5, 7}, 1),
        (lambda x: logits_to_ave_logit_diff(x, per_prompt=True), LAST, {0, 2, 4, 5, 7}, 1),
        (ioi_metric, LAST, {0, 2, 4, 5, 7}, 1),
        (at_each_end, {1, 7, 10}, {0, 2, 4, 5, 7}, 2),
        (batched_answers, LAST, {0, 2, 4, 5, 7}, 2),
        (prob_of_answer, LAST, None, 1),
        (kl_at_the_end, LAST, None, 1),
        (lm_loss, ALL_ROWS, None, 1),
        (hugging_face_loss, ALL_ROWS - LAST, None, 1),
        (top_1_accuracy, LAST, None, 1),
        (year_greater_than, LAST, None, 1),
        (copying_of_the_first_half, {2, 3, 6, 7, 10, 11}, None, 1),
        (rank_of_answer, {3}, None, 2),
        (logit_diff([2, 5, 7], [4, 4, 0]), LAST, {0, 2, 4, 5, 7}, 2),
        (logit_diff(2, 4, position=1), {1, 5, 9}, {2, 4}, 2),
        (answer_prob(2), LAST, None, 1),
        (kl_divergence().with_clean(FULL), LAST, None, 1),
        (lambda x: x[:, -1, 5], LAST, {5}, 1),
        (lambda x: x[0, -1, :].max() - x[0, -1, 3], {3}, None, 2),
        (shape_only, set(), set(), 0),
    ],
)
def test_reads_of_metrics_as_people_write_them(metric, rows, columns, n_asks):
    reads, value = reads_of(metric, BATCH, N_POS, D_VOCAB, FULL.dtype, FULL.device)
    zeros = torch.zeros(BATCH, N_POS, D_VOCAB)
    assert_same(value, metric(zeros))
    assert type(value) is Tensor
    assert reads.rows.tolist() == sorted(rows)
    assert (reads.columns if columns is None else set(reads.columns.tolist())) == columns
    logits, source = lazy_of()
    assert_same(metric(logits), metric(FULL))
    assert source.rows == rows and source.columns == (
        set(range(11)) if columns is None else columns
    )
    assert len(source.asked) == n_asks


def test_reads_are_a_union():
    source = RecordingSource(5, torch.bfloat16, torch.device("cpu"))
    assert isinstance(source, LogitSource)
    assert source.reads.rows.tolist() == source.reads.columns.tolist() == []
    logits = LazyLogits(source, 2, 3, 5)
    assert_same(logits[1, [0, 2], 4], torch.zeros(2, dtype=torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    assert source.reads.rows.tolist() == [3, 5] and source.reads.columns.tolist() == [4]
    assert logits[0, 0, 1].dtype == torch.bfloat16
    assert source.reads.rows.tolist() == [0, 3, 5] and source.reads.columns.tolist() == [1, 4]
    assert float(logits[0, 1, [0, 2, 3]].sum()) == 0.0
    assert source.reads.rows.tolist() == [0, 1, 3, 5] and source.reads.columns is None
    assert source.block(torch.tensor([2]), None).shape == (1, 5)
    assert source.reads.rows.tolist() == [0, 1, 2, 3, 5] and source.reads.columns is None


@pytest.mark.parametrize(
    ("metric", "error"),
    [
        (lambda x: x[0, 5], IndexError),
        (lambda x: 1 / 0, ZeroDivisionError),
        (lambda x: x.sub_(1), MetricError),
    ],
)
def test_a_metric_that_fails_predicts_nothing(metric, error):
    reads, raised = reads_of(metric, 1, 4, 9, torch.float32, torch.device("cpu"))
    assert reads is None and isinstance(raised, error)


def test_an_interrupt_is_not_swallowed():
    def metric(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reads_of(metric, 1, 4, 9, torch.float32, torch.device("cpu"))


def test_values_of_a_metric_are_computed_wherever_they_are():
    reads, value = reads_of(
        lambda x: {"a": x[:, -1, 5], "b": [x[0, 0]]}, 2, 3, 9, torch.float64, torch.device("cpu")
    )
    assert reads.rows.tolist() == [0, 2, 5] and reads.columns is None
    assert type(value["a"]) is type(value["b"][0]) is Tensor


# -- logits on another device --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "step",
    [
        *(lambda x, index=index: x[index] for index in INDICES.values()),
        # The others take their ids from the logits' device only.
        *(step for name, step in STEPS.items() if not name.startswith(("gather", "index_select"))),
        lambda x: x[:, -1, IO.to(x.device)],
        lambda x: x[MASK.to(x.device)][:, IO.to(x.device)],
        lambda x: x[torch.arange(3, device=x.device), -1, IO.to(x.device)],
        lambda x: x[0, torch.tensor(1, device=x.device)],
        lambda x: x[:, -1].gather(1, ANSWERS.to(x.device)),
        lambda x: x.index_select(0, IO.to(x.device) % 3),
        lambda x: x.cpu()[:, -1],
        lambda x: x[0].to("cpu", torch.float64).log_softmax(-1),
        lambda x: x - torch.ones_like(x[0]),
        lambda x: x.new_tensor([1.0]),
    ],
)
def test_on_a_gpu(step):
    expected = step(FULL.cuda())
    found = step(LazyLogits(GpuLogits(), *FULL.shape))
    assert found.device == expected.device
    assert_same(found, expected)


class GpuLogits(LogitSource):
    """The known logits, on the GPU."""

    def __init__(self):
        self.logits = FULL.cuda().flatten(0, 1)
        self.dtype, self.device = self.logits.dtype, self.logits.device

    def block(self, rows, columns):
        block = self.logits[rows.to(self.device)]
        return block if columns is None else block[:, columns.to(self.device)]
