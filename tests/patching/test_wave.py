"""The wave against one hooked forward per run: every family, batch, padding and budget."""

import itertools

import pytest
import torch

from fastlens.errors import SweepError
from fastlens.kernels import torch_suffix_attention
from fastlens.patching import Patch, sweep
from fastlens.patching import wave_layer as layers_of_wave
from fastlens.patching.sites import available_sites
from tests.configs import TINY_CONFIGS
from tests.models import ours
from tests.patching.against_hooks import (
    MODES,
    PADDINGS,
    SOURCES,
    check,
    every_activation,
    hooked_logits,
    least_memory,
    mask_of,
    mixed_runs,
    pairs,
    planned,
    wave_logits,
)
from tests.patching.budgets import memory_for

FAMILIES = sorted(TINY_CONFIGS)
N_POS = 7


def mixed_plan(model, batch, padding, seed=0, **options):
    """One plan with every site, mode and source, and runs of several patches."""
    clean, corrupted = pairs(batch, N_POS)
    mask = mask_of(padding, batch, N_POS)
    runs = mixed_runs(model, batch, N_POS, every_activation(model, batch, N_POS, mask), seed=seed)
    # Behind right padding a prompt's last token is not the last position.
    reads = (3, -2) if padding == "right" else (-1,)
    return planned(model, clean, corrupted, runs, mask=mask, reads=reads, **options), runs


def assert_exact(model, batch, padding, seed=0):
    query, runs = mixed_plan(model, batch, padding, seed)
    expected = check(query)
    least = least_memory(query)
    tiny, _ = mixed_plan(model, batch, padding, seed, memory=least)
    assert len(tiny.plan.chunks) > 7 > len(query.plan.chunks)
    check(tiny, expected)
    base = expected[[n for n in range(len(runs)) if n in query.plan.why_not]]
    changed = (expected - base[:1]).abs().flatten(1).amax(1) if len(base) else expected
    assert (changed > 1e-6).sum() > 15, "runs without effects test nothing"


def test_a_mixed_plan_holds_everything():
    model = ours("gpt2", dtype=torch.float64)
    _, runs = mixed_plan(model, 3, "none")
    patches = [patch for run in runs for patch in run]
    assert {patch.site for patch in patches} == set(available_sites(model.cfg, model.hook_dict))
    assert {patch.mode for patch in patches} == set(MODES)
    named = {patch.source for patch in patches if isinstance(patch.source, str)}
    kinds = {type(patch.source) for patch in patches}
    assert named == {"other", "zero", "mean", "resample"} and kinds >= {float, torch.Tensor, dict}
    assert len(SOURCES) == len(named) + 3
    assert sum(len(run) > 1 for run in runs) >= 8


# Each family once alone and once in a padded batch; the whole cross is `full`.
CASES = [(1, "none"), (3, "left")]


@pytest.mark.parametrize(("batch", "padding"), CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, batch, padding):
    assert_exact(ours(name, dtype=torch.float64), batch, padding)


@pytest.mark.parametrize("name", ["gpt2", "llama", "local"])
def test_right_padding(name):
    assert_exact(ours(name, dtype=torch.float64), 3, "right")


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "batch", "padding"), list(itertools.product(FAMILIES, (1, 3), PADDINGS))
)
def test_the_whole_cross(name, batch, padding, seed):
    assert_exact(ours(name, dtype=torch.float64), batch, padding, seed)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "batch", "padding"), list(itertools.product(FAMILIES, (1, 3), PADDINGS))
)
def test_the_whole_cross_in_float32(name, batch, padding):
    query, _ = mixed_plan(ours(name), batch, padding)
    check(query)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "alibi"])
