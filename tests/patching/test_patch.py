"""`Patch`: what it becomes, and every sentence with which one is refused."""

import re

import pytest
import torch

from fastlens.errors import SweepError
from fastlens.patching.patch import (
    NAMED,
    Patch,
    Sources,
    check_mode,
    check_run,
    explicit_runs,
    planned,
    sizes_of,
)
from fastlens.patching.runs import PlannedPatch, Run
from fastlens.patching.sites import SITES
from tests.models import ours, prompts

BATCH, T = 3, 5


def sources(batch=BATCH, n_pos=T, seed=0) -> Sources:
    return Sources(batch, n_pos, seed)


def made(patch, name="gpt2") -> PlannedPatch:
    return planned(patch, ours(name), sources())


def with_source(patch, source) -> Patch:
    """The same patch, its source not checked for its type, as in use."""
    changed = Patch(**{**vars(patch), "source": "other"})
    object.__setattr__(changed, "source", source)
    return changed


# -- what a patch becomes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        (Patch("resid_pre", 0), PlannedPatch("resid_pre", 0)),
        (Patch("resid_pre", -1, pos=-1), PlannedPatch("resid_pre", 2, pos=(4,))),
        (Patch("z", 1, head=[3, -4]), PlannedPatch("z", 1, columns=(3, 0))),
        (Patch("z", 1, pos=slice(1, 3), head=2), PlannedPatch("z", 1, (1, 2), (2,))),
        (Patch("mlp_post", 1, neuron=-1), PlannedPatch("mlp_post", 1, columns=(127,))),
        (Patch("post", 1, neuron=[0]), PlannedPatch("mlp_post", 1, columns=(0,))),
        (
            Patch("pattern", 1, pos=-1, head=0, key_pos=range(2)),
            PlannedPatch("pattern", 1, (4,), (0,), (0, 1)),
        ),
        (Patch("hook_attn", 1), PlannedPatch("pattern", 1)),
        (Patch("z", 1, source="zero"), PlannedPatch("z", 1, value=1)),
        (Patch("z", 1, source=2, mode="scale"), PlannedPatch("z", 1, value=1, mode="scale")),
    ],
)
def test_planned(patch, expected):
    assert made(patch) == expected


def test_kv_heads_are_counted_under_grouping():
    assert made(Patch("k", 0, head=-1), "llama").columns == (1,)
    assert made(Patch("q", 0, head=-1), "llama").columns == (3,)
    with pytest.raises(SweepError, match="head 2 is out of range: there are 2"):
        made(Patch("v", 0, head=2), "llama")


def test_sizes_of_axes():
    cfg = ours("llama").cfg
    sizes = {"pos": T, "query_pos": T, "key_pos": T, "head": 2, "neuron": 48}
    assert sizes_of(SITES["k"], cfg, T) == sizes
    assert sizes_of(SITES["z"], cfg, T) == {**sizes, "head": 4}


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (Patch("resid_pr", 0), "no site 'resid_pr'. Nearest: 'resid_pre'"),
        (Patch("rot_q", 0), "this model has no rot_q"),
        (Patch("z", 3), "layer 3 is out of range: there are 3"),
        (Patch("z", -4), "layer -4 is out of range: there are 3"),
        (Patch("z", 0, head=4), "head 4 is out of range: there are 4"),
        (Patch("z", 0, head=[1, -3]), "head selection [1, -3] is empty or names an index twice"),
        (Patch("z", 0, pos=[]), "pos selection [] is empty"),
        (Patch("z", 0, pos=5), "pos 5 is out of range: there are 5"),
        (Patch("pattern", 0, pos=5), "pos 5 is out of range: there are 5"),
        (Patch("pattern", 0, key_pos=-6), "key_pos -6 is out of range: there are 5"),
        (Patch("mlp_post", 0, neuron=128), "neuron 128 is out of range: there are 128"),
        (Patch("z", 0, neuron=1), "neuron= was given, but z is indexed by pos, head"),
        (Patch("resid_pre", 0, head=1), "head= was given, but resid_pre is indexed by pos"),
        (Patch("z", 0, key_pos=1), "key_pos= was given, but z is indexed by pos, head"),
        (Patch("z", 0, mode="replac"), "mode='replac' is none of replace, add, scale. Nearest"),
        (Patch("z", 0, source="zeros"), "source='zeros' is none of other, zero, mean, resample"),
        (Patch("z", 0, source="zeros"), "Nearest: 'zero'"),
        (with_source(Patch("z", 0), [1.0]), "source=[1.0] is no source. Give one of other, zero"),
        (with_source(Patch("z", 0), None), "source=None is no source"),
        (Patch("z", 0, source=torch.tensor([1])), "must hold floats; got torch.int64"),
        (
            Patch("z", 0, source=torch.tensor([1.0, float("nan")])),
            "the source tensor of shape [2] holds NaN",
        ),
        ("z", "a run is a Patch or a list of them; got 'z'"),
    ],
)
def test_refused(patch, message):
    with pytest.raises(SweepError, match=re.escape(message)):
        made(patch)


