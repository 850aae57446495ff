"""Write the tables of docs/gpu.md: rooflines by formula, registers and shared memory as compiled.

    python tools/gpu_numbers.py              rewrite every table (needs triton; nvcc for csrc/)
    python tools/gpu_numbers.py --formulas   only what needs no compiler
    python tools/gpu_numbers.py --print      print what the page would hold, and write nothing

Nothing is run on a GPU: kernels are compiled for one, and their launches are caught on the way.
"""

import argparse
import functools
import importlib
import inspect
import itertools
import math
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import cuda_work
from benchmarks.cuda_devices import GPUS, SMS, Occupancy, occupancy
from benchmarks.cuda_work import LONG_SWEEP, Z_SWEEP, Branches, Work
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.reference_packed import FORMATS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
CSRC = ROOT / "csrc"
TABLES = ("gpus", "roofline", "versions", "compiled", "shipped")
COMPILED = ("versions", "compiled", "shipped")
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Cuda:
    """A kernel of csrc/ as `c++filt` writes its name, its block and its grid."""

    name: str
    warps: int
    blocks: int


@dataclass(frozen=True)
class Case:
    """One op at sizes of a model.

    Attributes:
        call: Calls the Triton launcher, which may launch more than once.
        cuda: The kernel in csrc/, if there is one.
    """

    op: str
    title: str
    work: Work
    call: Callable[[], Any] | None
    cuda: Cuda | None = None


