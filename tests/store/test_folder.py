"""The store: appending, reading, and every way in which a disk or a kill can spoil it."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlens.errors import SourceError
from fastlens.ops.outlier_rows import capture_int8_outliers
from fastlens.store import Store

NAME = "blocks.0.hook_resid_post"


def tensor(n: int) -> torch.Tensor:
    return torch.arange(24.0).view(2, 3, 4) + 100 * n


def filled(folder: Path, n: int = 3) -> Store:
    with Store.create(folder, {"model": "a"}) as store:
        for i in range(n):
            store.append({NAME: tensor(i)}, {"i": i})
    return store


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_was_appended_is_read(tmp_path: Path):
    filled(tmp_path)
    store = Store.open(tmp_path)
    assert len(store) == 3 and store.key == {"model": "a"} and store.names() == [NAME]
    for i in range(3):
        assert torch.equal(store.read(NAME, i), tensor(i))
        assert store.shards[i].about == {"i": i}
    assert torch.equal(store.read(NAME, 1, [None, slice(1, 2)]), tensor(1)[:, 1:2])
    assert store.verify() == [] and not store.torn and not store.cut_off


def test_packed_entries_stay_packed(tmp_path: Path):
    rows = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(0))
    packed = capture_int8_outliers(rows)
    with Store.create(tmp_path) as store:
        store.append({NAME: packed})
    store = Store.open(tmp_path)
    assert store.names() == [NAME]
    assert torch.equal(store.read(NAME), packed.read())
    for there, here in zip(store.mapped(NAME), packed, strict=True):
        assert torch.equal(there, here)
    with pytest.raises(SourceError, match="read it whole"):
        store.read(NAME, part=[slice(0, 1)])


def test_appending_goes_on(tmp_path: Path):
    filled(tmp_path / "a", 2)
    with Store.create(tmp_path / "a", {"model": "a"}) as store:
        assert store.append({NAME: tensor(2)}, {"i": 2}) == 2
    filled(tmp_path / "b", 3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_key_is_refused_and_says_what_differs(tmp_path: Path):
    filled(tmp_path)
    with pytest.raises(SourceError, match="model: 'a' there, 'b' here"):
        Store.create(tmp_path, {"model": "b"})
    Store.create(tmp_path, {"model": "a"}).close()


def test_a_folder_of_somebody_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SourceError, match=r"other things than a store: 'thesis\.tex'"):
        Store.create(tmp_path)
    with pytest.raises(SourceError, match="is no store"):
        Store.open(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "x"}', '{"format": "fastlens.store"}'])
def test_a_store_file_of_another_kind(tmp_path: Path, text: str):
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(SourceError):
        Store.open(tmp_path)


def test_a_single_writer(tmp_path: Path):
    with (
        Store.create(tmp_path),
        pytest.raises(SourceError, match="in use by another capture of this process"),
    ):
        Store.create(tmp_path)
    store = Store.create(tmp_path)
    store.close()
    with pytest.raises(SourceError, match="not open for appending"):
        store.append({NAME: tensor(0)})


def test_a_name_that_no_shard_has(tmp_path: Path):
    with pytest.raises(SourceError, match=r"Nearest: 'blocks\.0\.hook_resid_post'"):
        filled(tmp_path).read("blocks.0.hook_resid_pos")


def test_a_torn_shard_is_named_and_the_others_are_read(tmp_path: Path):
    store = filled(tmp_path)
    os.truncate(store.shards[1].path, 100)
    store = Store.open(tmp_path)
    assert list(store.torn) == [1] and "000001" in store.torn[1] and NAME in store.torn[1]
    with pytest.raises(SourceError, match=r"000001\.safetensors .* is torn"):
        store.read(NAME, 1)
    assert torch.equal(store.read(NAME, 0), tensor(0))
    assert torch.equal(store.read(NAME, 2), tensor(2))
    assert len(store.verify()) == 1


def test_a_torn_shard_is_made_again_from_the_same_bytes_only(tmp_path: Path):
    before = filled(tmp_path)
    whole = contents(tmp_path)
    before.shards[1].path.unlink()
    with Store.create(tmp_path, {"model": "a"}) as store:
        with pytest.raises(SourceError, match="made again it differs"):
            store.restore(1, {NAME: tensor(7)}, {"i": 1})
        store.restore(1, {NAME: tensor(1)}, {"i": 1})
        assert not store.torn and torch.equal(store.read(NAME, 1), tensor(1))
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_half_a_line_of_the_index_is_nobodys(tmp_path: Path, cut: int):
    filled(tmp_path)
    whole = contents(tmp_path)
    index = tmp_path / "index.jsonl"
    os.truncate(index, index.stat().st_size - cut)
    store = Store.open(tmp_path)
    assert len(store) == 2 and "shard 000002" in store.cut_off and store.verify()
    assert torch.equal(store.read(NAME, 1), tensor(1))
    with Store.create(tmp_path, {"model": "a"}) as store:
        store.append({NAME: tensor(2)}, {"i": 2})
    assert contents(tmp_path) == whole


def test_a_damaged_line_with_whole_ones_behind_is_an_error(tmp_path: Path):
    filled(tmp_path)
    index = tmp_path / "index.jsonl"
    data = bytearray(index.read_bytes())
    data[10] ^= 1
    index.write_bytes(data)
    with pytest.raises(SourceError, match="damaged in line 1"):
        Store.open(tmp_path)


def test_what_a_killed_writer_left_is_removed(tmp_path: Path):
    filled(tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "shards" / "000003.safetensors").write_bytes(b"whole, but without its line")
    (tmp_path / "shards" / ".000004.safetensors.tmp").write_bytes(b"half")
    (tmp_path / ".store.json.tmp").write_bytes(b"half")
    Store.create(tmp_path, {"model": "a"}).close()
    assert contents(tmp_path) == whole


# The shard's own flush is the first, the folder's the second, the index's the third.
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_costs_one_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, number: int
):
    filled(tmp_path)
    whole = contents(tmp_path)
    calls = []

    def failing(file: int) -> None:
        calls.append(file)
        if len(calls) == at:
            raise OSError(number, os.strerror(number))

    with Store.create(tmp_path, {"model": "a"}) as store:
        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(SourceError, match=os.strerror(number)):
            store.append({NAME: tensor(3)}, {"i": 3})
        monkeypatch.undo()
        assert torch.equal(store.read(NAME, 2), tensor(2))
        assert Store.open(tmp_path).verify() == []
        store.append({NAME: tensor(3)}, {"i": 3})
    assert len(Store.open(tmp_path)) == 4 and Store.open(tmp_path).verify() == []
    assert {name: data for name, data in contents(tmp_path).items() if name in whole}.keys() == (
        whole.keys()
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_file_that_may_not_grow(tmp_path: Path):
    filled(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Store.create(tmp_path, {"model": "a"}) as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            with pytest.raises(SourceError, match=r"File too large.*The 1 shards before"):
                store.append({NAME: torch.zeros(1, 100, 100)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    store = Store.open(tmp_path)
    assert store.verify() == [] and torch.equal(store.read(NAME), tensor(0))


def test_a_dead_process_lets_the_folder_go(tmp_path: Path):
    code = (
        "import os, signal, sys; from fastlens.store import Store;"
        "Store.create(sys.argv[1]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert found.returncode == -signal.SIGKILL
    Store.create(tmp_path).close()
