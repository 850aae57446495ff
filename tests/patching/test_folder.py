"""Sweep folders: what is finished stays, what is torn is found, whatever kills the process."""

import contextlib
import errno
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastlens.errors import SourceError
from fastlens.patching.folder import (
    CHUNKS_NAME,
    PLAN_NAME,
    SweepFolder,
)
from fastlens.scores import Scores
from fastlens.store.files import LOCK_NAME

ROOT = Path(__file__).parents[2]
KEY = {
    "tokens": [[464, 318], [50256, 11]],
    "metric": "logit difference",
    "base": {"clean": 3.25, "corrupted": float("nan")},
    "weights": "00ff",
}
LAYOUT = {"chunks": [[0, 1], [2, 3], [4]], "threads": 2, "versions": {"torch": "2.13"}}


def opened(path, key=KEY, layout=LAYOUT):
    return SweepFolder.open(path, key, layout)


def content(chunk, scale=1.0):
    generator = torch.Generator().manual_seed(chunk)
    values = torch.randn(3, 4, generator=generator) * scale
    return {"values": values, "seen": torch.tensor([chunk, -1])}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor):
    plain = tensor.detach().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8)


def shard(path, chunk):
    return path / CHUNKS_NAME / f"{chunk:05d}.safetensors"


def finished(path):
    with opened(path) as folder:
        return folder.finished()


def left_over(path):
    return [p for p in path.rglob(".*") if p.name != LOCK_NAME]


# -- writing and reading -------------------------------------------------------------------------


def test_chunks_come_back_in_any_order(tmp_path):
    path = tmp_path / "deep" / "sweep"
    with opened(path) as folder:
        assert folder.finished() == [] and folder.torn == []
        for chunk in (2, 0):
            folder.write(chunk, content(chunk))
        assert folder.finished() == [0, 2]
    with opened(path) as folder:
        assert folder.finished() == [0, 2] and folder.torn == []
        folder.write(100_000, content(1))
        folder.write(99_999, content(3))
        assert folder.finished() == [0, 2, 99_999, 100_000]
        for chunk, seed in ((0, 0), (2, 2), (100_000, 1)):
            assert_same(folder.read(chunk), content(seed))
        with pytest.raises(SourceError, match="cannot read .*00001.safetensors: No such file"):
            folder.read(1)
    assert left_over(path) == []


def test_files_are_plain_safetensors_and_json(tmp_path):
    with opened(tmp_path) as folder:
        folder.write(0, content(0))
    assert_same(load_file(shard(tmp_path, 0)), content(0))
    plan = json.loads((tmp_path / PLAN_NAME).read_text())
    assert plan["format"] == "fastlens.sweep" and plan["layout"] == LAYOUT
    assert sorted(p.name for p in tmp_path.iterdir()) == [LOCK_NAME, CHUNKS_NAME, PLAN_NAME]


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = content(0)
    turned = {name: tensors[name] for name in reversed(tensors)}
    for name, given_ in (("a", tensors), ("b", turned)):
        with opened(tmp_path / name) as folder:
            folder.write(0, given_)
            first = shard(folder.path, 0).read_bytes()
            folder.write(0, given_)
            assert shard(folder.path, 0).read_bytes() == first
    assert shard(tmp_path / "a", 0).read_bytes() == shard(tmp_path / "b", 0).read_bytes()


def test_a_chunk_written_again_is_replaced(tmp_path):
    with opened(tmp_path) as folder:
        folder.write(0, content(0))
        folder.write(0, content(1))
        assert_same(folder.read(0), content(1))


def test_strides_sharing_and_gradients_do_not_matter(tmp_path):
    values = torch.randn(4, 6, requires_grad=True)
    odd = {
        "all": values, "turned": values.T, "same": values, "part": values[1:3, ::2],
        "spread": torch.ones(1).expand(5), "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    }  # fmt: skip
    with opened(tmp_path) as folder:
        folder.write(0, odd)
        found = folder.read(0)
    assert not any(tensor.requires_grad for tensor in found.values())
    assert_same(found, {name: tensor.resolve_conj() for name, tensor in odd.items()})


DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("property")) as folder:
        yield folder


