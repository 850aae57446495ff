"""The peak of a load, measured in a fresh process: the model and one layer, not two models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlens.weights.native import write_safetensors

LAYERS, D_MODEL, D_MLP, KV, VOCAB = 30, 384, 1024, 192, 2048
LIMIT = 1.15

# Resident memory before and after; nothing but the load lies between. Pages of code files that the
# system dropped before and read again after are no part of it: they are still there at the end.
PROBE = """
import json, sys
from fastlens import HookedTransformer

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

name, options = sys.argv[1], json.loads(sys.argv[2])
before, files = status("VmRSS"), status("RssFile")
model = HookedTransformer.from_pretrained(name, verbose=False, **options)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
paged_in = max(0, status("RssFile") - files)
print(json.dumps([status("VmHWM") - before - paged_in, weights, paged_in]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """About 200 MB of Llama-shaped float32 weights."""
    path = tmp_path_factory.mktemp("llama")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 256,
    }
    (path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    block = {
        "input_layernorm.weight": (D_MODEL,),
        "self_attn.q_proj.weight": (D_MODEL, D_MODEL),
        "self_attn.k_proj.weight": (KV, D_MODEL),
        "self_attn.v_proj.weight": (KV, D_MODEL),
        "self_attn.o_proj.weight": (D_MODEL, D_MODEL),
        "post_attention_layernorm.weight": (D_MODEL,),
        "mlp.gate_proj.weight": (D_MLP, D_MODEL),
        "mlp.up_proj.weight": (D_MLP, D_MODEL),
        "mlp.down_proj.weight": (D_MODEL, D_MLP),
    }
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, D_MODEL),
        "model.norm.weight": torch.randn(D_MODEL),
        "lm_head.weight": torch.randn(VOCAB, D_MODEL),
    }
    for layer in range(LAYERS):
        for name, shape in block.items():
            tensors[f"model.layers.{layer}.{name}"] = torch.randn(shape)
    write_safetensors(path / "model.safetensors", tensors)
    return path


def peak_over_weights(name: str, **options: object) -> float:
    """The smallest of up to three processes: what the system pages in meanwhile only adds."""
    peaks: list[float] = []
    while len(peaks) < 3 and (not peaks or min(peaks) > LIMIT):
        peaks.append(_one_peak(name, **options))
    return min(peaks)


def _one_peak(name: str, **options: object) -> float:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, name, json.dumps(options)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak, weights, paged_in = json.loads(done.stdout.splitlines()[-1])
    assert weights > 90e6
    assert paged_in < 40e6, "the weights' own file stayed mapped"
    return peak / weights


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "options", [{}, {"fold_ln": False, "center_unembed": False, "fold_value_biases": False}]
)
def test_the_peak_of_a_load(folder, options):
    assert peak_over_weights(str(folder), **options) <= LIMIT


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_peak_of_a_half_precision_load(folder):
    """Float32 layers pass through, one at a time, on their way to bfloat16."""
    assert peak_over_weights(str(folder), dtype="bfloat16") <= 1.3
