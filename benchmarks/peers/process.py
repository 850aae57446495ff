"""Asks libraries in their own environments and processes to run sweeps in turn."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TRANSFORMER_LENS_4 = Path(__file__).with_name("transformer_lens_4_worker.py")
NNSIGHT = Path(__file__).with_name("nnsight_worker.py")


class Peer:
    """A worker process, which waits while others run.

    Attributes:
        about: What it runs: ``package``, ``torch``.
    """

    def __init__(self, worker: Path, process: subprocess.Popen, log: Path):
        self._worker = worker
        self._process = process
        self._log = log
        self.about: dict[str, str] = self._answer()

    def run(self, job: str) -> Tensor:
        """The values of one job."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(job + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        return torch.tensor(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise SystemExit(f"{self._worker.name} ended: " + " / ".join(said[-5:]))


@contextlib.contextmanager
def started(
    worker: Path, python: str | Path, hf: Any, jobs: Mapping[str, Any], threads: int
) -> Iterator[Peer]:
    """A worker with a model's weights, handed over in a folder that is gone afterwards.

    Args:
        worker: Its script.
        python: The interpreter of an environment with its library.
        hf: A GPT-2 of transformers.
        jobs: Name -> ``site``, ``by``, ``stack``, ``function`` (see `loops.FUNCTIONS`), ``clean``,
            ``corrupted``, ``answers``, ``indices`` and whether these are only ``drawn`` from all.

    Raises: SystemExit if it cannot be started, or ends early, with the last it said.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log.txt"
        hf.save_pretrained(folder)
        described = {"threads": threads, "jobs": dict(jobs)}
        (folder / "jobs.json").write_text(json.dumps(described), encoding="utf-8")
        threaded = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with log.open("w", encoding="utf-8") as errors:
            try:
                process = subprocess.Popen(
                    [str(python), str(worker), str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env={**os.environ, **threaded, "HF_HUB_OFFLINE": "1"},
                )
            except OSError as error:
                raise SystemExit(f"{python} cannot be run: {error}") from error
            with process:
                try:
                    yield Peer(worker, process, log)
                finally:
                    process.kill()
