"""``max_memory`` is a promise: resident memory of a fresh process, and the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.peers.llama_checkpoint import SMALL, TWO_GIGABYTES, write_llama
from fastlens import HookedTransformer
from fastlens.patching import logit_diff, sweep
from tests.smollm2 import smollm2

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
SITE = "blocks.7.hook_resid_post"

# What `import fastlens` takes is counted before; everything after is the model's.
PROBE = """
import json, sys, threading, time
import torch
import fastlens
from fastlens import HookedTransformer
from fastlens.memory import resident_bytes
from fastlens.patching import logit_diff, sweep
from fastlens.weights.source import open_source

name, out, options, clean, corrupted, site = json.loads(sys.argv[1])
if name == "smollm2-135m":
    options["tokenizer"] = open_source(name).tokenizer()
    options["tokenizer"]("once")
before = peak = resident_bytes()

def watch():
    global peak
    while True:
        peak = max(peak, resident_bytes())
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
torch.set_grad_enabled(False)
model = HookedTransformer.from_pretrained(name, verbose=False, **options)
loaded = resident_bytes() - before
if not isinstance(clean, str):
    clean, corrupted = torch.tensor([clean]), torch.tensor([corrupted])
scores = sweep(model, clean, corrupted, metric=logit_diff(5, 9), progress=False)
_, cache = model.run_with_cache(clean, names_filter=site, return_type=None)
torch.save((scores.values, cache[site]), out)
print(json.dumps([peak - before, loaded, model.streaming.block_bytes[0]]))
"""


def measured(tmp_path, name, clean, corrupted, **options):
    """Peak and what is held after the load, over ``import fastlens``; a layer's bytes; results."""
    out = tmp_path / "results.pt"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROBE,
            json.dumps([name, str(out), options, clean, corrupted, SITE]),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return *json.loads(done.stdout.splitlines()[-1]), torch.load(out)


def in_memory(name, clean, corrupted):
    model = HookedTransformer.from_pretrained(name, verbose=False)
    with torch.no_grad():
        scores = sweep(model, clean, corrupted, metric=logit_diff(5, 9), progress=False)
        _, cache = model.run_with_cache(clean, names_filter=SITE, return_type=None)
    return scores.values, cache[SITE]


@pytest.mark.parametrize(
    "sizes, n_pos, share",
    [
        (SMALL, 12, 2),
        pytest.param(TWO_GIGABYTES, 12, 3, marks=pytest.mark.full),
    ],
)
def test_a_sweep_within_part_of_the_weights(tmp_path, sizes, n_pos, share):
    folder = tmp_path / "llama"
    weights = write_llama(folder, sizes)
    limit = weights // share
    clean = list(range(100, 100 + n_pos))
    corrupted = [7, *clean[1:]]
    peak, _, _, found = measured(tmp_path, str(folder), clean, corrupted, max_memory=limit)
    assert peak <= limit
    want = in_memory(str(folder), torch.tensor([clean]), torch.tensor([corrupted]))
    for a, b in zip(want, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("offload", ["disk", "cpu"])
def test_smollm2_packed(tmp_path, offload):
    smollm2()  # skips where the package is not installed
    clean = "When John and Mary went to the shop, John gave a bottle to"
    corrupted = "When John and Mary went to the shop, Mary gave a bottle to"
    limit = 350_000_000
    peak, loaded, block, found = measured(
        tmp_path, "smollm2-135m", clean, corrupted, offload=offload, max_memory=limit
    )
    packed = 98_000_000 if offload == "cpu" else 0
    assert loaded <= packed + 2 * block
    assert peak <= limit
    for a, b in zip(in_memory("smollm2-135m", clean, corrupted), found, strict=True):
        assert torch.equal(a, b)
