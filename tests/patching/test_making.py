"""Chunks made chunk by chunk and layer by layer: the same bits, few reads, little memory."""

import itertools
import shutil
import warnings
from dataclasses import replace

import pytest
import torch

from fastlens.errors import SourceError, SweepError
from fastlens.patching import Patch, execute, kl_divergence, logit_diff, plan, spill
from fastlens.patching.codes import codes
from fastlens.patching.making import Forwards, WaveRuns
from fastlens.patching.traffic import BY_LAYER, IN_MEMORY, ON_DISK, ON_HOST, Choice, Passes, alone
from fastlens.patching.wave import ChunkState, Wave
from fastlens.patching.wave_layer import WaveLayer
from tests.models import ours, prompts
from tests.patching.autoencoders import Linear
from tests.patching.budgets import memory_for, memory_for_rows, reads_of, streamed

METRIC = logit_diff(7, 3)
PLACES = [IN_MEMORY, ON_DISK, ON_HOST]


def pair(batch=1, n_pos=9):
    clean = prompts(batch, n_pos)
    corrupted = clean.clone()
    corrupted[:, 3] = (corrupted[:, 3] + 7) % 50
    return clean, corrupted


def query_of(name="gpt2", *, parts=6, model=None, batch=1, **options):
    """A sweep of about so many chunks."""
    model = model or (ours(name) if name == "local" else ours(name, n_layers=4))
    wanted = {"sites": ["resid_pre", "z"], "by": ("layer", "pos"), "metric": METRIC, **options}
    roomy = plan(model, *pair(batch), **wanted)
    query = plan(
        model, *pair(batch), **wanted, memory=memory_for(roomy.plan, sum(roomy.plan.held) // parts)
    )
    assert len(query.plan.chunks) >= parts
    return query


def by_layer(query, where=ON_DISK, groups=1):
    """The same chunks, layer by layer."""
    n = len(query.plan.chunks)
    size = -(-n // groups)
    parts = tuple(tuple(range(n))[start : start + size] for start in range(0, n, size))
    choices = (Choice(BY_LAYER, where, n, groups, 0, 0),)
    return replace(query, passes=Passes(parts, where, query.passes.held, choices))


def by_chunk(query):
    return replace(query, passes=alone(query.plan))


def values(query, **options):
    return execute(query, verify=0, progress=False, **options).values


# -- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("groups", [1, 2])
def test_both_orders_give_the_same_bits(where, groups):
    query = query_of()
    expected = values(query)
    assert torch.equal(values(by_layer(query, where, groups)), expected)
    one = execute(by_layer(query, where, groups), verify="all").certificate
    assert one["max_difference"] <= one["tolerance"]


@pytest.mark.parametrize("name", ["llama", "neox", "post_norm", "alibi", "local", "bidirectional"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_kind_of_layer(name, batch):
    query = query_of(name, batch=batch)
    assert torch.equal(values(by_layer(query)), values(query))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_prompts(padding):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :2] = 0
    if padding == "right":
        mask = mask.flip(1)
    metric = logit_diff(7, 3, position=6) if padding == "right" else METRIC
    query = query_of(batch=2, attention_mask=mask, metric=metric)
    assert torch.equal(values(by_layer(query)), values(query))


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_windows_patterns_and_several_metrics(direction):
    metrics = [METRIC, kl_divergence(), lambda logits: logits[:, -1].logsumexp(-1)]
    for options in (
        {"sites": "pattern", "by": ("layer", "head", "query_pos")},
        {"sites": "mlp_out", "window": 3},
        {"sites": ["q", "k", "v", "result"], "by": ("layer", "head")},
    ):
        query = query_of(direction=direction, metric=metrics, **options)
        assert torch.equal(values(by_layer(query)), values(query))


def test_codes_of_autoencoders():
    found = codes(Linear(32, 24), layer=1, site="resid_pre", decoder=None)
    query = query_of(sites=found, by=("layer", "pos", "feature"))
    assert torch.equal(values(by_layer(query)), values(query))


def test_reads_that_were_not_foreseen_are_made_again():
    def rows_by_content(logits):
        return logits[:, 4 + int(logits[0, -1, 0] > -100.0) * 2].sum(-1)

    runs = [Patch("resid_pre", layer, pos=pos) for layer in range(4) for pos in range(3, 9)]
    query = query_of(runs=runs, metric=rows_by_content, sites="resid_pre", by=None)
    assert torch.equal(values(by_layer(query)), values(by_chunk(query)))


@pytest.mark.parametrize("layer", [0, 1, 3, 4])
def test_a_chunk_that_was_put_away_is_as_it_was(layer):
    query = query_of("llama", batch=2, sites=["resid_pre", "z", "resid_post"])
    runs = WaveRuns(query)
    from fastlens.patching.uses import uses_of

    use = uses_of(query.plan, query.plan.chunks[0])
    with torch.no_grad():
        state = runs.wave.begun(use, 0)
        for at in range(layer):
            state.advance(query.model.blocks[at])
        again = ChunkState.unpacked(runs.wave, use, layer, state.packed())
    assert torch.equal(again.x, state.x) and again.layer == state.layer == layer
    for name in ("example", "table", "own", "branch", "pos"):
        assert torch.equal(getattr(again.pack, name), getattr(state.pack, name)), name
    for name in ("stem_of", "needed", "counts"):
        assert torch.equal(getattr(again, name), getattr(state, name)), name


def test_a_chunk_whose_layer_failed_cannot_go_on():
    query = query_of()
    runs = WaveRuns(query)
    from fastlens.patching.uses import uses_of

    with torch.no_grad():
        state = runs.wave.begun(uses_of(query.plan, query.plan.chunks[0]), 0)
        with pytest.raises(AttributeError):
            state.advance(None)
        with pytest.raises(AssertionError, match="after a layer of it had failed"):
            state.advance(query.model.blocks[0])


# -- weights -------------------------------------------------------------------------------------


def test_a_plan_reads_no_weights_of_blocks():
    model = streamed(ours("llama", n_layers=4))
    seen = reads_of(model)
    query = plan(model, *pair(), metric=METRIC)
    assert query.strategy.is_wave
    assert not [name for name in seen if name.startswith("blocks")], "a block's weights were read"
    query.explain()
    assert not [name for name in seen if name.startswith("blocks")]


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "alibi"])
def test_a_group_reads_each_layer_once_and_in_order(name):
    model = ours(name, n_layers=4)
    query = by_layer(query_of(model=model))
    seen = reads_of(model)
    expected = values(query)
    passes = [f"blocks.{layer}" for layer in range(4)]
    assert [name for name in seen if name.startswith("blocks")] == passes
    # The final norm and the unembedding come once all chunks are through the layers.
    assert set(seen[4:]) <= {"ln_final", "unembed"}
    del seen[:]
    assert torch.equal(values(by_layer(query, groups=2)), expected)
    blocks = [name for name in seen if name.startswith("blocks")]
    second = blocks[4:]
    assert blocks[:4] == passes and second == passes[4 - len(second) :]


def test_chunk_by_chunk_reads_them_in_each_chunk():
    query = query_of()
    seen = reads_of(query.model)
    values(query)
    blocks = [int(name[-1]) for name in seen if name.startswith("blocks")]
    turns = sum(b <= a for a, b in itertools.pairwise(blocks))
    assert turns == len(query.plan.chunks) - 1


# -- a model whose weights are streamed ----------------------------------------------------------


def test_a_streamed_model_is_swept_within_its_room():
    model = ours("gpt2", n_layers=4)
    expected = plan(model, *pair(), sites="z", by=("layer", "pos", "head"), metric=METRIC)
    room = memory_for_rows(expected.plan, 60)
    whole = values(expected)
    streamed(model, room * 16 // 15 + 16)
    query = plan(model, *pair(), sites="z", by=("layer", "pos", "head"), metric=METRIC)
    assert room <= query.memory <= room + 32
    assert query.passes.order == BY_LAYER and query.passes.held <= query.memory
    inside = []
    run = WaveLayer.run
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            WaveLayer, "run", lambda self, x: inside.append(model.streaming.inside) or run(self, x)
        )
        scores = execute(query, verify=1, progress=False)
    assert set(inside) == {1} and model.streaming.inside == 0
    # What it is predicted to take, and as much of what is allowed for holes in memory.
    assert model.streaming.reserved == [query.memory] and query.memory >= query.passes.held
    assert torch.allclose(scores.values, whole, atol=1e-5)
    said = query.explain()
    assert "order: layer by layer, rows" in said and "not chunk by chunk" in said
    assert "weights read again" in said and "rows written and read" in said
    assert scores.plan["order"] == BY_LAYER
    assert {choice["order"] for choice in scores.plan["traffic"]} == {BY_LAYER, "chunk by chunk"}


def test_a_limit_that_the_user_gives_counts_too():
    model = ours("gpt2", n_layers=4)
    least = plan(model, *pair(), metric=METRIC).plan.least_bytes
    streamed(model, 2 * least)
    assert plan(model, *pair(), metric=METRIC, memory=least).memory == least
    assert plan(model, *pair(), metric=METRIC, memory="1GiB").memory < 2 * least
    model.streaming._room = least // 2
    with pytest.raises(SweepError, match=f"Give at least {least:,}"):
        plan(model, *pair(), metric=METRIC)


def test_a_streamed_model_without_a_limit(monkeypatch):
    from fastlens.errors import StreamError

    model = streamed(ours("gpt2"))

    def none():
        raise StreamError("there is no max_memory")

    model.streaming.room = none
    monkeypatch.setattr("fastlens.patching.budget.free_bytes", lambda device: 3 * 2**30)
    assert plan(model, *pair(), metric=METRIC).memory == 3 * 2**29


# -- disks ---------------------------------------------------------------------------------------


def test_a_full_disk_is_said_before_the_first_layer(monkeypatch):
    query = by_layer(query_of())
    monkeypatch.setattr(spill, "free_on_disk", lambda folder: 10)
    monkeypatch.setattr(WaveLayer, "run", lambda self, x: pytest.fail("something was run"))
    with pytest.raises(SourceError, match="which has 10 bytes free"):
        values(query)


def test_a_disk_that_fills_up_is_said_and_leaves_nothing(monkeypatch, tmp_path):
    query = by_layer(query_of())
    monkeypatch.setattr(spill.tempfile, "gettempdir", lambda: str(tmp_path))
    files = []
    real = spill.OnDisk._write

    def failing(self, at, data):
        files.append(self._file)
        if len(files) > 20:
            raise self._refused("written to", OSError(28, "No space left on device"))
        return real(self, at, data)

    monkeypatch.setattr(spill.OnDisk, "_write", failing)
    with pytest.raises(SourceError, match="No space left on device. Free some space"):
        values(query)
    assert files[0].closed and list(tmp_path.iterdir()) == []


def test_groups_are_what_a_sweep_resumes_from(tmp_path, monkeypatch):
    query = by_layer(query_of(), groups=2)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    execute(query, verify=0, out=whole)
    names = [path.name for path in sorted((whole / "chunks").glob("*.safetensors"))]
    assert len(names) == len(query.plan.chunks)
    shutil.copytree(whole, folder)
    for name in ("scores.json", "scores.safetensors"):
        (folder / name).unlink()
    # The second group was under way, and one of the first group's shards is lost.
    first, second = query.passes.groups
    for at in (first[1], *second):
        (folder / "chunks" / names[at]).unlink()
    made = []
    real = WaveRuns.__call__
    monkeypatch.setattr(
        WaveRuns,
        "__call__",
        lambda self, group, bar=None: (
            made.append([at for at, _ in group]) or real(self, group, bar)
        ),
    )
    # Another memory, and no choice: those of the folder count.
    again = plan(query.model, *pair(), sites=["resid_pre", "z"], by=("layer", "pos"), metric=METRIC)
    execute(again, verify=0, out=folder)
    assert made == [[first[1]], list(second)]
    for name in ("scores.json", "scores.safetensors", *(f"chunks/{n}" for n in names)):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert not [path for path in folder.iterdir() if "fastlens" in path.name]


# -- out of memory on the device -----------------------------------------------------------------


def too_large(monkeypatch, most, where="run"):
    """A device on which more than ``most`` branches of runs do not fit; gives what was tried."""
    tried = []
    real = getattr(WaveLayer, where)

    def run(self, *args):
        n = len(self.use.example)
        tried.append(n)
        if n > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, *args)

    monkeypatch.setattr(WaveLayer, where, run)
    return tried


