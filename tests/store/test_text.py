"""Capturing a text: right values, the same bytes whatever happened on the way."""

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.errors import ShapeError, SourceError, TokenError
from fastlens.store import Store, capture_text
from fastlens.store import folder as folder_module
from fastlens.store.sites import parse_sites
from fastlens.store.text import checked_dtype, run, weights_digest
from tests.toy import ours_toy

SITES = "resid_post:0,pattern:0:[0,2]"
RESID, PATTERN = "blocks.0.hook_resid_post", "blocks.0.attn.hook_pattern"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return ours_toy()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    chance = random.Random(0)
    return [" ".join(chance.choices("abcdefgh", k=chance.randint(3, 90))) for _ in range(24)]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def options(**more: Any) -> dict[str, Any]:
    return {"context": 32, "batch": 128, "dtype": "bf16", **more}


@pytest.mark.parametrize("join", [True, False])
def test_values_are_those_of_each_row_alone(
    model: HookedTransformer, texts: list[str], tmp_path: Path, join: bool
):
    store = capture_text(model, texts, SITES, tmp_path, **options(join=join, dtype=None))
    rows = {}
    for i in range(len(store)):
        tokens = store.read("tokens", i).long()
        rows |= dict(zip(store.read("rows", i).tolist(), tokens.tolist(), strict=True))
        for row in range(0, len(tokens), 4):
            _, cache = model.run_with_cache(tokens[row : row + 1])
            torch.testing.assert_close(store.read(RESID, i)[row], cache[RESID][0])
            torch.testing.assert_close(store.read(PATTERN, i)[row], cache[PATTERN][0, [0, 2]])
    assert sorted(rows) == list(range(len(rows)))
    assert store.verify() == []


def test_nothing_behind_the_last_layer_runs(model: HookedTransformer):
    ran = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in ("blocks.0", "blocks.1", "ln_final", "unembed")
    ]
    try:
        run(model, torch.ones(2, 5, dtype=torch.int32), parse_sites(SITES, model), None)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == ["blocks.0"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", torch.float64, "int8"])
def test_number_types(model: HookedTransformer, texts: list[str], tmp_path: Path, dtype: Any):
    plain = capture_text(model, texts, "resid_post:1", tmp_path / "a", **options(dtype=None))
    store = capture_text(model, texts, "resid_post:1", tmp_path / "b", **options(dtype=dtype))
    found = store.read("blocks.1.hook_resid_post", 0)
    whole = plain.read("blocks.1.hook_resid_post", 0)
    if dtype == "int8":
        assert (found - whole).norm() < 0.02 * whole.norm()
        assert store.shards[0].nbytes < plain.shards[0].nbytes
    else:
        assert torch.equal(found, whole.to(checked_dtype(dtype)))


def test_a_limit_counts_tokens(model: HookedTransformer, texts: list[str], tmp_path: Path):
    store = capture_text(model, texts, SITES, tmp_path, **options(limit=300))
    assert sum(store.read("tokens", i).numel() for i in range(len(store))) == 300


def test_a_finished_capture_is_not_made_again(
    model: HookedTransformer, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    capture_text(model, texts, SITES, tmp_path, **options())
    before = contents(tmp_path)
    monkeypatch.setattr(model, "run_with_cache", None)
    capture_text(model, texts, SITES, tmp_path, **options())
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "fp16"}, "dtype: 'bfloat16' there, 'float16' here"),
        ({"context": 16}, "context: 32 there, 16 here"),
        ({"sites": "resid_post:1"}, "sites: .*resid_post"),
        ({"texts": ["other"]}, "texts: "),
        ({"limit": 100}, "limit: None there, 100 here"),
    ],
)
def test_another_capture_in_the_folder_is_refused(
    model: HookedTransformer, texts: list[str], tmp_path: Path, change: dict[str, Any], match: str
):
    capture_text(model, texts, SITES, tmp_path, **options())
    what = {"texts": texts, "sites": SITES, **options(), **change}
    with pytest.raises(SourceError, match=match):
        capture_text(model, what.pop("texts"), what.pop("sites"), tmp_path, **what)


def test_another_model_is_refused(texts: list[str], tmp_path: Path):
    model = ours_toy()
    capture_text(model, texts, SITES, tmp_path, **options())
    before = weights_digest(model)
    with torch.no_grad():
        model.blocks[0].attn.W_Q[0, 0, 0] += 1
    assert weights_digest(model) != before
    with pytest.raises(SourceError, match="weights: "):
        capture_text(model, texts, SITES, tmp_path, **options())


def test_a_torn_shard_is_made_again(model: HookedTransformer, texts: list[str], tmp_path: Path):
    store = capture_text(model, texts, SITES, tmp_path, **options())
    whole = contents(tmp_path)
    store.shards[2].path.write_bytes(b"")
    store.shards[4].path.unlink()
    capture_text(model, texts, SITES, tmp_path, **options())
    assert contents(tmp_path) == whole


