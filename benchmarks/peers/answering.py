"""The part of a worker process that is the same for every library: one job for each line.

Imports torch only, since it runs in environments without fastlens.
"""

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], list[float]]


def answer(package: str, build: Callable[[Path, Mapping[str, Any]], Mapping[str, Run]]) -> None:
    """Answer lines, each a job's name, with lines of JSON, each the values, until none is left.

    The first line that it writes says which versions it runs.

    Args:
        package: The library, as its distribution is called.
        build: (folder of the model, descriptions of the jobs) -> the jobs. The folder is the
            command line's argument, and holds `jobs.json` as well.
    """
    folder, answers = Path(sys.argv[1]), sys.stdout
    # Whatever the libraries print is not an answer.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        description = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))
        torch.set_num_threads(description["threads"])
        jobs = build(folder, description["jobs"])
        about = {"package": f"{package} {version(package)}", "torch": str(torch.__version__)}
        print(json.dumps(about), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(jobs[line.strip()]()), file=answers, flush=True)


def gpt2_and_tokenizer(folder: Path) -> tuple[Any, Any]:
    """The model in the folder, and a tokenizer of one word: both libraries insist on having one.

    Prompts are token ids, so it is never asked.
    """
    import transformers
    from tokenizers import Tokenizer, models

    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "a"),
    )
    words.save_pretrained(folder)
    words = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    hf = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa")
    return hf.eval(), words