def _qkv(
    rows: Sequence[int], heads: int, kv_heads: int, d_head: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Not filled: nobody reads them. ``rows``: queries and keys."""
    n_queries, n_keys = rows
    q = torch.empty(1, n_queries, heads, d_head, dtype=dtype)
    return [q, *(torch.empty(1, n_keys, kv_heads, d_head, dtype=dtype) for _ in range(2))]


def _attention(
    title: str,
    n_queries: int,
    n_keys: int,
    heads: int,
    kv_heads: int,
    d_head: int,
    dtype: torch.dtype = BF16,
    **rule: Any,
) -> Case:
    """With its log-sum-exp, which the kernel always writes."""

    def call() -> Any:
        from fastlens.kernels.triton_attention_lse import attention_lse

        q, k, v = _qkv((n_queries, n_keys), heads, kv_heads, d_head, dtype)
        return attention_lse(q, k, v, AttentionRule(d_head**0.5, **rule), n_keys - n_queries)

    sizes = (n_queries, n_keys, heads, kv_heads, d_head, dtype.itemsize)
    capped = {"window": rule.get("window"), "is_capped": "soft_cap" in rule}
    work = cuda_work.attention(1, *sizes, **capped)
    return Case("attention", f"{title}, {_name(dtype)}", work, call)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _pattern_rows(title: str, sites: torch.Tensor, n_keys: int, heads: int, d_head: int) -> Case:
    def call() -> Any:
        from fastlens.kernels.triton_attention_pattern_rows import attention_pattern_rows

        q, k, _ = _qkv((n_keys, n_keys), heads, heads, d_head, BF16)
        lse = torch.empty(1, heads, n_keys)
        return attention_pattern_rows(q, k, AttentionRule(d_head**0.5), sites, lse=lse)

    heads_read = len(torch.unique(sites[:, 1]))
    work = cuda_work.pattern_rows(len(sites), n_keys, d_head, 2, heads_read)
    return Case("attention_pattern_rows", f"{title}, bf16", work, call)


def _rows_of(head: int, n_rows: int) -> torch.Tensor:
    rows = torch.arange(n_rows)
    return torch.stack([torch.zeros_like(rows), torch.full_like(rows, head), rows], 1)


def _last_rows(n_heads: int, row: int) -> torch.Tensor:
    heads = torch.arange(n_heads)
    return torch.stack([torch.zeros_like(heads), heads, torch.full_like(heads, row)], 1)


def _summary(title: str, n_pos: int, heads: int, d_head: int) -> Case:
    """Entropy and the mass on the previous token, the log-sum-exp being known."""

    def call() -> Any:
        from fastlens.kernels.triton_attention_summary import attention_summary

        q, k, _ = _qkv((n_pos, n_pos), heads, heads, d_head, BF16)
        rule, lse = AttentionRule(d_head**0.5), torch.empty(1, heads, n_pos)
        return attention_summary(q, k, rule, offsets=(1,), lse=lse)

    work = cuda_work.attention_summary(1, n_pos, heads, heads, d_head, 2, 1)
    return Case("attention_summary", f"{title}, bf16", work, call)


def _suffix(
    title: str, branches: Sequence[Branches], heads: int, kv_heads: int, d_head: int
) -> Case:
    """All branches' own rows behind the base run's, packed one after another."""

    def call() -> Any:
        from fastlens.kernels import triton_suffix_attention

        table, spans, n_rows = cuda_work.packed(branches)
        q = torch.empty(n_rows, heads, d_head, dtype=BF16)
        k = torch.empty(n_rows, kv_heads, d_head, dtype=BF16)
        rule = AttentionRule(d_head**0.5)
        return triton_suffix_attention.suffix_attention(q, k, k, table, spans, rule, None)

    work = cuda_work.suffix_attention(branches, heads, kv_heads, d_head, 2)
    return Case("suffix_attention", f"{title}, bf16", work, call)


def _norm(title: str, n_rows: int, d: int, is_centred: bool) -> Case:
    def call() -> Any:
        from fastlens.kernels import triton_layer_norm as launcher

        x, w = torch.empty(n_rows, d, dtype=BF16), torch.empty(d, dtype=BF16)
        if is_centred:
            return launcher.layer_norm_with_scale(x, w, w, 1e-5)
        return launcher.rms_norm_with_scale(x, w, 1e-5)

    op = "layer_norm" if is_centred else "rms_norm"
    return Case(op, f"{title}, bf16", cuda_work.norm(n_rows, d, 2, is_centred), call)


def _rotary(title: str, n_pos: int, heads: int, d_head: int) -> Case:
    def call() -> Any:
        from fastlens.kernels import triton_rotary

        x = torch.empty(1, n_pos, heads, d_head, dtype=BF16)
        table = torch.empty(1, n_pos, d_head, dtype=BF16)
        return triton_rotary.rotary(x, table, table, False)

    return Case("rotary", f"{title}, bf16", cuda_work.rotary(n_pos, heads, d_head, d_head, 2), call)


def cases() -> list[Case]:
    """Every kernel at the sizes that matter."""
    return [
        _attention("GPT-2 small, 1 x 1024", 1024, 1024, 12, 12, 64),
        _attention("GPT-2 small, 1 x 1024", 1024, 1024, 12, 12, 64, torch.float32),
        _attention("Llama-7B, 1 x 4096", 4096, 4096, 32, 32, 128),
        _attention("Llama-3-8B (8 KV heads), 1 x 4096", 4096, 4096, 32, 8, 128),
        _attention(
            *("Gemma-2-2B (cap, window 4096), 1 x 8192", 8192, 8192, 8, 4, 256),
            window=4096,
            soft_cap=50.0,
        ),
        _attention("Llama-7B, 1 new token after 4095", 1, 4096, 32, 32, 128),
        _pattern_rows("GPT-2 small, 1 head, 1 x 1024", _rows_of(5, 1024), 1024, 12, 64),
        _pattern_rows("Llama-7B, 1 head, 1 x 4096", _rows_of(5, 4096), 4096, 32, 128),
        _pattern_rows("Llama-7B, last row of every head", _last_rows(32, 4095), 4096, 32, 128),
        _summary("GPT-2 small, 1 x 1024", 1024, 12, 64),
        _summary("Llama-7B, 1 x 4096", 4096, 32, 128),
        _suffix("sweep of 2,160 `z` sites, GPT-2 small, last layer", Z_SWEEP, 12, 12, 64),
        _suffix("16 runs of 64 rows behind 960, Llama-7B", LONG_SWEEP, 32, 32, 128),
        _norm("GPT-2 small, 1 x 1024", 1024, 768, True),
        _norm("Llama-7B, 1 x 4096", 4096, 4096, False),
        _rotary("Llama-7B, 1 x 4096", 4096, 32, 128),
        *_site_cases(),
    ]


def _patch(title: str, shape: Sequence[int], n_sites: int, width: int) -> Case:
    """A whole row of numbers replaced at every site, in place."""
    length = math.prod(shape[width:])

    def call() -> Any:
        from fastlens.kernels.triton_patch_sites_in_place import patch_sites_

        x = torch.empty(*shape, dtype=BF16)
        values = torch.empty(n_sites, *shape[width:], dtype=BF16)
        return patch_sites_(x, _sites(shape[:width], n_sites), values, "replace", True)

    # 16 bytes a thread.
    blocks = math.ceil(n_sites / 4) * math.ceil(length / (32 * 8 * 4))
    work = cuda_work.patch_sites(n_sites, length, 2)
    return Case("patch_sites_", title, work, call, Cuda("patch_sites<__nv_bfloat16, 8>", 4, blocks))


def _sites(lengths: Sequence[int], n: int) -> torch.Tensor:
    """The first ``n`` places along these axes."""
    return torch.stack(torch.unravel_index(torch.arange(n), tuple(lengths)), 1)


def _capture(title: str, shape: Sequence[int], n_sites: int) -> Case:
    def call() -> Any:
        from fastlens.kernels import triton_capture

        x = torch.empty(*shape, dtype=torch.float32)
        return triton_capture.capture(x, _sites(shape[:2], n_sites), BF16)

    blocks = math.ceil(n_sites / 4) * math.ceil(shape[2] / 128)
    work = cuda_work.capture(n_sites, shape[2], 4, 2)
    return Case("capture", title, work, call, Cuda("gather<float, __nv_bfloat16>", 4, blocks))


def _capture_int8(title: str, shape: Sequence[int]) -> Case:
    """Everything: a table of no width."""

    def call() -> Any:
        from fastlens.kernels import triton_capture_int8

        x = torch.empty(*shape, dtype=BF16)
        return triton_capture_int8.capture_int8(x, torch.zeros(1, 0, dtype=torch.int64))

    rows = math.prod(shape[:-1])
    work = cuda_work.capture_int8(rows, shape[-1], 2)
    cuda = Cuda("gather_int8<__nv_bfloat16>", 4, min(rows, 65535))
    return Case("capture_int8", title, work, call, cuda)


# Packed format -> its kernel in csrc/, by dequantize.cu's codes.
UNPACKING = {
    "int8": "unpack_rows<__nv_bfloat16>",
    "Q4_0": "unpack_blocks<__nv_bfloat16, 1>",
    "Q4_1": "unpack_blocks<__nv_bfloat16, 2>",
    "Q8_0": "unpack_blocks<__nv_bfloat16, 3>",
}


def _dequantize(packed_as: str, rows: int, width: int) -> Case:
    block, n_bytes = FORMATS[packed_as]
    is_int8 = packed_as == "int8"

    def call() -> Any:
        from fastlens.kernels import triton_dequantize

        kind = torch.int8 if is_int8 else torch.uint8
        row = torch.empty(rows, width // block * n_bytes, dtype=kind)
        scale = torch.empty(rows) if is_int8 else None
        return triton_dequantize.dequantize(row, scale, packed_as, BF16)

    n = rows * width
    cuda = Cuda(UNPACKING[packed_as], 8, math.ceil(n / 256))
    work = cuda_work.dequantize(n, block, n_bytes, 2, rows if is_int8 else 0)
    return Case("dequantize", f"{packed_as} to bf16, {rows} x {width}", work, call, cuda)


def _site_cases() -> list[Case]:
    return [
        _patch("720 of 2,175 packed rows x 12 heads x 64, bf16", (2175, 12, 64), 720, 2),
        _patch("192 rows x 4096, bf16", (4096, 4096), 192, 1),
        _capture("8 x 1024 x 768, 512 rows, fp32 to bf16", (8, 1024, 768), 512),
        _capture("1 x 4096 x 4096, 4096 rows, fp32 to bf16", (1, 4096, 4096), 4096),
        _capture_int8("1 x 1024 x 768, bf16", (1, 1024, 768)),
        _capture_int8("1 x 4096 x 4096, bf16", (1, 4096, 4096)),
        *(_dequantize(packed_as, 11008, 4096) for packed_as in ("int8", "Q8_0", "Q4_0", "Q4_1")),
    ]


# -- compiled --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a multiprocessor."""

    registers: int
    shared_bytes: int
    warps: int
    tensor_columns: int = 0

    def on(self, target: str) -> Occupancy:
        """Its blocks on one multiprocessor of that architecture."""
        given = (self.registers, self.warps, self.shared_bytes, self.tensor_columns)
        return occupancy(SMS[target], *given)


def _by_triton(launch: Any, target: str) -> Compiled:
    from tests.gpu.ahead_of_time import TARGETS, compile_for, resources

    compiled = compile_for(launch, TARGETS[target])
    needs, about = resources(compiled), compiled.metadata
    columns = getattr(about, "tmem_size", None) or 0
    return Compiled(needs.registers, needs.shared_bytes, about.num_warps, columns)


@functools.cache
def _by_nvcc(target: str) -> dict[str, tuple[int, int]]:
    """Registers and shared bytes of every kernel of csrc/, by its demangled name."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(CSRC.glob("*.cu")):
            command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", f"-arch={target}"]
            command += [str(source), "-o", str(Path(folder) / "out.cubin")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            plain = subprocess.run(["c++filt"], input=said, capture_output=True, text=True).stdout
            for part in plain.split("Compiling entry function ")[1:]:
                usage = re.search(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?", part)
                assert usage is not None, part
                found[part.split("'")[1]] = (int(usage[1]), int(usage[2] or 0))
    return found


def _of_csrc(cuda: Cuda, target: str) -> Compiled:
    """Of the one kernel that has that name."""
    wanted = cuda.name.replace(" ", "")
    named = {name.replace(" ", ""): value for name, value in _by_nvcc(target).items()}
    (found,) = {value for name, value in named.items() if f"::{wanted}(" in _readable(name)}
    return Compiled(found[0], found[1], cuda.warps)


def _readable(name: str) -> str:
    """Without the casts that c++filt puts before template numbers, ``(int)8`` or ``8``."""
    return re.sub(r"\((?:int|unsignedint|bool)\)", "", name)


def _launches(call: Callable[[], Any]) -> list[Any]:
    from tests.gpu.launches import launches_of

    return launches_of(call)


def _shipped() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every configuration that tests/gpu/shipped*.py asks a launcher for."""
    import tests.gpu

    for info in pkgutil.iter_modules(tests.gpu.__path__):
        if not info.name.startswith("shipped"):
            continue
        module = importlib.import_module(f"tests.gpu.{info.name}")
        for name, made in vars(module).items():
            is_own = getattr(made, "__module__", None) == module.__name__
            if is_own and inspect.isgeneratorfunction(made) and not name.startswith("_"):
                yield from made()
        if hasattr(module, "attention"):
            crossed = itertools.product(module.D_HEADS, module.DTYPES, module.RULES)
            for d_head, dtype, rule in crossed:
                yield f"attention {d_head} {dtype} {rule}", module.attention(d_head, dtype, rule)


# -- tables ----------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, numbers to the right: the first two columns are words."""
    rules = ["---"] * min(2, len(head)) + ["---:"] * (len(head) - 2)
    lines = [head, rules, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gpus() -> str:
    """What the rooflines assume."""
    rows = [
        [
            gpu.name,
            gpu.target,
            str(gpu.sms),
            f"{gpu.matrix / 1e12:g} TFLOP/s",
            f"{gpu.plain / 1e12:g} TFLOP/s",
            f"{gpu.bandwidth / 1e12:g} TB/s",
            f"{gpu.exponentials / 1e12:.2f} T/s",
            f"{gpu.matrix / gpu.bandwidth:.0f}",
        ]
        for gpu in GPUS
    ]
    head = "GPU, architecture, SMs, 16-bit tensor, fp32 plain, memory, exp2, ridge (FLOP/byte)"
    return table(head.split(", "), rows)


def quantity(value: float, unit: str) -> str:
    """Three digits and a prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def microseconds(seconds: float) -> str:
    """Three digits."""
    us = seconds * 1e6
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"


def roofline() -> str:
    """Work of every case, and the least time on each GPU with what bounds it."""
    rows = []
    for case in cases():
        work = case.work
        times = [f"{microseconds(work.roofline(gpu))} ({work.bound(gpu)})" for gpu in GPUS]
        flops = quantity(work.flops, "") if work.flops else "0"
        intensity = f"{work.intensity:,.0f}" if work.intensity >= 100 else f"{work.intensity:.3g}"
        numbers = [flops, quantity(work.n_bytes, "B"), intensity]
        rows.append([f"`{case.op}`", case.title, *numbers, *times])
    head = ["op", "sizes", "FLOPs", "bytes", "FLOP/byte", *(f"{gpu.name}, us" for gpu in GPUS)]
    return table(head, rows)


def versions() -> str:
    """Of the compilers, which decide about registers."""
    import triton

    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    nvcc = re.search(r"V([\d.]+)", said)
    return f"triton {triton.__version__}, nvcc {nvcc[1] if nvcc else 'not found'}"


def _cell(compiled: Compiled, target: str) -> str:
    """Registers, shared memory, resident blocks and the share of warps they are."""
    found = compiled.on(target)
    shared = f"{compiled.shared_bytes / 1024:.3g} K" if compiled.shared_bytes else "0"
    return f"{compiled.registers} / {shared} / {found.blocks} ({found.share:.0%}, {found.limit})"


def _waves(blocks: int, compiled: Compiled, gpu: Any) -> str:
    """Grid over the blocks that the whole GPU holds at once."""
    waves = blocks / (gpu.sms * compiled.on(gpu.target).blocks)
    return f"{waves:.2f}" if waves < 10 else f"{waves:.0f}"


def compiled() -> str:
    """Registers, shared memory and occupancy of every case's kernels."""
    rows = []
    a100, h100 = GPUS[0], GPUS[1]
    for case in cases():
        kernels: list[tuple[str, int, dict[str, Compiled]]] = []
        for launch in _launches(case.call) if case.call else ():
            found = {target: _by_triton(launch, target) for target in SMS}
            name = f"Triton `{launch.kernel.fn.__name__}`"
            kernels.append((name, math.prod(launch.grid), found))
        if case.cuda is not None:
            found = {target: _of_csrc(case.cuda, target) for target in SMS}
            kernels.append((f"csrc `{case.cuda.name}`", case.cuda.blocks, found))
        for name, blocks, found in kernels:
            cells = [_cell(found[target], target) for target in SMS]
            waves = [_waves(blocks, found[gpu.target], gpu) for gpu in (a100, h100)]
            warps = str(found["sm_80"].warps)
            rows.append([name, f"`{case.op}`: {case.title}", str(blocks), *waves, warps, *cells])
    head = ["kernel", "case", "blocks", "waves A100", "waves H100", "warps", *SMS]
    return table(head, rows)


def _range(values: Sequence[float], form: str = "{:g}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}-{high}"


def shipped() -> str:
    """Each Triton kernel over every configuration that the launchers can ask for."""
    by_kernel: dict[str, list[Any]] = {}
    for _, call in _shipped():
        for launch in _launches(call):
            by_kernel.setdefault(launch.kernel.fn.__name__, []).append(launch)
    rows = []
    for name, launches in sorted(by_kernel.items()):
        cells = []
        for target in SMS:
            several = [_by_triton(launch, target) for launch in launches]
            shares = [one.on(target).share for one in several]
            registers = _range([one.registers for one in several])
            shared = _range([one.shared_bytes / 1024 for one in several], "{:.3g}")
            cells.append(f"{registers} / {shared} K / {_range(shares, '{:.0%}')}")
        rows.append([f"`{name}`", str(len(launches)), *cells])
    return table(["kernel", "configurations", *SMS], rows)


def marks(name: str) -> tuple[str, str]:
    """Between which lines a table stands."""
    return f"<!-- tools/gpu_numbers.py: {name} -->", f"<!-- tools/gpu_numbers.py: end of {name} -->"


def written(text: str, name: str) -> str:
    """What the page has between the marks."""
    begin, end = marks(name)
    _, found, rest = text.partition(f"{begin}\n")
    inside, closed, _ = rest.partition(f"\n{end}")
    if not found or not closed:
        raise SystemExit(f"the page lacks {begin} or {end}")
    return inside.strip("\n")


def with_table(text: str, name: str) -> str:
    """The page with one table made anew."""
    begin, end = marks(name)
    return text.replace(
        text[text.index(begin) : text.index(end)], f"{begin}\n\n{globals()[name]()}\n\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formulas", action="store_true", help="only what needs no compiler")
    parser.add_argument("--print", action="store_true", help="print, and write nothing")
    arguments = parser.parse_args(argv)
    names = [name for name in TABLES if not arguments.formulas or name not in COMPILED]
    if not arguments.formulas and shutil.which("nvcc") is None:
        raise SystemExit("nvcc is not installed: give --formulas, or install the CUDA toolkit.")
    text = PAGE.read_text(encoding="utf-8")
    for name in names:
        text = with_table(text, name)
        if arguments.print:
            print(f"{name}\n{written(text, name)}\n")
    if not arguments.print:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
