import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlens.errors import ShapeError
from fastlens.slices import Slice, whole_numbers

LENGTH = 6
index = st.integers(-LENGTH, LENGTH - 1)
edge = st.none() | st.integers(-LENGTH - 2, LENGTH + 2)
tuples = (
    st.tuples(edge)
    | st.tuples(edge, edge)
    | st.tuples(edge, edge, st.none() | st.sampled_from([-3, -2, -1, 1, 2, 3]))
)
lists = st.lists(index, max_size=5)


def axis_last() -> torch.Tensor:
    return torch.arange(2 * LENGTH * 3).reshape(2, LENGTH, 3)


@given(index)
def test_an_int_drops_the_axis(i: int):
    x = axis_last()
    assert Slice(i).mode == "int"
    assert torch.equal(Slice(i).apply(x, dim=1), x[:, i])
    assert torch.equal(Slice(np.int64(i)).apply(x, dim=-2), x[:, i])
    assert torch.equal(Slice(torch.tensor(i)).apply(x, dim=1), x[:, i])
    assert Slice(torch.tensor(i)).mode == Slice(np.array(i)).mode == "int"


@given(tuples)
def test_a_tuple_is_a_python_slice(parts: tuple):
    x = axis_last()
    chosen = Slice(parts)
    want = x.numpy()[:, slice(*parts)]
    assert chosen.mode == "slice"
    assert np.array_equal(chosen.apply(x, dim=1).numpy(), want)
    assert np.array_equal(chosen.apply(x, dim=-2).numpy(), want)
    assert np.array_equal(chosen.indices(LENGTH), np.arange(LENGTH)[slice(*parts)])
    assert np.array_equal(Slice(slice(*parts)).apply(x, dim=1).numpy(), want)


@given(lists)
def test_lists_arrays_and_tensors_choose_entries(chosen: list[int]):
    x = axis_last()
    want = x.numpy()[:, np.array(chosen, dtype=int)]
    for form in (chosen, np.array(chosen, dtype=int), torch.tensor(chosen, dtype=torch.long)):
        assert Slice(form).mode == "array"
        assert np.array_equal(Slice(form).apply(x, dim=1).numpy(), want)
    assert np.array_equal(Slice(chosen).indices(LENGTH), np.arange(LENGTH)[np.array(chosen, int)])


@given(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH))
def test_a_mask_chooses_where_it_is_true(mask: list[bool]):
    x = axis_last()
    want = x[:, torch.tensor(mask)]
    for form in (mask, np.array(mask), torch.tensor(mask)):
        assert torch.equal(Slice(form).apply(x, dim=1), want)


def test_none_is_everything_and_views_are_views():
    x = axis_last()
    assert Slice().mode == Slice(None).mode == "identity"
    for chosen in (None, 2, (1, 4)):
        assert Slice(chosen).apply(x, dim=1).untyped_storage().data_ptr() == x.data_ptr()
    assert torch.equal(Slice().apply(x, dim=1), x)


def test_unwrap_keeps_the_axis_of_an_int():
    x = axis_last()
    assert Slice.unwrap(3).apply(x, dim=1).shape == (2, 1, 3)
    assert Slice.unwrap(np.int64(3)).mode == "array"
    assert Slice.unwrap((1, 4)).apply(x, dim=1).shape == (2, 3, 3)
    made = Slice(3)
    assert Slice.unwrap(made) is made


@pytest.mark.parametrize(
    "wrong", [True, np.array([1.0]), torch.tensor(1.0), torch.tensor(True), (), (0, 1, 2, 3)]
)
def test_anything_else_is_refused(wrong):
    with pytest.raises(ShapeError, match="cannot slice with"):
        Slice(wrong)


def test_indices_need_the_length_unless_an_int():
    assert Slice(-1).indices().tolist() == [-1]
    with pytest.raises(ShapeError, match="max_ctx"):
        Slice((1, 2)).indices()


@pytest.fixture(scope="module")
def tl():
    return pytest.importorskip("transformer_lens.utilities")


# TransformerLens fails on negative steps and on empty lists.
forward_tuples = tuples.filter(lambda parts: len(parts) < 3 or (parts[2] or 1) > 0)


@pytest.mark.tl
@given(st.none() | index | forward_tuples | lists.filter(bool))
def test_same_as_transformer_lens(tl, chosen):
    x = axis_last()
    ours, theirs = Slice(chosen), tl.Slice(chosen)
    assert ours.mode == theirs.mode
    assert repr(ours) == repr(theirs)
    assert torch.equal(ours.apply(x, dim=-2), theirs.apply(x, dim=-2))
    assert np.array_equal(ours.indices(LENGTH), theirs.indices(LENGTH))
    unwrapped = Slice.unwrap(chosen).apply(x, 1)
    assert torch.equal(unwrapped, tl.Slice.unwrap(chosen).apply(x, 1))


@pytest.mark.parametrize(
    "given", [[0, 5], (0, 5), range(0, 6, 5), np.array([0, 5]), torch.tensor([0, 5])], ids=str
)
def test_whole_numbers(given):
    assert whole_numbers(given, "heads") == [0, 5]


@pytest.mark.parametrize(
    "given",
    [3, "3", [True], [1.5], torch.tensor([True]), np.array([1.5]), torch.tensor(3), {"a": 1}],
    ids=str,
)
def test_what_is_no_list_of_whole_numbers(given):
    with pytest.raises(ShapeError, match="heads=.*give a list of whole numbers"):
        whole_numbers(given, "heads")
