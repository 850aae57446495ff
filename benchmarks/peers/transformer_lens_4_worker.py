"""TransformerLens 4's loop in its own environment and process: one job for each line it is sent.

    python transformer_lens_4_worker.py FOLDER

`FOLDER` holds a GPT-2 as `save_pretrained` writes it, and `jobs.json` (see `process.started`).
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.peers.answering import answer, gpt2_and_tokenizer
from benchmarks.peers.loops import difference_of, patched


class Job:
    """One sweep, its clean cache made beforehand."""

    def __init__(self, model: Any, job: Mapping[str, Any]):
        self.model = model
        self.function = job["function"]
        self.indices = job["indices"] if job["drawn"] else None
        self.metric = difference_of(*job["answers"])
        self.corrupted = torch.tensor(job["corrupted"])
        with torch.no_grad():
            _, self.cache = model.run_with_cache(torch.tensor(job["clean"]))

    def __call__(self) -> list[float]:
        from transformer_lens import patching

        found = patched(
            *(patching, self.function, self.model, self.corrupted, self.cache, self.metric),
            indices=self.indices,
        )
        return found.tolist()


def build(folder: Path, jobs: Mapping[str, Any]) -> dict[str, Job]:
    """The jobs on a bridge of the model, weights as they are."""
    from transformer_lens.model_bridge import TransformerBridge

    hf, words = gpt2_and_tokenizer(folder)
    model = TransformerBridge.boot_transformers(
        str(folder), hf_model=hf, tokenizer=words, device="cpu"
    ).eval()
    return {name: Job(model, job) for name, job in jobs.items()}


if __name__ == "__main__":
    answer("transformer-lens", build)
