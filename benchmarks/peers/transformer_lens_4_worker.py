"""TransformerLens 4's loop in its own environment and process: one job for each line it is sent.

    python transformer_lens_4_worker.py FOLDER

`FOLDER` holds a Hugging Face model as `save_pretrained` writes it, and `jobs.json`: name ->
function, prompts and sites. It answers each line, a job's name, with a line of JSON: the values.
"""

import contextlib
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.peers.loops import patched


def bridge(folder: Path) -> Any:
    """The model in the folder as TransformerLens 4 has it, weights as they are."""
    import transformers
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge

    # It insists on one, and the prompts here are token ids.
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "a"),
    )
    words.save_pretrained(folder)
    words = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    hf = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa")
    return TransformerBridge.boot_transformers(
        str(folder), hf_model=hf.eval(), tokenizer=words, device="cpu"
    ).eval()


class Job:
    """One sweep, its clean cache made beforehand."""

    def __init__(self, model: Any, job: dict[str, Any]):
        self.model = model
        self.function = job["function"]
        self.indices = job["indices"]
        self.corrupted = torch.tensor(job["corrupted"])
        with torch.no_grad():
            _, self.cache = model.run_with_cache(torch.tensor(job["clean"]))

    def __call__(self) -> list[float]:
        from transformer_lens import patching

        found = patched(
            patching, self.function, self.model, self.corrupted, self.cache, self.indices
        )
        return found.tolist()


def main(folder: Path) -> None:
    """Answer lines until there are no more."""
    answers = sys.stdout
    # Whatever the libraries print is not an answer.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        description = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))
        torch.set_num_threads(description["threads"])
        model = bridge(folder)
        jobs = {name: Job(model, job) for name, job in description["jobs"].items()}
        about = {"transformer_lens": version("transformer-lens"), "torch": torch.__version__}
        print(json.dumps(about), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(jobs[line.strip()]()), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