@given(
    chunk=st.integers(0, 10**7),
    specs=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=70),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)),
        max_size=5,
    ),
    seed=st.integers(0, 2**31),
)
def test_what_is_written_is_read(one_folder, chunk, specs, seed):
    """Bit for bit, for any names, types and shapes: NaN and empty tensors too."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in specs.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        top = 2 if dtype is torch.bool else 256
        data = torch.randint(0, top, (size,), generator=generator).to(torch.uint8)
        tensors[name] = data.view(dtype).reshape(shape)
    one_folder.write(chunk, tensors)
    assert_same(one_folder.read(chunk), tensors)
    assert chunk in one_folder.finished() and one_folder.torn == []
    shard(one_folder.path, chunk).unlink()


def test_zeros_where_a_digest_could_be(tmp_path):
    tensors = {"0" * 64: torch.ones(2), "a": torch.full((80,), ord("0"), dtype=torch.uint8)}
    with opened(tmp_path) as folder:
        folder.write(0, tensors)
        assert_same(folder.read(0), tensors)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"values": torch.zeros(1, dtype=torch.complex128)}, "'values' .torch.complex128"),
        ({"__metadata__": torch.zeros(1)}, "'__metadata__'"),
        ({"v": torch.zeros(2, dtype=torch.uint8).view(torch.float8_e8m0fnu)}, "float8_e8m0fnu"),
    ],
    ids=["complex128", "reserved name", "written but not read"],
)
def test_what_safetensors_cannot_hold_is_refused(tmp_path, tensors, found):
    with opened(tmp_path) as folder:
        with pytest.raises(SourceError, match=f"cannot write .*00000.*{found}"):
            folder.write(0, tensors)
        assert folder.finished() == []


def test_chunks_are_numbered_from_0(tmp_path):
    with opened(tmp_path) as folder, pytest.raises(SourceError, match="from 0; got -1"):
        folder.write(-1, content(0))


# -- torn and foreign shards ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with chunks 0 and 1, and the bytes of chunk 1."""
    path = tmp_path_factory.mktemp("whole")
    with opened(path) as folder:
        folder.write(0, content(0))
        folder.write(1, content(1))
    return path, shard(path, 1).read_bytes()


def assert_torn(path, data, match="00001.safetensors is torn"):
    """With these bytes in its shard, chunk 1 is not finished; written again, it is."""
    shard(path, 1).write_bytes(data)
    with opened(path) as folder:
        assert folder.finished() == [0]
        assert len(folder.torn) == 1 and match in folder.torn[0]
        with pytest.raises(SourceError, match=match):
            folder.read(1)
        folder.write(1, content(1))
        assert folder.finished() == [0, 1] and folder.torn == []


def test_a_shard_cut_off_anywhere_is_torn(whole):
    path, data = whole
    header = 8 + int.from_bytes(data[:8], "little")
    lengths = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(data) - 1}
    for length in sorted(lengths):
        assert_torn(path, data[:length])
        assert shard(path, 1).read_bytes() == data


def test_a_shard_with_any_byte_changed_is_torn(whole):
    path, data = whole
    passed = []
    with opened(path) as folder:
        for place in range(len(data)):
            changed = bytearray(data)
            changed[place] ^= 1 << (place % 8)
            shard(path, 1).write_bytes(changed)
            with contextlib.suppress(SourceError):
                folder.read(1)
                passed.append(place)
    assert passed == []
    assert_torn(path, bytes(changed))


@given(cut=st.floats(0, 1), tail=st.binary(max_size=40))
def test_a_shard_with_another_end_is_torn(whole, cut, tail):
    path, data = whole
    changed = data[: int(cut * len(data))] + tail
    if changed != data:
        assert_torn(path, changed)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x00" * 2000, b"\xff" * 2000, b"not a shard at all",
        (2).to_bytes(8, "little") + b"{}",
        (40).to_bytes(8, "little") + b'{"__metadata__":{"fastlens.chunk":"1 a"}}',
        (42).to_bytes(8, "little") + b'{"__metadata__":{"fastlens.chunk":"\\ud800"}}',
        (5000).to_bytes(8, "little") + b"[" * 5000,
    ],
    ids=["empty", "zeros", "ones", "text", "bare", "no digest", "surrogate", "deep"],
)  # fmt: skip
def test_what_is_no_shard_is_torn(whole, data):
    assert_torn(whole[0], data)


def test_a_safetensors_file_of_someone_else_is_torn(whole):
    path, _ = whole
    save_file(content(1), shard(path, 1))
    assert_torn(path, shard(path, 1).read_bytes())


