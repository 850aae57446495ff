"""nnsight in its own environment and process: one job for each line it is sent.

    python nnsight_worker.py FOLDER

`FOLDER` holds a GPT-2 as `save_pretrained` writes it, and `jobs.json` (see `process.started`).
A trace runs one forward of as many invokes as are stacked by hand elsewhere, a site each; only the
last position's logits are computed, and none of the clean prompt.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nnsight
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.peers.answering import answer, gpt2_and_tokenizer
from benchmarks.peers.loops import difference_of


class Job:
    """One sweep; the clean prompt is run each time."""

    def __init__(self, model: Any, job: Mapping[str, Any]):
        self.model = model
        self.site = job["site"]
        self.stack = job["stack"]
        self.metric = difference_of(*job["answers"])
        self.clean, self.corrupted = torch.tensor(job["clean"]), torch.tensor(job["corrupted"])
        self.sites = [dict(zip(job["by"], index, strict=True)) for index in job["indices"]]

    def place(self, layer: int) -> Any:
        """The module whose input is patched."""
        block = self.model.transformer.h[layer]
        return block if self.site == "resid_pre" else block.attn.c_proj

    def columns(self, site: Mapping[str, int]) -> slice:
        """The part of that input which is patched: everything, or one head."""
        if "head" not in site:
            return slice(None)
        config = self.model.config
        width = config.n_embd // config.n_head
        return slice(site["head"] * width, (site["head"] + 1) * width)

    @torch.no_grad()
    def __call__(self) -> list[float]:
        model, metric, corrupted = self.model, self.metric, self.corrupted
        layers = sorted({site["layer"] for site in self.sites})
        with model.trace(self.clean) as tracer:
            kept = nnsight.save({})
            for layer in layers:
                kept[layer] = self.place(layer).input
            tracer.stop()
        values: list[float] = []
        for start in range(0, len(self.sites), self.stack):
            several = [
                (self.place(site["layer"]), site, site.get("pos", slice(None)), self.columns(site))
                for site in self.sites[start : start + self.stack]
            ]
            with model.trace(logits_to_keep=1) as tracer:
                found = nnsight.save([])
                for place, site, pos, columns in several:
                    with tracer.invoke(corrupted):
                        place.input[:, pos, columns] = kept[site["layer"]][:, pos, columns]
                        found.append(metric(model.lm_head.output))
            values += torch.stack(found).tolist()
        return values


def build(folder: Path, jobs: Mapping[str, Any]) -> dict[str, Job]:
    """The jobs on the model as nnsight wraps it."""
    hf, words = gpt2_and_tokenizer(folder)
    if hasattr(nnsight, "TransformersModel"):
        model = nnsight.TransformersModel(hf, tokenizer=words, task="text-generation")
    else:
        model = nnsight.LanguageModel(hf, tokenizer=words)
    return {name: Job(model, job) for name, job in jobs.items()}


if __name__ == "__main__":
    answer("nnsight", build)