def test_a_full_disk_ends_it_and_it_goes_on_later(
    model: HookedTransformer, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = capture_text(model, texts, SITES, tmp_path / "a", **options())
    write, calls = folder_module.write_shard, []

    def full(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 3:
            raise SourceError("cannot write x: No space left on device.")
        return write(*arguments)

    monkeypatch.setattr(folder_module, "write_shard", full)
    with pytest.raises(SourceError, match=r"No space left.*The 3 shards before it are kept"):
        capture_text(model, texts, SITES, tmp_path / "b", **options())
    monkeypatch.undo()
    found = Store.open(tmp_path / "b")
    assert len(found) == 3 and torch.equal(found.read(RESID, 2), whole.read(RESID, 2))
    capture_text(model, texts, SITES, tmp_path / "b", **options())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_makes_no_sense(model: HookedTransformer, tmp_path: Path):
    for bad in ({"context": 0}, {"context": 9999}, {"batch": 0}, {"limit": 0}, {"dtype": "int4"}):
        with pytest.raises(ShapeError):
            capture_text(model, ["a"], SITES, tmp_path, **bad)
    bare = HookedTransformer(model.cfg)
    bare.tokenizer = None
    with pytest.raises(TokenError, match="tokenizer"):
        capture_text(bare, ["a"], SITES, tmp_path)


# Loads everything once; each capture is a forked process of its own, killed by the first one.
CAPTURES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from fastlens import HookedTransformer
from fastlens.store import capture_text

text, folder, n_tokens, batch, within = sys.argv[1], Path(sys.argv[2]), *map(float, sys.argv[3:])
model = HookedTransformer.from_pretrained("toy-induction", device="cpu", verbose=False).eval()

def begun(out):
    process = os.fork()
    if process == 0:
        try:
            capture_text(
                model, Path(text), "resid_post:0", folder / out, dtype="bf16", context=128,
                batch=int(batch), limit=int(n_tokens),
            )
        except BaseException:
            os._exit(1)
        os._exit(0)
    return process

def status(process):
    return os.waitpid(process, 0)[1]

assert status(begun("whole")) == 0
n_shards = len(list((folder / "whole" / "shards").iterdir()))
chance = random.Random(1)
for _ in range(10):
    process = begun("killed")
    shards = folder / "killed" / "shards"
    at = chance.randrange(n_shards)
    while os.waitpid(process, os.WNOHANG)[0] == 0:
        if shards.exists() and len(list(shards.iterdir())) > at:
            time.sleep(chance.uniform(0, within))
            os.kill(process, signal.SIGKILL)
            print("killed at", at, "of", n_shards)
            status(process)
            break
assert status(begun("killed")) == 0
"""


def killed_ten_times(folder: Path, n_tokens: int, batch: int, within: float) -> None:
    """Capture, killed at random moments ten times, gives the bytes of an unbroken capture."""
    chance = random.Random(1)
    lines = [" ".join(chance.choices("abcdefgh", k=500)) for _ in range(n_tokens // 400 + 1)]
    text = folder / "text"
    text.write_text("\n".join(lines))
    arguments = [str(text), str(folder), str(n_tokens), str(batch), str(within)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    found = subprocess.run(
        [sys.executable, "-c", CAPTURES, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("killed at") >= 5
    assert contents(folder / "killed") == contents(folder / "whole")
    assert Store.open(folder / "killed").verify() == []


def test_killed_ten_times_it_makes_the_same_bytes(tmp_path: Path):
    killed_ten_times(tmp_path, 8_000, 512, within=0.02)


@pytest.mark.full
def test_a_million_tokens_killed_ten_times_are_the_same_bytes(tmp_path: Path):
    killed_ten_times(tmp_path, 1_000_000, 8192, within=0.1)


class Killed(BaseException):
    """Raised where a kill would end the process."""


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    model: HookedTransformer, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    capture_text(model, texts, SITES, tmp_path / "a", **options())
    chance, replace = random.Random(0), Path.replace
    for _ in range(10):
        left = chance.randint(0, 4)

        def stops(path: Path, target: Path) -> Path:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", stops)
        with contextlib.suppress(Killed):
            capture_text(model, texts, SITES, tmp_path / "b", **options())
        monkeypatch.undo()
    capture_text(model, texts, SITES, tmp_path / "b", **options())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_streamed_model_has_the_digest_of_its_weights():
    models = [
        HookedTransformer.from_pretrained("toy-induction", offload=offload, verbose=False)
        for offload in (None, "disk")
    ]
    digests = [weights_digest(model) for model in models]
    assert digests[0] == digests[1]
    with torch.no_grad():
        models[1].blocks[0].attn.W_Q[0, 0, 0] += 1
    assert weights_digest(models[1]) != digests[0]