def test_a_shard_of_another_chunk_or_sweep_is_foreign(whole, tmp_path):
    path, _ = whole
    foreign = "whole, but was written by another sweep or chunk"
    assert_torn(path, shard(path, 0).read_bytes(), foreign)
    for key, layout in (({**KEY, "weights": "00fe"}, LAYOUT), (KEY, {**LAYOUT, "threads": 1})):
        other = tmp_path / f"{key['weights']}-{layout['threads']}"
        with opened(other, key, layout) as folder:
            folder.write(1, content(1))
        assert_torn(path, shard(other, 1).read_bytes(), foreign)


def test_other_names_among_the_shards(whole):
    path, data = whole
    folder = path / CHUNKS_NAME
    names = ["1.safetensors", "000001.safetensors", "copy of 00001.safetensors", "x.safetensors"]
    for name in [*names, "notes.txt", ".DS_Store"]:
        (folder / name).write_bytes(data)
    (folder / "00007.safetensors").mkdir()
    with opened(path) as opened_folder:
        assert opened_folder.finished() == [0, 1]
        torn = "\n".join(opened_folder.torn)
        assert len(opened_folder.torn) == 5 and all(name in torn for name in names)
        assert "cannot read" in torn and "is no chunk's name" in torn
        with pytest.raises(SourceError, match="cannot write .*00007.safetensors"):
            opened_folder.write(7, content(7))
    assert (folder / "notes.txt").exists()
    for name in [*names, "notes.txt", ".DS_Store"]:
        (folder / name).unlink()
    (folder / "00007.safetensors").rmdir()


# -- which sweep it is ---------------------------------------------------------------------------


def test_the_stored_layout_is_kept(tmp_path):
    with opened(tmp_path, layout={"chunks": ((0, 1), (2,)), "threads": 1}) as folder:
        assert folder.layout == {"chunks": [[0, 1], [2]], "threads": 1}
        folder.write(0, content(0))
    before = (tmp_path / PLAN_NAME).read_bytes()
    with opened(tmp_path, layout={"chunks": [[0], [1], [2]], "threads": 64}) as folder:
        assert folder.layout == {"chunks": [[0, 1], [2]], "threads": 1}
        assert folder.finished() == [0]
    assert (tmp_path / PLAN_NAME).read_bytes() == before


def test_the_same_key_in_another_order_or_with_tuples(tmp_path):
    with opened(tmp_path) as folder:
        folder.write(0, content(0))
    key = {name: KEY[name] for name in reversed(KEY)} | {"tokens": ((464, 318), (50256, 11))}
    with opened(tmp_path, key) as folder:
        assert folder.finished() == [0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metric": "KL"}, "metric: 'logit difference' there, 'KL' here"),
        ({"tokens": [[464, 318], [50256, 13]]}, "tokens[1][1]: 11 there, 13 here"),
        ({"tokens": [[464, 318]]}, "tokens: 2 entries there, 1 here"),
        ({"base": {"clean": 3.0, "corrupted": float("nan")}}, "base.clean: 3.25 there, 3.0 here"),
        ({"base": {"clean": 3.25}}, "base.corrupted: nan there, nothing here"),
        ({"base": "nothing"}, "there, 'nothing' here"),
        ({"layers": None}, "layers: nothing there, None here"),
        ({"layers": "nothing"}, "layers: nothing there, 'nothing' here"),
        ({"weights": "x" * 500}, f"weights: '00ff' there, '{'x' * 56}... here"),
        ({"metric": "KL", "weights": 1}, "there, 'KL' here; weights: '00ff' there, 1 here. Give"),
        (
            dict.fromkeys("abcdef", 0),
            "a: nothing there, 0 here; b: nothing there, 0 here; c: nothing there, 0 here; "
            "d: nothing there, 0 here; and 2 more. Give another folder, or delete this one",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:40],
)
def test_another_sweep_is_refused_and_says_why(tmp_path, changes, sentence):
    with opened(tmp_path) as folder:
        folder.write(0, content(0))
    with pytest.raises(SourceError) as caught:
        opened(tmp_path, {**KEY, **changes})
    assert f"the folder {tmp_path} holds another sweep: " in str(caught.value)
    assert sentence in str(caught.value)
    assert finished(tmp_path) == [0]


def test_a_key_with_less_is_another(tmp_path):
    opened(tmp_path).close()
    with pytest.raises(SourceError, match="another sweep: weights: '00ff' there, nothing here"):
        opened(tmp_path, {name: KEY[name] for name in KEY if name != "weights"})


