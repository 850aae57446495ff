"""The ops without an attention matrix that `python -m benchmarks` times, and suffix attention."""

import importlib.util
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cuda_work
from benchmarks.cuda_cases import BF16, EAGER, FP32, NAMES, SDPA, Case, Setting, of_fastlens
from benchmarks.cuda_work import LONG_SWEEP, Z_SWEEP, Branches
from fastlens.kernels import reference
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.reference_packed import FORMATS
from fastlens.kernels.spans import Span

INDEXING, LOOP = "torch indexing", "a loop over sites"


def _drawn(setting: Setting, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(setting.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=setting.device).to(dtype)


# -- suffix attention ------------------------------------------------------------------------------

SWEEPS = (
    ("2,160 `z` sites, GPT-2 small, last layer", Z_SWEEP, 12, 12, 64),
    ("16 runs of 64 rows behind 960, Llama-7B", LONG_SWEEP, 32, 32, 128),
    ("16 runs of 64 rows behind 960, Llama-3-8B", LONG_SWEEP, 32, 8, 128),
)
QUICK_SWEEPS = (
    ("tiny, ragged", [Branches(3, 2, 7), Branches(2, 5, 7)], 4, 2, 16),
    ("tiny, a long prefix", [Branches(2, 70, 75)], 2, 2, 16),
)


def suffix_cases(setting: Setting) -> Iterator[Case]:
    """One layer of a sweep: every run's own rows on the keys they share and on their own."""
    for title, branches, *sizes in QUICK_SWEEPS if setting.is_quick else SWEEPS:
        for dtype in (FP32, BF16):
            yield _suffix(title, branches, sizes, dtype, setting)


def _suffix(
    title: str,
    branches: Sequence[Branches],
    sizes: Sequence[int],
    dtype: torch.dtype,
    setting: Setting,
) -> Case:
    from fastlens.ops.suffix_attention import suffix_attention

    heads, kv_heads, d_head = sizes
    table, spans, n_rows = cuda_work.packed(branches)
    table = table.to(setting.device)
    spans = [span._replace(branches=span.branches.to(setting.device)) for span in spans]
    q = _drawn(setting, dtype, n_rows, heads, d_head)
    k, v = _drawn(setting, dtype, 2, n_rows, kv_heads, d_head, seed=1)
    rule = AttentionRule(d_head**0.5)
    given = (table, spans, rule, None)

    def gathered() -> Tensor:
        """What one would write by hand: every run's keys gathered, then SDPA with a mask."""
        return torch.cat([_one_span(q, k, v, table, span, rule) for span in spans])

    def eager() -> Tensor:
        return reference.suffix_attention(q, k, v, *given)

    ops = ["suffix_attention", "attention", "attention_lse"]
    ours, skipped = of_fastlens(ops, setting, dtype, lambda: suffix_attention(q, k, v, *given))
    return Case(
        op="suffix_attention",
        title=f"{title}, {NAMES[dtype]}",
        truth=lambda: reference.suffix_attention(q.double(), k.double(), v.double(), *given),
        eager=eager,
        # The specification goes row by row: nobody would run that.
        contenders={**ours, f"gather, then {SDPA}": gathered},
        skipped=skipped,
        work=cuda_work.suffix_attention(branches, heads, kv_heads, d_head, dtype.itemsize),
    )


def _one_span(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, span: Span, rule: AttentionRule
) -> Tensor:
    rows = table[span.branches, : span.stop]
    at = torch.arange(span.start, span.stop, device=q.device)
    mask = torch.arange(span.stop, device=q.device)[None] <= at[:, None]
    turned = (x.transpose(1, 2) for x in (q[rows[:, span.start :]], k[rows], v[rows]))
    grouped = q.shape[1] != k.shape[1]
    scale = 1.0 / rule.scale
    out = F.scaled_dot_product_attention(*turned, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


# -- tables of sites -------------------------------------------------------------------------------

# Activation, sites, indices a site.
PATCHED = (((2175, 12, 64), 720, 2), ((64, 1024, 768), 64, 2), ((16, 1024, 4096), 512, 2))
QUICK_PATCHED = (((5, 7, 9), 11, 2),)
CAPTURED = (((8, 1024, 768), 512), ((1, 4096, 4096), 4096))
QUICK_CAPTURED = (((3, 7, 9), 10),)


def table_of(lengths: Sequence[int], n: int) -> Tensor:
    """``n`` places along these axes, in a fixed disorder."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randperm(math.prod(lengths), generator=generator)[:n]
    return torch.stack(torch.unravel_index(flat, tuple(lengths)), 1)


def patch_cases(setting: Setting) -> Iterator[Case]:
    """Replace and add, as a copy and in place."""
    for shape, n_sites, width in QUICK_PATCHED if setting.is_quick else PATCHED:
        for mode in ("replace", "add"):
            for is_in_place in (False, True):
                yield _patch(shape, n_sites, width, mode, is_in_place, setting)


def _patch(
    shape: Sequence[int], n: int, width: int, mode: str, is_in_place: bool, setting: Setting
) -> Case:
    from fastlens.ops.patch_sites import patch_sites, patch_sites_

    x, values = _drawn(setting, BF16, *shape), _drawn(setting, BF16, n, *shape[width:], seed=1)
    table = table_of(shape[:width], n)
    sites = table.tolist()
    # Checked and moved once, as the wave does.
    moved = table.to(setting.device)
    index = tuple(moved.unbind(1))
    into = x.clone()

    def ours() -> Tensor:
        if not is_in_place:
            return patch_sites(x, table, values, mode)
        patch_sites_(begun(), moved, values, mode, True)
        return into

    def begun() -> Tensor:
        # Adding again and again would drift: "add" starts from the sites as they were.
        if is_in_place and mode == "add":
            into[index] = x[index]
        return into if is_in_place else x.clone()

    def indexed() -> Tensor:
        out = begun()
        out[index] = values if mode == "replace" else out[index] + values
        return out

    def looped() -> Tensor:
        out = begun()
        for site, value in zip(sites, values, strict=True):
            out[tuple(site)] = value if mode == "replace" else out[tuple(site)] + value
        return out

    op = "patch_sites_" if is_in_place else "patch_sites"
    contenders, skipped = of_fastlens([op], setting, BF16, ours)
    length = math.prod(shape[width:])
    copied = 0 if is_in_place else math.prod(shape)
    return Case(
        op=op,
        title=f"{mode} {n} sites of {' x '.join(map(str, shape))}, bf16",
        truth=lambda: reference.patch_sites(x, table, values, mode),
        eager=lambda: reference.patch_sites(x, table, values, mode),
        contenders={**contenders, INDEXING: indexed, LOOP: looped},
        skipped=skipped,
        work=cuda_work.patch_sites(n, length, 2, copied),
        is_exact=True,
    )


def capture_cases(setting: Setting) -> Iterator[Case]:
    """Some rows, cast; and the same in 8 bits."""
    for shape, n_rows in QUICK_CAPTURED if setting.is_quick else CAPTURED:
        for dtype in (FP32, BF16):
            yield _capture(shape, n_rows, dtype, setting)
            yield _capture_int8(shape, n_rows, dtype, setting)


def _capture(shape: Sequence[int], n: int, dtype: torch.dtype, setting: Setting) -> Case:
    from fastlens.ops.capture import capture

    x, table = _drawn(setting, dtype, *shape), table_of(shape[:2], n)
    sites = table.tolist()
    index = tuple(table.to(setting.device).unbind(1))
    ours, skipped = of_fastlens(["capture"], setting, dtype, lambda: capture(x, table, BF16))
    return Case(
        op="capture",
        title=f"{n} rows of {' x '.join(map(str, shape))}, {NAMES[dtype]} to bf16",
        truth=lambda: reference.capture(x, table, BF16),
        eager=lambda: reference.capture(x, table, BF16),
        contenders={
            **ours,
            INDEXING: lambda: x[index].to(BF16),
            LOOP: lambda: torch.stack([x[i, j] for i, j in sites]).to(BF16),
        },
        skipped=skipped,
        work=cuda_work.capture(n, shape[2], dtype.itemsize, 2),
        is_exact=True,
    )


def _capture_int8(shape: Sequence[int], n: int, dtype: torch.dtype, setting: Setting) -> Case:
    from fastlens.ops.capture import capture_int8

    x, table = _drawn(setting, dtype, *shape), table_of(shape[:2], n)
    index = tuple(table.to(setting.device).unbind(1))

    def by_hand() -> tuple[Tensor, Tensor]:
        rows = x[index].float()
        scale = rows.abs().amax(-1) / 127
        return (rows / scale[:, None]).round().to(torch.int8), scale

    ours, skipped = of_fastlens(["capture_int8"], setting, dtype, lambda: capture_int8(x, table))
    return Case(
        op="capture_int8",
        title=f"{n} rows of {' x '.join(map(str, shape))}, {NAMES[dtype]}",
        truth=lambda: reference.capture_int8(x, table),
        eager=lambda: reference.capture_int8(x, table),
        contenders={**ours, "torch, op by op": by_hand},
        skipped=skipped,
        work=cuda_work.capture_int8(n, shape[2], dtype.itemsize),
        is_exact=True,
    )


# -- packed weights --------------------------------------------------------------------------------


def dequantize_cases(setting: Setting) -> Iterator[Case]:
    """A Llama-7B MLP matrix in each format."""
    rows, width = (3, 64) if setting.is_quick else (11008, 4096)
    for packed_as in FORMATS:
        yield _dequantize(packed_as, rows, width, setting)


def random_blocks(packed_as: str, rows: int, width: int) -> tuple[Tensor, Tensor | None]:
    """Random weights of that format with finite scales, and the scales of int8, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    block, n_bytes = FORMATS[packed_as]
    if packed_as == "int8":
        values = torch.randint(-127, 128, (rows, width), generator=generator, dtype=torch.int8)
        return values, torch.rand(rows, generator=generator) + 0.01
    shape = (rows, width // block, n_bytes)
    packed = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    # Bytes 0 to 1, and 2 to 3 of Q4_1, are float16: 1 to 2, so that nothing overflows.
    for first in (0, 2) if packed_as == "Q4_1" else (0,):
        packed[..., first + 1] = 0x3C
    return packed.flatten(1), None


def _dequantize(packed_as: str, rows: int, width: int, setting: Setting) -> Case:
    from fastlens.ops.dequantize import dequantize

    on_cpu, scale = random_blocks(packed_as, rows, width)
    packed = on_cpu.to(setting.device)
    scale = None if scale is None else scale.to(setting.device)
    run = (packed, packed_as, scale, BF16)
    contenders, skipped = of_fastlens(["dequantize"], setting, BF16, lambda: dequantize(*run))
    plain = "torch, op by op"
    contenders[plain] = lambda: reference.dequantize(packed, scale, packed_as, BF16)
    if packed_as == "int8":
        skipped["gguf"] = "it has no such format"
    elif importlib.util.find_spec("gguf") is None:
        skipped["gguf"] = "the gguf package is not installed"
    else:
        import gguf

        kind = gguf.GGMLQuantizationType[packed_as]
        array = on_cpu.numpy()

        def by_gguf() -> Tensor:
            """On the processor, then moved: what it offers."""
            return torch.from_numpy(gguf.quants.dequantize(array, kind)).to(setting.device, BF16)

        contenders["gguf, then moved"] = by_gguf
    block, n_bytes = FORMATS[packed_as]
    scales = rows if packed_as == "int8" else 0
    return Case(
        op="dequantize",
        title=f"{packed_as} to bf16, {rows} x {width}",
        truth=lambda: reference.dequantize(packed, scale, packed_as, BF16),
        eager=lambda: reference.dequantize(packed, scale, packed_as, BF16),
        contenders=contenders,
        skipped=skipped,
        work=cuda_work.dequantize(rows * width, block, n_bytes, 2, scales),
        is_exact=True,
    )


# -- rows ------------------------------------------------------------------------------------------


def norm_cases(setting: Setting) -> Iterator[Case]:
    """LayerNorm and RMSNorm with their gains."""
    sizes = ((5, 33),) if setting.is_quick else ((1024, 768), (4096, 4096))
    for n_rows, d in sizes:
        for dtype in (FP32, BF16):
            yield _layer_norm(n_rows, d, dtype, setting)
            yield _rms_norm(n_rows, d, dtype, setting)


def _layer_norm(n: int, d: int, dtype: torch.dtype, setting: Setting) -> Case:
    from fastlens.ops.norm import layer_norm

    x, (w, b) = _drawn(setting, dtype, n, d), _drawn(setting, dtype, 2, d, seed=1)
    run = (x, w, b, 1e-5)
    ours, skipped = of_fastlens(["layer_norm", "norm"], setting, dtype, lambda: layer_norm(*run))
    return Case(
        op="layer_norm",
        title=f"{n} x {d}, {NAMES[dtype]}",
        truth=lambda: reference.layer_norm(x.double(), w.double(), b.double(), 1e-5),
        eager=lambda: reference.layer_norm(*run),
        contenders={
            **ours,
            EAGER: lambda: reference.layer_norm(*run),
            "F.layer_norm": lambda: F.layer_norm(x, (d,), w, b, 1e-5),
        },
        skipped=skipped,
        work=cuda_work.norm(n, d, dtype.itemsize, True),
    )


def _rms_norm(n: int, d: int, dtype: torch.dtype, setting: Setting) -> Case:
    from fastlens.ops.norm import rms_norm

    x, w = _drawn(setting, dtype, n, d), _drawn(setting, dtype, d, seed=1)
    ours, skipped = of_fastlens(["rms_norm", "norm"], setting, dtype, lambda: rms_norm(x, w, 1e-5))
    return Case(
        op="rms_norm",
        title=f"{n} x {d}, {NAMES[dtype]}",
        truth=lambda: reference.rms_norm(x.double(), w.double(), 1e-5),
        eager=lambda: reference.rms_norm(x, w, 1e-5),
        contenders={
            **ours,
            EAGER: lambda: reference.rms_norm(x, w, 1e-5),
            "F.rms_norm": lambda: F.rms_norm(x, (d,), w, 1e-5),
        },
        skipped=skipped,
        work=cuda_work.norm(n, d, dtype.itemsize, False),
    )


def rotary_cases(setting: Setting) -> Iterator[Case]:
    """All channels of a Llama's heads."""
    n_pos, heads, d_head = (5, 3, 8) if setting.is_quick else (4096, 32, 128)
    for dtype in (FP32, BF16):
        for adjacent in (False, True):
            yield _rotary(n_pos, heads, d_head, dtype, adjacent, setting)


def _rotary(
    n_pos: int, heads: int, d_head: int, dtype: torch.dtype, adjacent: bool, setting: Setting
) -> Case:
    from fastlens.ops.rotary import rotary

    x = _drawn(setting, dtype, 1, n_pos, heads, d_head)
    steps = 1e4 ** -torch.linspace(0, 1, d_head // 2, device=setting.device)
    angles = torch.arange(n_pos, device=setting.device)[:, None] * steps
    angles = angles.repeat_interleave(2, -1) if adjacent else angles.repeat(1, 2)
    tables = [table[None].to(dtype) for table in (angles.cos(), angles.sin())]
    ours, skipped = of_fastlens(["rotary"], setting, dtype, lambda: rotary(x, *tables, adjacent))
    wide = [table.double() for table in tables]
    pairs = "neighbours" if adjacent else "halves"
    return Case(
        op="rotary",
        title=f"{n_pos} x {heads} x {d_head}, {pairs}, {NAMES[dtype]}",
        truth=lambda: reference.rotary(x.double(), *wide, adjacent),
        eager=lambda: reference.rotary(x, *tables, adjacent),
        contenders={**ours, EAGER: lambda: reference.rotary(x, *tables, adjacent)},
        skipped=skipped,
        work=cuda_work.rotary(n_pos, heads, d_head, d_head, dtype.itemsize),
    )