@pytest.mark.parametrize("order", ["chunk by chunk", "layer by layer"])
@pytest.mark.parametrize("where", ["run", "_mlp"])
def test_out_of_memory_halves_the_chunk(monkeypatch, order, where):
    query = query_of(model=ours("gpt2", dtype=torch.float64, n_layers=4), parts=3)
    query = by_layer(query, ON_HOST) if order == "layer by layer" else query
    expected = values(query)
    largest = max(len(chunk.runs) for chunk in query.plan.chunks)
    most = largest // 3
    tried = too_large(monkeypatch, most, where)
    with pytest.warns(UserWarning, match="half as many at a time. Give memory= below") as said:
        got = values(query)
    assert len(said) == 1, "said more than once"
    assert float((got - expected).abs().max()) < 1e-12
    assert any(n > most for n in tried)


def test_what_did_not_fit_is_not_tried_again(monkeypatch):
    query = query_of(model=ours("gpt2", dtype=torch.float64, n_layers=4), parts=3)
    most = max(len(chunk.runs) for chunk in query.plan.chunks) // 3
    tried = too_large(monkeypatch, most)
    with pytest.warns(UserWarning, match="half as many"):
        values(query)
    failures = [n for n in tried if n > most]
    assert len(failures) <= 3 < len(query.plan.chunks)