def test_true_is_not_one(tmp_path):
    opened(tmp_path, {"a": 1}).close()
    with pytest.raises(SourceError, match="a: 1 there, True here"):
        opened(tmp_path, {"a": True})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is torn or is not JSON"),
        ('{"format": "fastlens.sw', "is torn or is not JSON"),
        ("\xff\xfe", "is torn or is not JSON"),
        ("[1]", "was not written by a sweep of fastlens"),
        ('{"plan": "buy milk"}', "was not written by a sweep of fastlens"),
        ('{"format": "fastlens.sweep", "version": 2}', "has format version 2; this .* reads 1"),
        ('{"format": "fastlens.sweep", "version": 1}', "was changed after it was written"),
    ],
)
def test_a_plan_that_is_not_ours_is_refused(tmp_path, text, sentence):
    (tmp_path / PLAN_NAME).write_bytes(text.encode("latin-1"))
    (tmp_path / f".{PLAN_NAME}.1").write_text("mine")
    with pytest.raises(SourceError, match=sentence):
        opened(tmp_path)
    assert (tmp_path / PLAN_NAME).read_bytes() == text.encode("latin-1")
    assert not (tmp_path / CHUNKS_NAME).exists()
    # Nothing of ours is put into a folder that is not, and nothing is taken away.
    if "was changed" not in sentence:
        assert sorted(p.name for p in tmp_path.iterdir()) == [f".{PLAN_NAME}.1", PLAN_NAME]


def test_an_edited_layout_is_noticed(tmp_path):
    """Chunks made under one table must not be read under another."""
    opened(tmp_path).close()
    plan = json.loads((tmp_path / PLAN_NAME).read_text())
    plan["layout"]["chunks"][0] = [0]
    (tmp_path / PLAN_NAME).write_text(json.dumps(plan))
    with pytest.raises(SourceError, match="was changed after it was written"):
        opened(tmp_path)


