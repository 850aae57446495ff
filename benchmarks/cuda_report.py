"""Running the cases of `python -m benchmarks`: judging, timing, a table, a JSON file."""

import gc
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_cases import Case, Run
from benchmarks.cuda_devices import GPUS, Gpu
from benchmarks.timing import machine

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,driver_version"


def about(device: torch.device) -> dict[str, Any]:
    """The device, versions, and clocks as nvidia-smi gives them."""
    found = machine(str(device))
    for package in ("triton", "gguf"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["compute"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = torch.version.cuda
        found["clocks"] = clocks(device)
    return found


def clocks(device: torch.device, run: Callable[..., Any] = subprocess.run) -> dict[str, str]:
    """MHz, watts and the driver, or nothing where nvidia-smi is not there or fails."""
    if shutil.which("nvidia-smi") is None:
        return {}
    index = device.index if device.index is not None else torch.cuda.current_device()
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", f"--id={index}"]
    said = run(command, capture_output=True, text=True)
    values = [value.strip() for value in said.stdout.split(",")]
    names = CLOCKS.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def gpu_of(name: str) -> Gpu | None:
    """The data sheet of a device's name, as ``NVIDIA H100 80GB HBM3``."""
    for gpu in GPUS:
        model, *rest = gpu.name.split()
        # A PCIe, NVL or 40 GB card has another memory, and so another roofline.
        is_other = re.search(r"PCIe|NVL", name) or ("80GB" in rest and "80GB" not in name)
        if re.search(rf"\b{model}\b", name) and not is_other:
            return gpu
    return None


def result_of(
    case: Case,
    timed: Callable[[Mapping[str, Run]], Mapping[str, Any]],
    gpu: Gpu | None,
) -> dict[str, Any]:
    """One case as a record: who is right, and the seconds of those who are.

    A contender that is wrong, or cannot run here, is not timed; the record says which and why.
    """
    errors, wrong, failed = {}, {}, {}
    try:
        eager, truth = case.eager(), case.truth()
        contenders = case.contenders
    except Exception as problem:
        # Such as a card too small for every score at once. What cannot be judged is not timed.
        failed["the specification"] = _sentence(problem)
        eager = truth = None
        contenders = {}
    for name, run in contenders.items():
        try:
            error, allowed = case.judged(run(), eager, truth)
            # A second time, since what one run leaves behind may spoil the next.
            again, _ = case.judged(run(), eager, truth)
        except Exception as problem:
            failed[name] = _sentence(problem)
            continue
        errors[name] = max(error, again)
        if not max(error, again) <= allowed:
            wrong[name] = f"error {max(error, again):.1e}, allowed {allowed:.1e}"
    del eager, truth
    right = {name: case.contenders[name] for name in errors if name not in wrong}
    timings = timed(right) if right else {}
    ideal = case.work.roofline(gpu) if case.work is not None and gpu is not None else None
    return {
        "op": case.op,
        "title": case.title,
        "errors": errors,
        "wrong": wrong,
        "failed": failed,
        "skipped": case.skipped,
        "ideal_seconds": ideal,
        "bound": None if ideal is None or case.work is None else case.work.bound(gpu),
        "seconds": {name: one.record() for name, one in timings.items()},
    }


def _sentence(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:200]


def described(record: Mapping[str, Any], is_host: bool) -> str:
    """One case as lines of text, the fastest first.

    Args:
        is_host: The processor computes, so that launching is not told apart.
    """
    ideal, lines = record["ideal_seconds"], [f"{record['op']}: {record['title']}"]
    if ideal is not None:
        lines[0] += f" (roofline {ideal * 1e6:.1f} us, {record['bound']})"
    ordered = sorted(record["seconds"].items(), key=lambda pair: pair[1]["median"])
    for name, timing in ordered:
        text = f"  {timing['median'] * 1e6:12.1f} us  {name}"
        ratio = timing["median"] / ordered[0][1]["median"]
        text += f"  {ratio:.2f} x" if ratio > 1 else ""
        text += "" if ideal is None else f"  {ideal / timing['median']:.0%} of the roofline"
        # The host took about as long to launch as the device to finish: the device waited.
        if not is_host and timing["host"] > 0.9 * timing["median"]:
            text += "  (bound by launching)"
        lines.append(text)
    for why, word in (("wrong", "WRONG, not timed"), ("failed", "did not run")):
        lines += [f"  {word}: {name}: {reason}" for name, reason in record[why].items()]
    return "\n".join(lines)


def run_all(
    cases: Iterable[Case],
    timed: Callable[[Mapping[str, Run]], Mapping[str, Any]],
    device: torch.device,
    said: Callable[[str], None] = print,
) -> Iterator[dict[str, Any]]:
    """Records of the cases in turn, each freed before the next is made."""
    gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    told: dict[str, str] = {}
    with torch.no_grad():
        for case in cases:
            record = result_of(case, timed, gpu)
            said(described(record, device.type != "cuda"))
            # Each reason once, not at every size.
            for name, reason in record["skipped"].items():
                if told.get(name) != reason:
                    said(f"  left out: {name}: {reason}")
            told |= record["skipped"]
            yield record
            del case
            if device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()


def faults(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which of fastlens' own were wrong or did not run: these fail the whole run."""
    return [
        f"{record['op']}, {record['title']}: {name}: {reason}"
        for record in records
        for name, reason in {**record["wrong"], **record["failed"]}.items()
        if name.startswith("fastlens")
    ]


def write(path: Path, about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Machine and results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": dict(about), "rows": list(records)}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