def test_a_single_run_that_does_not_fit_is_an_error(monkeypatch):
    query = query_of()
    too_large(monkeypatch, 0)
    with (
        warnings.catch_warnings(),
        pytest.raises(SweepError, match=r"even with a single run .*CUDA out of memory.*shorter"),
    ):
        warnings.simplefilter("ignore")
        values(query)


def test_a_folder_of_halved_chunks_is_whole(monkeypatch, tmp_path):
    query = query_of(model=ours("gpt2", dtype=torch.float64, n_layers=4), parts=3)
    expected = values(query)
    with pytest.MonkeyPatch.context() as patched:
        too_large(patched, max(len(chunk.runs) for chunk in query.plan.chunks) // 2)
        with pytest.warns(UserWarning, match="half as many"):
            execute(query, verify=0, out=tmp_path)
    shards = sorted((tmp_path / "chunks").glob("*.safetensors"))
    assert len(shards) == len(query.plan.chunks)
    # It goes on from there on a device that is large enough.
    shards[1].unlink()
    got = values(query, out=tmp_path)
    assert float((got - expected).abs().max()) < 1e-12
    monkeypatch.setattr(Wave, "run", lambda *args: pytest.fail("made again"))
    assert torch.equal(values(query, out=tmp_path), got)


def test_out_of_memory_in_a_metric_halves_too(monkeypatch):
    query = query_of(model=ours("gpt2", dtype=torch.float64, n_layers=4), parts=3)
    expected = values(query)
    from fastlens.patching.evaluate import Evaluator

    real, largest = Evaluator.values, max(len(chunk.runs) for chunk in query.plan.chunks)

    def some(self, final, use, names):
        if len(names) == largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, final, use, names)

    monkeypatch.setattr(Evaluator, "values", some)
    for one in (query, by_layer(query)):
        with pytest.warns(UserWarning, match="half as many"):
            assert float((values(one) - expected).abs().max()) < 1e-12


