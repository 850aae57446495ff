"""Running plans: folders that survive kills, the certificate, gradients."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlens.errors import SourceError, SweepError
from fastlens.patching import Patch, execute, kl_divergence, logit_diff, plan, sweep
from fastlens.patching.strategy import STACKED, WAVE
from fastlens.patching.wave import Wave
from fastlens.scores import Scores
from tests.close import assert_close_to
from tests.models import ours, prompts
from tests.patching.budgets import memory_for_rows

ROOT = Path(__file__).parents[2]
METRIC = logit_diff(7, 3)
FILES = ("scores.safetensors", "scores.json")


def pair(batch=1, n_pos=10):
    # Few and odd numbers of rows: products of other sizes have other last bits.
    clean = prompts(batch, n_pos)
    corrupted = clean.clone()
    corrupted[:, 5] = (corrupted[:, 5] + 7) % 50
    return clean, corrupted


def model_of_sweep():
    return ours("gpt2", dtype=torch.float64, n_layers=4)


def query_of(chunk_rows=14, **options):
    """A sweep of 160 runs in chunks of few rows each; None is one chunk."""
    wanted = {"sites": "z", "by": ("layer", "pos", "head"), "metric": METRIC, **options}
    query = plan(options.pop("model", None) or model_of_sweep(), *pair(), **_without_model(wanted))
    if chunk_rows is None:
        return query
    memory = memory_for_rows(query.plan, chunk_rows)
    return plan(query.model, *pair(), **_without_model(wanted), memory=memory)


def _without_model(options):
    return {name: value for name, value in options.items() if name != "model"}


def files(folder):
    return [(folder / name).read_bytes() for name in FILES]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    query = query_of()
    assert len(query.plan.chunks) >= 6
    execute(query, out=folder)
    return folder


def shards(folder):
    return sorted((folder / "chunks").glob("*.safetensors"))


# -- folders -------------------------------------------------------------------------------------


def test_a_folder_changes_nothing(whole):
    plain, kept = execute(query_of()), Scores.load(whole)
    assert torch.equal(plain.values, kept.values)
    assert plain.certificate == kept.certificate and plain.plan == kept.plan


def test_a_sweep_that_goes_on_from_any_chunk_ends_in_the_same_bytes(whole, tmp_path):
    n = len(shards(whole))
    for first in range(n):
        folder = tmp_path / str(first)
        shutil.copytree(whole, folder)
        for name in FILES:
            (folder / name).unlink()
        for path in shards(folder)[first:]:
            path.unlink()
        # Another memory: the chunks that are stored count.
        execute(query_of(None if first % 2 else 20), out=folder)
        assert files(folder) == files(whole), f"from chunk {first}"


def test_chunks_that_are_there_are_not_made_again(whole, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    shards(folder)[2].unlink()
    made = []
    run = Wave.run
    monkeypatch.setattr(Wave, "run", lambda self, *args: (made.append(1), run(self, *args))[1])
    execute(query_of(), out=folder, verify=0)
    assert len(made) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_torn_shard_is_made_again(whole, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    path = shards(folder)[1]
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    path.write_bytes(b"" if damage == "empty" else data[: -3 if damage == "cut" else None])
    execute(query_of(), out=folder)
    assert files(folder) == files(whole)
    assert path.read_bytes() == shards(whole)[1].read_bytes()


CHILD = """
import sys, time
import torch
torch.set_num_threads(1)
from fastlens.patching import execute
from tests.patching.test_execute import query_of
from fastlens.patching.wave import Wave

out, delay = sys.argv[1], 0.01
run = Wave.run
def slow(self, *args):
    time.sleep(delay)
    return run(self, *args)
Wave.run = slow