def test_modes():
    for mode in ("replace", "add", "scale"):
        check_mode(mode)
    with pytest.raises(SweepError, match="mode='mul' is none of replace, add, scale"):
        check_mode("mul")


# -- sources -------------------------------------------------------------------------------------


def test_each_source_is_listed_once():
    known = sources()
    vector, cache = torch.zeros(8), {}
    values = ["other", "zero", 0.0, 0.5, "mean", "resample", vector, cache]
    numbers = [known.number_of(value) for value in values]
    assert numbers == list(range(8))
    assert [known.number_of(value) for value in reversed(values)] == numbers[::-1]
    assert [source.kind for source in known.list] == [
        *("other", "number", "number", "number", "mean", "resample", "tensor", "cache")
    ]
    assert known.list[1].number == 0.0 and known.list[3].number == 0.5
    # An equal tensor is another source: it may be written to.
    assert known.number_of(vector.clone()) == 8
    assert set(NAMED) == {"other", "zero", "mean", "resample"}


def test_sources_kept_by_identity_outlive_their_makers():
    """Ids are given out again once an object is gone; the list must keep what it numbered."""
    known = sources()
    numbers = {known.number_of(torch.full((8,), float(i))) for i in range(50)}
    assert numbers == set(range(1, 51))
    assert [float(source.tensor[0]) for source in known.list[1:]] == [float(i) for i in range(50)]


def test_names_say_what_a_source_is():
    known = sources(seed=3)
    for value in ("zero", 2, "mean", "resample", torch.zeros(2, 8), {}):
        known.number_of(value)
    assert [source.name for source in known.list] == [
        "the other prompt",
        "zero",
        "the number 2",
        "the mean over examples",
        "another example (seed 3)",
        "a tensor [2, 8]",
        "a cache",
    ]


@pytest.mark.parametrize("batch", [2, 3, 4, 7, 20])
def test_resampling_never_gives_an_example_its_own(batch):
    for seed in range(20):
        known = sources(batch=batch, seed=seed)
        permutation = known.list[known.number_of("resample")].permutation
        assert sorted(permutation.tolist()) == list(range(batch))
        assert bool((permutation != torch.arange(batch)).all())


def drawn(seed, batch=10):
    known = sources(batch=batch, seed=seed)
    return known.list[known.number_of("resample")].permutation.tolist()


def test_resampling_is_reproducible_by_its_seed():
    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(10)}) == 10
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    drawn(1)
    assert torch.equal(before, torch.rand(1))


def test_graphs_are_kept_only_where_they_are_wanted():
    vector = torch.zeros(8, requires_grad=True)
    for keeps_graph in (True, False):
        known = Sources(BATCH, T, 0, keeps_graph=keeps_graph)
        source = known.list[known.number_of(vector)]
        assert source.tensor.requires_grad is keeps_graph
        assert source.tensor.data_ptr() == vector.data_ptr()