def test_stacked_forwards_are_halved(monkeypatch):
    model = ours("gpt2", dtype=torch.float64)
    model.blocks[1].mlp = torch.nn.Sequential()
    query = plan(model, *pair(), metric=METRIC)
    assert query.strategy.name == "stacked forwards"
    expected = values(query)
    from fastlens.patching.hooked import HookedRuns

    real, sizes = HookedRuns.stacked, []

    def stacked(self, runs, n_stacked):
        for part, logits in real(self, runs, n_stacked):
            sizes.append(len(part))
            if len(part) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            yield part, logits

    monkeypatch.setattr(HookedRuns, "stacked", stacked)
    with pytest.warns(UserWarning, match="runs stacked in a forward") as said:
        got = values(query)
    assert len(said) == 1 and max(sizes) > 4
    assert float((got - expected).abs().max()) < 1e-12
    assert isinstance(Forwards(query)._most, type(None))


# -- a model that streams its weights from a file --------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.weights.checkpoints import save_folder

    return save_folder(tmp_path_factory.mktemp("llama"), "llama_grouped")


def test_weights_from_a_file_are_read_once_a_group(folder, tmp_path):
    from fastlens import HookedTransformer
    from fastlens.patching.fingerprint import weights_fingerprint

    in_memory = HookedTransformer.from_pretrained(str(folder), verbose=False)
    model = HookedTransformer.from_pretrained(str(folder), verbose=False, offload="disk")
    assert weights_fingerprint(model) == weights_fingerprint(in_memory)
    wanted = {"sites": ["resid_pre", "z"], "by": ("layer", "pos"), "metric": METRIC}
    clean = torch.arange(2, 11)[None]
    corrupted = clean.clone()
    corrupted[0, 1] = 30
    roomy = plan(in_memory, clean, corrupted, **wanted)
    memory = memory_for(roomy.plan, sum(roomy.plan.held) // 5)
    kept = plan(in_memory, clean, corrupted, **wanted, memory=memory)
    expected = execute(kept, verify=0, progress=False, out=tmp_path / "in_memory").values
    query = plan(model, clean, corrupted, **wanted, memory=memory)
    assert len(kept.plan.chunks) > 3 and query.passes.choices
    query = by_layer(replace(query, plan=kept.plan))
    stream = model.streaming.stream
    before = stream.bytes_read
    with torch.no_grad():
        assert torch.equal(values(query), expected)
    read = stream.bytes_read - before
    everything = sum(group.nbytes for group in stream.groups.values())
    assert sum(model.streaming.block_bytes) // 2 <= read <= everything
    # The folder of one is the other's.
    assert torch.equal(values(query, out=tmp_path / "in_memory"), expected)
