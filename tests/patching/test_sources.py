"""New values: of the other prompts, of numbers, tensors and caches, entry by entry."""

import numpy as np
import pytest
import torch

from fastlens.patching.sources import Source, applied
from fastlens.patching.uses import Entries
from tests.close import assert_close_to

BATCH, T, H, D = 3, 5, 4, 8
SIZES = {"pos": T, "query_pos": T, "key_pos": T, "head": H, "neuron": 6, "width": D, "batch": BATCH}


def entries(
    pos, column=None, pos_rank=None, column_rank=None, selected=(None, None, None), keys=None
):
    def array(values):
        return None if values is None else np.array(values, dtype=np.int64)

    return Entries(
        branch=np.zeros(len(pos), dtype=np.int64),
        pos=array(pos),
        column=array(column),
        pos_rank=array(pos if pos_rank is None else pos_rank),
        column_rank=array(column if column_rank is None else column_rank),
        selected=selected,
        keys=keys,
        value=1,
        mode="replace",
    )


def values_of(source, site, where, example, like=None):
    like = torch.empty(0, dtype=torch.float64) if like is None else like
    return source.of_entries(site, 1, where, torch.tensor(example), SIZES, like)


# -- from the other prompt -----------------------------------------------------------------------

OTHER = torch.arange(BATCH * 2.0).view(BATCH, 2)
EXAMPLE = torch.tensor([2, 0, 0])


def read(of):
    """The others' value at three entries: entry i reads place ``i % 2``."""
    return OTHER[of, torch.tensor([0, 1, 0])]


def test_the_same_example():
    assert Source("other", "").of_examples(read, EXAMPLE, BATCH).tolist() == [4.0, 1.0, 0.0]


def test_another_example():
    source = Source("resample", "", permutation=torch.tensor([1, 2, 0]))
    assert source.of_examples(read, EXAMPLE, BATCH).tolist() == [0.0, 3.0, 2.0]


def test_the_mean_over_examples():
    assert Source("mean", "").of_examples(read, EXAMPLE, BATCH).tolist() == [2.0, 3.0, 2.0]


def test_which_sources_read_the_other_prompt():
    kinds = ["other", "resample", "mean", "number", "tensor", "cache"]
    assert [Source(kind, "").reads_other for kind in kinds] == [True] * 3 + [False] * 3


# -- given ---------------------------------------------------------------------------------------


def test_a_number():
    assert values_of(Source("number", "", number=0.5), "z", entries([0]), [0]) == 0.5


def test_a_tensor_over_the_selection():
    """Ranks in the selection, not positions, say which value an entry takes."""
    given = torch.randn(BATCH, 2, 3, D, dtype=torch.float64)
    where = entries([4, 1], [0, 2], [1, 0], [2, 1], (2, 3, None))
    found = values_of(Source("tensor", "", tensor=given), "z", where, [2, 0])
    assert torch.equal(found, torch.stack([given[2, 1, 2], given[0, 0, 1]]))


@pytest.mark.parametrize("shape", [(D,), (1,), (H, 1), (T, 1, D), (BATCH, 1, 1, 1), ()])
def test_a_tensor_is_broadcast(shape):
    given = torch.randn(shape, dtype=torch.float64)
    full = given.expand(BATCH, T, H, D)
    found = values_of(Source("tensor", "", tensor=given), "z", entries([3, 1], [2, 0]), [1, 2])
    assert torch.equal(found, torch.stack([full[1, 3, 2], full[2, 1, 0]]))


def test_whole_rows_of_a_tensor():
    given = torch.randn(H, D, dtype=torch.float64)
    found = values_of(Source("tensor", "", tensor=given), "z", entries([3, 1]), [1, 2])
    assert torch.equal(found, given.expand(2, H, D))
    stream = torch.randn(T, D, dtype=torch.float64)
    found = values_of(Source("tensor", "", tensor=stream), "resid_pre", entries([3, 1]), [1, 2])
    assert torch.equal(found, stream[[3, 1]])


def test_neurons_have_no_width():
    given = torch.randn(BATCH, 1, 2, dtype=torch.float64)
    where = entries([4, 1], [5, 0], [0, 0], [1, 0], (None, 2, None))
    found = values_of(Source("tensor", "", tensor=given), "mlp_post", where, [2, 0])
    assert found.tolist() == [given[2, 0, 1].item(), given[0, 0, 0].item()]


def test_heads_come_first_in_a_pattern():
    given = torch.randn(BATCH, 1, 2, 3, dtype=torch.float64)
    where = entries([4, 1], [3, 3], [1, 0], [0, 0], (2, 1, 3), (0, 2, 4))
    found = values_of(Source("tensor", "", tensor=given), "pattern", where, [2, 0])
    assert torch.equal(found, torch.stack([given[2, 0, 1], given[0, 0, 0]]))


def test_a_cache_is_read_at_the_place_itself():
    name = "blocks.1.attn.hook_z"
    cache = {name: torch.randn(BATCH, T, H, D, dtype=torch.float64)}
    source = Source("cache", "", cache=cache)
    where = entries([4, 1], [0, 2], [0, 1], [0, 0], (2, 1, None))
    found = values_of(source, "z", where, [2, 0])
    assert torch.equal(found, torch.stack([cache[name][2, 4, 0], cache[name][0, 1, 2]]))
    assert torch.equal(values_of(source, "z", entries([4]), [2])[0], cache[name][2, 4])


def test_a_cache_of_patterns():
    name = "blocks.1.attn.hook_pattern"
    cache = {name: torch.randn(BATCH, H, T, T, dtype=torch.float64)}
    where = entries([4, 1], [0, 2], selected=(2, 1, 1), keys=(3,))
    found = values_of(Source("cache", "", cache=cache), "pattern", where, [2, 0])
    # All keys: whoever patches only some picks them.
    assert torch.equal(found, torch.stack([cache[name][2, 0, 4], cache[name][0, 2, 1]]))


def test_values_take_the_dtype_of_the_run():
    like = torch.empty(0, dtype=torch.float32)
    given = torch.full((D,), 1 / 3, dtype=torch.float64)
    found = values_of(Source("tensor", "", tensor=given), "z", entries([0], [0]), [0], like)
    assert found.dtype == torch.float32
    cache = {"blocks.1.attn.hook_z": torch.zeros(BATCH, T, H, D, dtype=torch.float16)}
    found = values_of(Source("cache", "", cache=cache), "z", entries([0], [0]), [0], like)
    assert found.dtype == torch.float32


# -- what is done with them ----------------------------------------------------------------------


def test_modes():
    old, new = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])
    assert applied(old, new, "replace") is new
    assert_close_to(applied(old, new, "add"), [7.0, 10.0])
    assert_close_to(applied(old, new, "scale"), [10.0, 21.0])
    assert applied(old, 0.5, "replace") == 0.5
    assert_close_to(applied(old, 0.5, "add"), [2.5, 3.5])
    assert_close_to(applied(old, 0.5, "scale"), [1.0, 1.5])