def test_resampling_needs_another_example():
    with pytest.raises(SweepError, match="there is only one pair of prompts. Give at least two"):
        sources(batch=1).number_of("resample")


# -- tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "shape"),
    [
        (Patch("resid_pre", 0), (BATCH, T, 32)),
        (Patch("resid_pre", 0), (32,)),
        (Patch("resid_pre", 0), (T, 32)),
        (Patch("resid_pre", 0), (BATCH, 1, 1)),
        (Patch("resid_pre", 0), ()),
        (Patch("resid_pre", 0, pos=[1, 4]), (2, 32)),
        (Patch("resid_pre", 0, pos=1), (BATCH, 1, 32)),
        (Patch("z", 0), (T, 4, 8)),
        (Patch("z", 0, head=2), (8,)),
        (Patch("z", 0, head=[2, 1]), (BATCH, T, 2, 8)),
        (Patch("z", 0, head=[2, 1]), (2, 1)),
        (Patch("result", 0, head=1), (1, 32)),
        (Patch("attn_in", 0, head=1), (1, 32)),
        (Patch("q_input", 0, head=1), (1, 32)),
        (Patch("mlp_post", 0), (T, 128)),
        (Patch("mlp_post", 0, neuron=[1, 2, 3]), (3,)),
        (Patch("mlp_in", 0), (T, 32)),
        (Patch("pattern", 0), (BATCH, 4, T, T)),
        (Patch("pattern", 0, head=1, pos=-1, key_pos=[0, 1]), (1, 1, 2)),
        (Patch("attn_scores", 0, head=1), (T, 1)),
    ],
)
def test_tensors_that_broadcast(patch, shape):
    assert made(with_source(patch, torch.zeros(shape))).value == 1


@pytest.mark.parametrize(
    ("patch", "shape", "found"),
    [
        (Patch("resid_pre", 0), (31,), "[batch, pos, width] = [3, 5, 32]"),
        (Patch("resid_pre", 0), (4, 32), "[batch, pos, width] = [3, 5, 32]"),
        (Patch("resid_pre", 0, pos=[1, 4]), (T, 32), "[batch, pos, width] = [3, 2, 32]"),
        (Patch("resid_pre", 0), (2, T, 32), "[batch, pos, width] = [3, 5, 32]"),
        (Patch("resid_pre", 0), (1, BATCH, T, 32), "[batch, pos, width] = [3, 5, 32]"),
        (Patch("z", 0, head=2), (4, 8), "[batch, pos, head, width] = [3, 5, 1, 8]"),
        (Patch("z", 0, head=2), (32,), "[batch, pos, head, width] = [3, 5, 1, 8]"),
        (Patch("result", 0), (8,), "[batch, pos, head, width] = [3, 5, 4, 32]"),
        (Patch("mlp_post", 0, neuron=[1, 2]), (3,), "[batch, pos, neuron] = [3, 5, 2]"),
        (
            Patch("pattern", 0, key_pos=0),
            (T,),
            "[batch, head, query_pos, key_pos] = [3, 4, 5, 1]",
        ),
    ],
)
def test_tensors_that_do_not(patch, shape, found):
    message = (
        f"the source tensor {list(shape)} does not broadcast over what {patch.site} of layer 0 "
        f"patches: {found}"
    )
    with pytest.raises(SweepError, match=re.escape(message)):
        made(with_source(patch, torch.zeros(shape)))


def test_kv_heads_have_their_own_width():
    assert made(Patch("k", 0, source=torch.zeros(2, 8)), "llama").value == 1
    with pytest.raises(SweepError, match=re.escape("[batch, pos, head, width] = [3, 5, 2, 8]")):
        made(Patch("k", 0, source=torch.zeros(4, 8)), "llama")


# -- caches --------------------------------------------------------------------------------------


def test_a_cache_gives_what_it_holds():
    model = ours("gpt2")
    _, cache = model.run_with_cache(prompts(BATCH, T))
    known = sources()
    for site in ("resid_pre", "z", "pattern", "mlp_post"):
        assert planned(Patch(site, 1, source=cache), model, known).value == 1
    assert known.list[1].cache is cache


