"""Time the ops and models on one device, each result checked first.

    python -m benchmarks --device cuda            everything, and a JSON file with the results
    python -m benchmarks --device cuda --quick    tiny sizes, three rounds: does all of it run?
    python -m benchmarks --only attention         one group; may be given more than once
    python -m benchmarks --device cpu --quick     the same code without a GPU

Every contender is held against the specification in float64 first, and what is wrong is not timed.
On a GPU the Triton kernels take part whether FASTLENS_TRITON is set or not. No kernel of fastlens
has been run on a GPU by its authors: if something is wrong or slow on yours, please report the JSON
file.
"""

import argparse
import functools
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import cuda_cases, cuda_models, cuda_report, cuda_site_cases, cuda_timing
from benchmarks.cuda_cases import Case, Setting
from benchmarks.cuda_devices import problem_of

RESULTS = Path(__file__).parent / "results"
GROUPS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "attention": cuda_cases.attention_cases,
    "pattern": cuda_cases.pattern_cases,
    "summary": cuda_cases.summary_cases,
    "suffix": cuda_site_cases.suffix_cases,
    "patch": cuda_site_cases.patch_cases,
    "capture": cuda_site_cases.capture_cases,
    "dequantize": cuda_site_cases.dequantize_cases,
    "norm": cuda_site_cases.norm_cases,
    "rotary": cuda_site_cases.rotary_cases,
    "forward": cuda_models.forward_cases,
    "sweep": cuda_models.sweep_cases,
}
# What is launched from many Python calls is timed to its end by the clock, device waited for.
BY_CLOCK = ("forward", "sweep")


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default: %(default)s)")
    found.add_argument("--quick", action="store_true", help="tiny sizes, three rounds")
    found.add_argument("--only", action="append", choices=GROUPS, help="this group; repeatable")
    found.add_argument("--seconds", type=float, default=3.0, help="a case (default: %(default)s)")
    found.add_argument(
        "--json", type=Path, help="where results go (default: benchmarks/results/<device>/)"
    )
    return found


def folder_of(name: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if everything of fastlens was right and ran."""
    arguments = parser().parse_args(argv)
    problem = problem_of(arguments.device)
    if problem is not None:
        print(problem, file=sys.stderr)
        return 1
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # What float32 products are compared with has 24 bits too.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    setting = Setting(device, arguments.quick)
    rounds = {"seconds": arguments.seconds}
    if arguments.quick:
        rounds = {"seconds": 0.0, "min_rounds": 3, "warm_ups": 1}
    about = cuda_report.about(device)
    print(f"{about['name']}, torch {about['torch']}, triton {about['triton']}", flush=True)
    path = arguments.json
    if path is None and not arguments.quick:
        path = RESULTS / folder_of(about["name"]) / "device.json"
    records, broken = [], []
    say = functools.partial(print, flush=True)
    for group in arguments.only or GROUPS:
        timed = functools.partial(cuda_timing.timed_on, device, **rounds)
        if group in BY_CLOCK:
            wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
            timed = functools.partial(cuda_timing.by_clock, synchronize=wait, **rounds)
        try:
            for record in cuda_report.run_all(GROUPS[group](setting), timed, device, say):
                records.append(record)
        except Exception:
            # The other groups' results are worth having.
            traceback.print_exc()
            broken.append(f"{group}: stopped by the error above")
        if path is not None:
            cuda_report.write(path, about, records)
    if path is not None:
        print(f"written: {path}")
    wrong = [*broken, *cuda_report.faults(records)]
    for line in itertools.islice(wrong, 20):
        print(f"FAULT  {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