import os, signal, random
from pathlib import Path
draw = random.Random(0)
killed = 0
for attempt in range(10):
    child = os.fork()
    if not child:
        try:
            execute(query_of(draw.choice([None, 14, 30]) if attempt else 14), out=out)
        finally:
            os._exit(0)
    # A random moment between the chunk now being made and the one after.
    def n():
        return len(list(Path(out, "chunks").glob("[0-9]*")))
    start = n()
    deadline = time.monotonic() + 60
    while n() < start + 1 and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(draw.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
print(killed, n())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_kills_and_the_same_bytes(tmp_path):
    # So many chunks that ten kills find something to interrupt.
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    query = query_of(5)
    n_chunks = len(query.plan.chunks)
    assert n_chunks > 25
    execute(query, out=whole)
    child = CHILD.replace("if attempt else 14", "if attempt else 5")
    ended = subprocess.run(
        [sys.executable, "-c", child, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    killed, n_finished = map(int, ended.stdout.split())
    assert killed == 10
    assert 10 <= n_finished < n_chunks, "the last kill was too late to interrupt anything"
    assert not (folder / FILES[0]).exists()
    execute(query_of(5), out=folder)
    assert files(folder) == files(whole)


def changed_model():
    model = model_of_sweep()
    with torch.no_grad():
        model.blocks[1].mlp.b_in[0] += 1e-9
    return model


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"metric": logit_diff(7, 4)}, r"metrics\[0\].name.*7 vs 3.*7 vs 4"),
        ({"metric": kl_divergence()}, r"metrics\[0\].name"),
        ({"sites": "q"}, "sites"),
        ({"layers": [0, 2]}, "runs"),
        ({"source": torch.ones(8, dtype=torch.float64)}, "sources: 1 entries there, 2 here"),
        ({"direction": "noising"}, "direction: 'denoising' there, 'noising' here"),
        ({"model": changed_model()}, "weights"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(whole, monkeypatch, options, named):
    before = files(whole)
    monkeypatch.setattr(Wave, "run", lambda *args: pytest.fail("something was run"))
    with pytest.raises(SourceError, match=f"holds another sweep: .*{named}"):
        execute(query_of(None, **options), out=whole)
    assert files(whole) == before


def test_other_tokens_and_source_tensors_are_another_sweep(tmp_path):
    model, (clean, corrupted) = model_of_sweep(), pair()
    vector = torch.ones(32, dtype=torch.float64)
    sweep(model, clean, corrupted, metric=METRIC, source=vector, mode="add", out=tmp_path)
    with pytest.raises(SourceError, match=r"sources\[1\].tensor"):
        sweep(model, clean, corrupted, metric=METRIC, source=2 * vector, mode="add", out=tmp_path)
    with pytest.raises(SourceError, match=r"clean_tokens\[0\]\[0\]"):
        other = clean.clone()
        other[0, 0] += 1
        sweep(model, other, corrupted, metric=METRIC, source=vector, mode="add", out=tmp_path)


def test_a_full_disk_keeps_what_was_finished(whole, tmp_path, monkeypatch):
    from fastlens.patching import folder as module

    write, written = module.write_whole, []

    def full(path, data):
        if path.name == "00003.safetensors":
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise SourceError(f"cannot write {path}: {error.strerror}.") from error
        written.append(path.name)
        write(path, data)

    monkeypatch.setattr(module, "write_whole", full)
    with pytest.raises(SourceError, match="No space left .* Free some space .* goes on from them"):
        execute(query_of(), out=tmp_path)
    monkeypatch.undo()
    assert written == ["plan.json", *(f"0000{i}.safetensors" for i in range(3))]
    execute(query_of(), out=tmp_path)
    assert files(tmp_path) == files(whole)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_a_read_only_folder(monkeypatch):
    monkeypatch.setattr(Wave, "run", lambda *args: pytest.fail("something was run"))
    with pytest.raises(SourceError, match="cannot make the folder /proc/sweep"):
        execute(query_of(), out="/proc/sweep")


def test_weights_are_read_only_for_a_folder(monkeypatch, tmp_path):
    def refuse(model):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("fastlens.patching.record.weights_fingerprint", refuse)
    execute(query_of(), verify=0)
    with pytest.raises(AssertionError, match="were read"):
        execute(query_of(), out=tmp_path)


def test_hooked_sweeps_go_on_too(tmp_path):
    clean, corrupted = pair()
    model = model_of_sweep()
    model.add_hook("blocks.0.hook_attn_out", lambda x, hook: 1.5 * x)
    options = {"metric": METRIC}
    for name in ("whole", "again"):
        scores = sweep(model, clean, corrupted, **options, out=tmp_path / name)
    assert scores.plan["strategy"] == "one forward per run" and len(shards(tmp_path / name)) > 1
    for name in FILES:
        (tmp_path / "again" / name).unlink()
    for path in shards(tmp_path / "again")[1:]:
        path.unlink()
    sweep(model, clean, corrupted, **options, out=tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    model.reset_hooks()
    with pytest.raises(SourceError, match="begun as 'one forward per run'"):
        sweep(model, clean, corrupted, **options, out=tmp_path / "again")


# -- the certificate -----------------------------------------------------------------------------


def test_large_sweeps_are_checked_with_a_twentieth_of_the_work():
    clean, corrupted = pair()
    runs = [Patch("resid_pre", 0, pos=0, source=float(i), mode="scale") for i in range(2, 62)]
    query = plan(ours("gpt2"), clean, corrupted, runs=runs, metric=METRIC)
    count = execute(query).certificate["runs"]
    share = count * query.plan.plain_flops() / query.summary()["flops"]
    assert count > 1 and share <= 0.05
    assert (count + 1) * query.plan.plain_flops() > 0.05 * query.summary()["flops"]
    assert execute(query, verify=False).certificate["runs"] == 0
    assert execute(query, verify="all").certificate["runs"] == 60


class _MixesTheBatch(torch.nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def test_a_model_that_is_wrong_in_a_batch_is_found_out_though_no_check_was_wanted(tmp_path):
    model = ours("gpt2")
    model.blocks[1].mlp = _MixesTheBatch()
    with pytest.raises(SweepError, match="differs by") as caught:
        sweep(model, *pair(2), metric=METRIC, verify=False, out=tmp_path)
    scores = caught.value.scores
    assert scores.plan["strategy"] == STACKED and scores.certificate["runs"] == 1
    assert torch.equal(Scores.load(tmp_path).values, scores.values)


@pytest.mark.parametrize("metric", [0, 1])
def test_a_wave_that_is_wrong_is_found_out_in_every_metric(monkeypatch, metric):
    """A fault of ours would be caught too."""
    from fastlens.patching import wave_layer

    right = wave_layer.read
    monkeypatch.setattr(wave_layer, "read", lambda block, norm, x: 1.01 * right(block, norm, x))
    with pytest.raises(SweepError, match="differs by") as caught:
        sweep(ours("gpt2"), *pair(), metric=[METRIC, kl_divergence()])
    assert caught.value.scores.plan["strategy"] == WAVE
    checked = caught.value.scores.certificate["by_metric"][metric]
    assert checked["max_difference"] > 0


# -- gradients -----------------------------------------------------------------------------------


def test_gradients_reach_a_source_tensor():
    model, (clean, corrupted) = model_of_sweep(), pair(2)
    vector = torch.randn(model.cfg.d_model, dtype=torch.float64, requires_grad=True)
    options = {"sites": "resid_post", "by": "layer", "metric": METRIC, "mode": "add"}
    query = plan(model, clean, corrupted, source=vector, gradients=True, **options)
    assert "one forward per run" in query.explain()
    scores = execute(query)
    assert scores.values.requires_grad and scores.values.shape == (4,)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    (scores.values * weights).sum().backward()

    def total(source):
        with torch.no_grad():
            found = sweep(model, clean, corrupted, source=source, **options).values
        return float((found * weights).sum())

    step = torch.zeros_like(vector)
    for i in (0, 5, 31):
        step.zero_()
        step[i] = 1e-5
        with torch.no_grad():
            slope = (total(vector + step) - total(vector - step)) / 2e-5
        assert float(vector.grad[i]) == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert float(vector.grad.norm()) > 1e-3


@pytest.mark.parametrize(
    "metric", [METRIC, lambda logits: logits[:, -1, 3].mean(), [METRIC, kl_divergence()]]
)
def test_gradients_of_any_metric_and_of_weights(metric):
    model, (clean, corrupted) = model_of_sweep(), pair(2)
    scores = sweep(
        model, clean, corrupted, sites="mlp_out", by="layer", metric=metric, gradients=True
    )
    scores.values.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert float(model.blocks[0].attn.W_V.grad.norm()) > 0
    plain = sweep(model, clean, corrupted, sites="mlp_out", by="layer", metric=metric)
    assert_close_to(plain.values, scores.values.detach(), atol=1e-12)


def test_scores_with_a_graph_can_be_shown_and_saved(tmp_path):
    model, (clean, corrupted) = model_of_sweep(), pair(2)
    vector = torch.ones(32, dtype=torch.float64, requires_grad=True)
    scores = sweep(
        model, clean, corrupted, metric=METRIC, source=vector, mode="add", gradients=True
    )
    assert "strongest" in repr(scores) and scores.table(3)
    scores.save(tmp_path)
    assert torch.equal(Scores.load(tmp_path).values, scores.values.detach())
    with pytest.raises(SweepError, match="out= keeps numbers, not graphs"):
        sweep(model, clean, corrupted, metric=METRIC, gradients=True, out=tmp_path / "new")


def test_without_being_asked_there_is_no_graph():
    model, (clean, corrupted) = model_of_sweep(), pair()
    vector = torch.ones(32, dtype=torch.float64, requires_grad=True)
    scores = sweep(model, clean, corrupted, metric=METRIC, source=vector, mode="add")
    assert scores.plan["strategy"] == WAVE and not scores.values.requires_grad
