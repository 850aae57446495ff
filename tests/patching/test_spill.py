"""Where chunks wait."""

import errno
import os
import subprocess
import sys
from collections import namedtuple
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlens.errors import SourceError
from fastlens.patching import spill
from fastlens.patching.spill import InMemory, OnDisk, Waiting, free_on_disk
from fastlens.patching.uses import ChunkUse

ROOT = Path(__file__).parents[2]


def rows(n, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=draw).to(dtype)
    return {
        "x": x,
        "whose": torch.arange(2 * n).view(2, n).int(),
        "counts": torch.ones(3, 2).long(),
    }


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name])


def use_of(n):
    return ChunkUse(np.arange(n).reshape(1, n), np.arange(n))


@pytest.mark.parametrize("make", [InMemory, lambda: InMemory(torch.device("cpu")), OnDisk])
def test_what_is_put_comes_back(make):
    with closing(make()) as waiting:
        assert isinstance(waiting, Waiting)
        # They grow, shrink and change places.
        for turn in range(4):
            for chunk in range(5):
                if turn == 0:
                    waiting.put_use(chunk, use_of(chunk))
                waiting.put(chunk, rows((7 * turn + 3 * chunk) % 11, 10 * turn + chunk))
            for chunk in range(5):
                same(waiting.take(chunk), rows((7 * turn + 3 * chunk) % 11, 10 * turn + chunk))
                got = waiting.use(chunk)
                assert np.array_equal(got.example, use_of(chunk).example)
        waiting.drop(3)
        waiting.drop(77)
        with pytest.raises(KeyError):
            waiting.use(3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    with closing(OnDisk()) as waiting:
        waiting.put(0, rows(6, dtype=dtype))
        strided = {"x": rows(6, dtype=dtype)["x"].t()}
        waiting.put(1, strided)
        same(waiting.take(0), rows(6, dtype=dtype))
        same(waiting.take(1), strided)


def test_the_file_does_not_grow_with_the_layers():
    with closing(OnDisk()) as waiting:
        for turn in range(20):
            for chunk in range(3):
                waiting.put(chunk, rows(50, turn))
        assert waiting._end <= 3 * (50 * 5 * 4 + 50 * 8 + 48)
        assert waiting.written == 20 * waiting._end and waiting.read == 0


def test_no_file_is_seen_and_none_is_left(tmp_path):
    with closing(OnDisk(tmp_path, expected=100)) as waiting:
        waiting.put(0, rows(100))
        assert list(tmp_path.iterdir()) == []
        file = waiting._file
    assert file.closed and list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from fastlens.patching.spill import OnDisk
waiting = OnDisk(Path(sys.argv[1]))
waiting.put(0, {"x": torch.ones(1000)})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_process_leaves_no_file(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, env=environment).returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_first(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(spill.shutil, "disk_usage", lambda path: usage(10, 5, 1000))
    assert free_on_disk(tmp_path) == 1000
    OnDisk(tmp_path, 1000).close()
    with pytest.raises(
        SourceError, match=r"take 1\.95 KiB on the disk of .* 1000 bytes free. Free"
    ):
        OnDisk(tmp_path, 2000)
    with pytest.raises(SourceError, match="cannot be written to: No such file"):
        OnDisk(tmp_path / "nowhere")


def test_no_folder_has_no_room(tmp_path):
    assert free_on_disk(tmp_path / "nowhere") == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_while_written_to(tmp_path, number):
    waiting = OnDisk(tmp_path)
    waiting.put(0, rows(3))
    real = waiting._file

    class Faulty:
        def write(self, data):
            raise OSError(number, os.strerror(number))

        def readinto(self, data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def seek(self, at):
            return real.seek(at)

        def close(self):
            real.close()

    waiting._file = Faulty()
    advice = "Free some space there" if number == errno.ENOSPC else r"error\.$"
    with pytest.raises(SourceError, match=f"cannot be written to: .*{advice}"):
        waiting.put(1, rows(3))
    with pytest.raises(SourceError, match="cannot be read: Input/output error"):
        waiting.take(0)
    waiting.close()


def test_a_file_that_was_cut_is_an_error(tmp_path):
    with closing(OnDisk(tmp_path)) as waiting:
        waiting.put(0, rows(30))
        waiting._file.truncate(100)
        with pytest.raises(SourceError, match="shorter than what was written"):
            waiting.take(0)