def test_saved_scores_are_not_a_sweep_to_go_on_with(tmp_path):
    Scores(torch.zeros(2), ("layer",)).save(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SourceError, match=r"scores written by Scores.save, with no plan.json"):
        opened(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_scores_may_be_saved_beside_the_chunks(tmp_path):
    with opened(tmp_path) as folder:
        folder.write(0, content(0))
        Scores(torch.zeros(2), ("layer",)).save(tmp_path)
    assert finished(tmp_path) == [0]
    assert Scores.load(tmp_path).axes == ("layer",)


@pytest.mark.parametrize("names", [["notes.txt"], ["chunks"], list("abcdefg")], ids=str)
def test_a_folder_of_other_things_is_left_alone(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(SourceError, match=f"other things than a sweep: '{names[0]}'.*empty folder"):
        opened(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_hidden_files_are_nobodys_work(tmp_path):
    (tmp_path / ".gitkeep").touch()
    with opened(tmp_path) as folder:
        folder.write(0, content(0))
    assert (tmp_path / ".gitkeep").exists()


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(SourceError, match=f"the folder {path}"):
        opened(path)
    assert path.read_text() == "mine"


# -- left-overs, locks, and disks that refuse ----------------------------------------------------


def test_left_over_files_of_killed_runs_are_removed(tmp_path):
    with opened(tmp_path) as folder:
        folder.write(0, content(0))
        kept = [tmp_path / name for name in (".gitkeep", ".plan.json.orig", "chunks/.x.1")]
        gone = [
            tmp_path / ".plan.json.12", tmp_path / ".writable-99", tmp_path / ".scores.json.3",
            tmp_path / ".scores.safetensors.3", tmp_path / CHUNKS_NAME / ".00001.safetensors.123",
        ]  # fmt: skip
        for file in [*kept, *gone]:
            file.write_text("half")
        assert folder.finished() == [0] and folder.torn == []
        folder.clear_temporary()
        assert not any(file.exists() for file in gone) and all(file.exists() for file in kept)
        for file in gone:
            file.write_text("half")
    with opened(tmp_path):
        assert not any(file.exists() for file in gone) and all(file.exists() for file in kept)


def test_a_kill_before_the_plan_leaves_a_new_folder(tmp_path):
    (tmp_path / LOCK_NAME).write_text("process 4 on x")
    (tmp_path / f".{PLAN_NAME}.4").write_text('{"format"')
    assert finished(tmp_path) == []
    assert left_over(tmp_path) == []


def test_a_second_sweep_in_the_folder_is_refused(tmp_path):
    with opened(tmp_path) as folder:
        with pytest.raises(SourceError, match="is in use by another sweep of this process. Wait"):
            opened(tmp_path)
        folder.write(0, content(0))
    with opened(tmp_path) as folder:
        assert folder.finished() == [0]


def test_a_closed_folder_is_read_and_not_written(tmp_path):
    with opened(tmp_path) as folder:
        folder.write(0, content(0))
    folder.close()
    assert_same(folder.read(0), content(0))
    with pytest.raises(SourceError, match="the folder was closed. Open it again"):
        folder.write(1, content(1))


def test_a_forgotten_folder_is_free_again(tmp_path):
    folder = opened(tmp_path)
    del folder
    opened(tmp_path).close()


def test_a_refused_open_holds_no_lock(tmp_path):
    opened(tmp_path).close()
    for _ in range(3):
        with pytest.raises(SourceError, match="another sweep"):
            opened(tmp_path, {"other": 1})
    opened(tmp_path).close()


def test_without_flock_there_is_no_lock(tmp_path, monkeypatch):
    from fastlens.store import files as module

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with opened(tmp_path) as first, opened(tmp_path) as second:
        first.write(0, content(0))
        assert second.finished() == [0]


def failing(error):
    """A call to the system that fails with this error number."""

    def call(*_, **__):
        raise OSError(error, os.strerror(error))

    return call


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (errno.ENOSPC, "No space left on device. Free some space there"),
        (errno.EDQUOT, "Free some space there"),
        (errno.EROFS, "Read-only file system. Give a folder that you may write to"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_refuses_a_chunk(tmp_path, monkeypatch, error, advice, where):
    with opened(tmp_path) as folder:
        folder.write(0, content(0))
        folder.write(1, content(1))
        with monkeypatch.context() as patch:
            patch.setattr(os if where == "fsync" else Path, where, failing(error))
            for chunk in (1, 2):
                with pytest.raises(SourceError) as caught:
                    folder.write(chunk, content(7))
                assert f"cannot write {shard(tmp_path, chunk)}" in str(caught.value)
                assert advice in str(caught.value)
                assert "The finished chunks are kept" in str(caught.value)
                assert isinstance(caught.value.__cause__, OSError)
        assert left_over(tmp_path) == []
        assert folder.finished() == [0, 1] and folder.torn == []
        assert_same(folder.read(1), content(1))
        folder.write(2, content(2))
        assert folder.finished() == [0, 1, 2]


@pytest.mark.parametrize("call", ["mkdir", "replace", "write_bytes"])
def test_a_disk_that_refuses_the_folder(tmp_path, monkeypatch, call):
    """And a refused folder is neither locked nor half made."""
    path = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        patch.setattr(Path, call, failing(errno.EROFS))
        with pytest.raises(SourceError, match=f"{path}.*Give a folder that you may write to"):
            opened(path)
    assert finished(path) == []


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with opened(tmp_path) as folder:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                folder.write(0, content(0))
        assert folder.finished() == [] and left_over(tmp_path) == []


# -- other processes -----------------------------------------------------------------------------

# Imports the library once and forks a process for each line it reads, which runs one function.
NURSERY = """
import os, resource, signal, sys, time
import torch
from fastlens.errors import SourceError
from fastlens.patching.folder import SweepFolder
from tests.patching.test_folder import KEY, LAYOUT, N_LARGE, large, opened

def say(text):
    os.write(1, (text + "\\n").encode())

def write(path):
    with opened(path) as folder:
        for chunk in set(range(N_LARGE)) - set(folder.finished()):
            folder.write(chunk, large(chunk))

def write_and_wait(path):
    write(path)
    time.sleep(60)

def die_inside(path):
    folder = opened(path)
    os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
    folder.write(1, large(1))

def limit(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    with opened(path) as folder:
        folder.write(0, {"values": torch.zeros(10)})
        folder.write(1, large(1))

def use(path):
    opened(path).close()

def use_without_rights(path):
    if os.geteuid() == 0:
        os.setuid(65534)
    use(path)

def hold(path):
    folder = opened(path)
    if os.fork() == 0:
        say(f"orphan {os.getpid()}")
        time.sleep(60)
        os._exit(0)
    time.sleep(60)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
say("ready")
for line in sys.stdin:
    name, path = line.split(maxsplit=1)
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        say(f"pid {os.getpid()}")
        try:
            globals()[name](path.strip())
            say("done")
        except SourceError as error:
            say(f"refused {error}")
        except BaseException as error:
            say(f"failed with {error!r}")
        finally:
            os._exit(0)
"""
N_LARGE = 60


def large(chunk):
    """About a megabyte, so that most of a process's time goes into writing it."""
    return {"values": torch.arange(chunk, chunk + 200_000 + chunk, dtype=torch.float32)}


class Nursery:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert self.says() == "ready"

    def says(self):
        ready, _, _ = select.select([self.process.stdout], [], [], 120)
        assert ready, "the process says nothing"
        return self.process.stdout.readline().decode().strip()

    def start(self, name, path):
        """The process id of the child that runs the function."""
        self.process.stdin.write(f"{name} {path}\n".encode())
        word, pid = self.says().split()
        assert word == "pid"
        return int(pid)

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def wait_for_end(pid):
    for _ in range(6000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} does not end")


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


def test_killed_at_any_moment_every_finished_chunk_is_whole(tmp_path, nursery):
    """Ten processes one after another go on where the one before was killed."""
    path = tmp_path / "sweep"
    draw = random.Random(0)
    counts = []
    for _ in range(10):
        more = draw.randint(0, 4)
        before = len(list(path.glob(f"{CHUNKS_NAME}/0*")))
        pid = nursery.start("write_and_wait", path)
        # By chunks and not by time: how far it gets in a second differs between machines.
        for _ in range(20_000):
            if len(list(path.glob(f"{CHUNKS_NAME}/0*"))) >= min(before + more, N_LARGE):
                break
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.005))
        kill(pid)
        with opened(path) as folder:
            found = folder.finished()
            assert folder.torn == []
            for chunk in found:
                assert_same(folder.read(chunk), large(chunk))
        assert left_over(path) == []
        counts.append(len(found))
    assert counts == sorted(counts) and counts[-1] > 0
    assert sum(count < N_LARGE for count in counts) >= 5, "most were done before they were killed"
    nursery.start("write", path)
    assert nursery.says() == "done"
    assert finished(path) == list(range(N_LARGE))
    whole = tmp_path / "uninterrupted"
    nursery.start("write", whole)
    assert nursery.says() == "done"
    for chunk in range(N_LARGE):
        assert shard(path, chunk).read_bytes() == shard(whole, chunk).read_bytes()
    shutil.rmtree(tmp_path)


def test_killed_inside_a_write(tmp_path, nursery):
    with opened(tmp_path) as folder:
        folder.write(0, content(0))
    wait_for_end(nursery.start("die_inside", tmp_path))
    assert [p.name.rpartition(".")[0] for p in left_over(tmp_path)] == [".00001.safetensors"]
    with opened(tmp_path) as folder:
        assert folder.finished() == [0] and folder.torn == []
    assert left_over(tmp_path) == []


def test_another_process_is_refused_and_named(tmp_path, nursery):
    with opened(tmp_path):
        nursery.start("use", tmp_path)
        said = nursery.says()
        assert said.startswith(f"refused the folder {tmp_path} is in use by process {os.getpid()} ")
    nursery.start("use", tmp_path)
    assert nursery.says() == "done"


def test_the_child_of_a_dead_process_does_not_hold_its_lock(tmp_path, nursery):
    pid = nursery.start("hold", tmp_path)
    orphan = int(nursery.says().removeprefix("orphan "))
    try:
        with pytest.raises(SourceError, match=f"in use by process {pid} on"):
            opened(tmp_path)
        kill(pid)
        opened(tmp_path).close()
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_folder_without_rights_is_refused(tmp_path, nursery):
    path = tmp_path / "sweep"
    path.mkdir(mode=0o500)
    nursery.start("use_without_rights", path)
    assert re.match(f"refused .*{path}: Permission denied", nursery.says())
    assert list(path.iterdir()) == []


def test_a_real_limit_on_what_can_be_written(tmp_path, nursery):
    nursery.start("limit", tmp_path)
    said = nursery.says()
    assert f"cannot write {shard(tmp_path, 1)}: File too large. Raise the limit" in said
    assert finished(tmp_path) == [0] and left_over(tmp_path) == []