def test_a_cache_that_lacks_the_place():
    cache = {"blocks.1.hook_resid_pre": torch.zeros(BATCH, T, 32)}
    with pytest.raises(
        SweepError,
        match=r"the cache holds no blocks\.1\.hook_resid_mid.*names_filter.*"
        r"Nearest: 'blocks\.1\.hook_resid_pre'",
    ):
        made(Patch("resid_mid", 1, source=cache))


@pytest.mark.parametrize("shape", [(BATCH, T + 1, 32), (1, T, 32), (BATCH, T - 1, 32)])
def test_a_cache_of_other_prompts(shape):
    cache = {"blocks.1.hook_resid_pre": torch.zeros(shape)}
    message = (
        f"blocks.1.hook_resid_pre in the cache is {list(shape[:2])} over batch and pos; the "
        f"prompts need [3, 5]"
    )
    with pytest.raises(SweepError, match=re.escape(message)):
        made(Patch("resid_pre", 1, source=cache))


def test_a_cache_of_a_pattern_with_fewer_keys():
    cache = {"blocks.1.attn.hook_pattern": torch.zeros(BATCH, 4, T, T - 1)}
    with pytest.raises(SweepError, match=r"over batch and head, query_pos, key_pos"):
        made(Patch("pattern", 1, source=cache))


# -- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["q_input", "k_input", "v_input"])
def test_one_input_for_all_does_not_go_with_one_for_each(other):
    model = ours("gpt2")
    both = Run((0,), (PlannedPatch("attn_in", 0), PlannedPatch(other, 1)))
    with pytest.raises(SweepError, match="attn_in is not read while queries, keys and values"):
        check_run(both, model)
    check_run(Run((0,), both.patches[:1]), model)
    check_run(Run((0,), both.patches[1:]), model)
    model.cfg.use_split_qkv_input = True
    with pytest.raises(SweepError, match="cfg.use_split_qkv_input"):
        check_run(Run((0,), both.patches[:1]), model)


def test_runs_given_one_by_one():
    model, known = ours("gpt2"), sources()
    two = [Patch("z", 0, head=1), Patch("mlp_out", 2, source="zero")]
    runs, names = explicit_runs([two, Patch("z", 1)], model, known)
    assert names == ["0", "1"]
    assert [run.cell for run in runs] == [(0,), (1,)]
    assert runs[0].patches == (
        PlannedPatch("z", 0, None, (1,)),
        PlannedPatch("mlp_out", 2, value=1),
    )
    runs, names = explicit_runs({"a": tuple(two), 7: Patch("z", 1)}, model, known)
    assert names == ["a", "7"] and len(runs[0].patches) == 2


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "runs= is empty. Give at least one Patch"),
        ({}, "runs= is empty"),
        ([Patch("z", 0), []], "run 1 has no patches"),
        ({"mine": []}, "run mine has no patches"),
        ([[Patch("z", 0), "z"]], "run 0: a run is a Patch or a list of them; got 'z'"),
        ({"mine": Patch("z", 9)}, "run mine: layer 9 is out of range"),
        (
            [[Patch("attn_in", 0), Patch("q_input", 0)]],
            "run 0: attn_in is not read while",
        ),
    ],
)
def test_runs_that_are_refused(runs, message):
    with pytest.raises(SweepError, match=re.escape(message)):
        explicit_runs(runs, ours("gpt2"), sources())


@pytest.mark.parametrize("source", ["other", 0.0, -1.0])
def test_scores_are_scaled_by_numbers_above_zero_only(source):
    model, sources = ours("gpt2"), Sources(1, 5, 0)
    with pytest.raises(SweepError, match="number above zero only"):
        planned(Patch("attn_scores", 0, source=source, mode="scale"), model, sources)
    half = planned(Patch("attn_scores", 0, source=0.5, mode="scale"), model, sources)
    assert sources.list[half.value].number == 0.5