def test_float32(name):
    query, _ = mixed_plan(ours(name), 3, "left")
    check(query)


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_the_answer_does_not_depend_on_the_memory(name):
    model = ours(name, dtype=torch.float64, n_layers=3)
    query, runs = mixed_plan(model, 2, "none")
    least = least_memory(query)
    expected = wave_logits(query)
    n_chunks = [1]
    for memory in (memory_for(query.plan, sum(query.plan.held) // 3), least):
        smaller, _ = mixed_plan(model, 2, "none", memory=memory)
        n_chunks.append(len(smaller.plan.chunks))
        check(smaller, expected, 1e-12)
    assert n_chunks == sorted(n_chunks) and 2 <= n_chunks[1] < n_chunks[2]
    with pytest.raises(SweepError, match=f"{least:,}"):
        mixed_plan(model, 2, "none", memory=least - 1)


def test_streams_kept_between_chunks_begin_where_a_chunk_does(monkeypatch):
    model = ours("gpt2", dtype=torch.float64, n_layers=4)
    clean, corrupted = pairs(2, N_POS)
    runs = [Patch("z", layer, pos=pos, head=0) for layer in range(4) for pos in (2, 3)]
    runs += [Patch("z", 3, pos=6, head=head) for head in range(4)]
    query = planned(model, clean, corrupted, runs)
    tight = planned(model, clean, corrupted, runs, memory=least_memory(query))
    assert [chunk.first_layer for chunk in tight.plan.chunks][-1] == 3
    made = []
    real = layers_of_wave.WaveLayer.run
    monkeypatch.setattr(
        layers_of_wave.WaveLayer, "run", lambda self, x: made.append(self.layer) or real(self, x)
    )
    got = wave_logits(tight)
    # Three layers of the stems alone; of a chunk, no layer before the one in which it begins.
    n_expected = 3 + sum(4 - chunk.first_layer for chunk in tight.plan.chunks)
    assert len(made) == n_expected
    check(tight, hooked_logits(query))
    assert float((got - wave_logits(query)).abs().max()) <= 1e-12


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "solu_ln", "post_norm"])
def test_blocks_of_the_mlp_and_pieces_of_attention(name, monkeypatch):
    """With tiny blocks, patched rows and the source rows that they read are in other blocks."""
    monkeypatch.setattr(layers_of_wave, "HIDDEN_BYTES", 1)
    monkeypatch.setattr(layers_of_wave, "PATTERN_BYTES", 1)
    monkeypatch.setattr(torch_suffix_attention, "GATHER_BYTES", 1)
    model = ours(name, dtype=torch.float64)
    clean, corrupted = pairs(3, N_POS)
    sites = [s for s in available_sites(model.cfg, model.hook_dict) if s.startswith("mlp")]
    runs = [
        Patch(site, layer, pos=pos, source=source, mode=mode)
        for site in sites
        for layer in range(2)
        for pos in (1, 4, None)
        for source, mode in (("other", "replace"), ("mean", "add"), ("resample", "replace"))
    ]
    query = planned(model, clean, corrupted, runs)
    assert query.plan.counts.max() > 128, "less than two blocks of 64 rows tests nothing"
    check(query)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "softcap", "local", "bidirectional"])
def test_prefixes_that_runs_share_are_read_once(name, padding, monkeypatch):
    """Where prompts are long enough to pay, as here from two keys on."""
    monkeypatch.setattr(torch_suffix_attention, "SHARED_KEYS", 2)
    monkeypatch.setattr(torch_suffix_attention, "SHARED_GAIN", 0.0)
    shared = []
    real = torch_suffix_attention._Some.shared
    monkeypatch.setattr(
        torch_suffix_attention._Some,
        "shared",
        lambda self, prefix: shared.append(prefix) or real(self, prefix),
    )
    model = ours(name, dtype=torch.float64)
    query, _ = mixed_plan(model, 3, padding)
    check(query)
    assert len(set(shared)) > 1


# -- skipped runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "attn_only"])
def test_null_and_dead_runs_are_the_base_run_to_the_bit(name, batch):
    model = ours(name)
    clean, corrupted = pairs(batch, N_POS)
    last = model.cfg.n_layers - 1
    runs = {
        "null": Patch("resid_pre", 0, pos=[0, 1]),
        "null at a head": Patch("z", last, head=1, pos=0),
        "null twice": [Patch("resid_pre", 0, pos=0), Patch("v", 1, pos=[0, 1])],
        "dead": Patch("attn_out", last, pos=4, source="zero"),
        "dead query": Patch("q", last, pos=4, source=3.0),
        "live": Patch("resid_pre", 1, pos=4),
        "live at the end": Patch("attn_out", last, pos=-1, source="zero"),
    }

    def metric(logits):
        return logits[:, -1].logsumexp(-1) + logits[:, -1, 3]

    scores = sweep(model, clean, corrupted, runs=runs, metric=metric, verify="all")
    assert scores.plan["null"] == 3 and scores.plan["dead"] == 2 and scores.plan["computed"] == 2
    whole = sweep(model, clean, corrupted, runs=runs, metric=metric, memory="1GiB", verify=0)
    assert torch.equal(whole.per_example, scores.per_example)
    base = sweep(model, corrupted, corrupted, runs=runs, metric=metric, verify=0).per_example[:, 0]
    for number, name in enumerate(runs):
        same = torch.equal(scores.per_example[:, number], scores.per_example[:, 0])
        assert same == (not name.startswith("live")), name
    assert float((scores.per_example[:, 0] - base).abs().max()) <= 1e-5


def test_equal_runs_are_made_once_and_equal_to_the_bit():
    model = ours("gpt2")
    clean, corrupted = pairs(2, N_POS)
    same = [
        Patch("resid_post", 0, pos=3),
        Patch("resid_pre", 1, pos=3),
        Patch("resid_pre", 1, pos=3),
    ]
    query = planned(model, clean, corrupted, same)
    assert query.plan.order == [0] and query.plan.same_as == [0, 0, 0]
    check(query)
    scores = sweep(model, clean, corrupted, runs=same, metric=lambda x: x[:, -1, 1], verify="all")
    assert torch.equal(scores.values, scores.values[:1].expand(3))
