"""The kernels of csrc/ run on the CPU: the specification, bit for bit where it is exact."""

import itertools

import pytest
import torch
from torch import Tensor

from fastlens.kernels import compiled, reference
from fastlens.kernels.cuda_capture import capture, row_offsets
from fastlens.kernels.cuda_capture_int8 import capture_int8
from fastlens.kernels.cuda_dequantize import dequantize
from fastlens.kernels.cuda_patch_sites import patch_sites
from fastlens.kernels.reference_packed import FORMATS
from tests.close import assert_no_worse
from tests.csrc.guarded import Guarded
from tests.csrc.on_cpu import (
    ORDERS,
    Launchers,
    changed,
    compile_text,
    launcher,
    needs_compiler,
    source_of,
)

pytestmark = [pytest.mark.kernels, needs_compiler]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MODES = list(compiled.MODES)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Launchers:
    return Launchers(tmp_path_factory.mktemp("csrc"))


@pytest.fixture(params=ORDERS)
def launchers(request, on_cpu, monkeypatch) -> Launchers:
    """The launchers in place of the compiled module, threads in each order."""
    on_cpu.set_order(request.param)
    monkeypatch.setattr(compiled, "module", lambda: on_cpu)
    return on_cpu


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, NaN for NaN."""
    return found.dtype == expected.dtype and torch.equal(
        found.nan_to_num(nan=7.25), expected.nan_to_num(nan=7.25)
    )


def sites(lengths: tuple[int, ...], n: int) -> Tensor:
    flat = torch.randperm(int(torch.tensor(lengths).prod()))[:n]
    return torch.stack(torch.unravel_index(flat, lengths), 1)


# -- patch_sites -----------------------------------------------------------------------------------

# Shapes: odd, whole packs of 16 bytes, more than one block of sites, and many columns.
PATCHED = [
    ((3, 5, 2, 7), 3),
    ((3, 5, 2, 8), 3),
    ((2, 9, 129), 2),
    ((4, 2, 1000), 1),
    ((13, 1, 3), 1),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patch_sites(launchers, poison_empty, mode, dtype):
    for shape, width in PATCHED:
        # Sliced and transposed, so strides are honest.
        x = torch.randn(shape[1], shape[0], *shape[2:-1], shape[-1] + 3).transpose(0, 1)
        x = x[..., 2 : shape[-1] + 2].to(dtype)
        table = sites(shape[:width], min(9, shape[0] * shape[1] // 2))
        values: Tensor | None = torch.randn(len(table), *shape[width:]).to(dtype)
        if mode == "zero":
            values = None
        elif mode == "mean":
            values = torch.randn(6, *shape[1:]).to(dtype)
        found = patch_sites(x, table, values, mode)
        expected = reference.patch_sites(x, table, values, mode)
        if mode == "mean":
            wide = None if values is None else values.double()
            truth = reference.patch_sites(x.double(), table, wide, mode)
            assert_no_worse(found, expected, truth)
        else:
            assert same(found, expected), (shape, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patch_sites_with_broadcast_values(launchers, dtype):
    x, table = torch.randn(3, 5, 2, 8).to(dtype), sites((3, 5, 2), 6)
    of_all = torch.randn(6, 8).to(dtype)
    for values in (of_all, of_all[0], of_all[:, :1], of_all[0, 0], of_all.T.contiguous().T):
        expected = reference.patch_sites(x, table, values, "add")
        assert same(patch_sites(x, table, values, "add"), expected)
    # Sites of two axes each, values that no single stride describes.
    table, values = sites((3, 5), 4), torch.randn(4, 2, 1).to(dtype)
    expected = reference.patch_sites(x, table, values, "scale")
    assert same(patch_sites(x, table, values, "scale"), expected)


# -- capture ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of", "to"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_capture(launchers, poison_empty, of, to):
    x = (torch.randn(5, 139, 2, 3, dtype=torch.float64) * 100).permute(3, 0, 2, 1).to(of)
    x[0, 0, 0, 8], x[0, 0, 1, 9], x[1, 2, 0, 10] = torch.nan, torch.inf, -torch.inf
    for part in (x[..., 5:6], x[..., 4:134], x[..., ::3]):
        for width in range(5):
            table = torch.cat([torch.zeros(1, 4), sites(tuple(part.shape), 6)])[:, :width].long()
            found = capture(part, table, to)
            assert same(found, reference.capture(part, table, to)), (part.shape, width)


@pytest.mark.parametrize("of", DTYPES, ids=str)
def test_capture_int8(launchers, poison_empty, of):
    sizes = 2.0 ** torch.linspace(-8, 8, 5)[:, None, None, None]
    x = (torch.randn(5, 333, 2, 3) * sizes).permute(3, 0, 2, 1).to(of)
    x[0, 0, 0, 8], x[0, 0, 1, 9], x[1, 2, 0] = torch.nan, torch.inf, 0.0
    x[2, 1, 1] = 1e-40
    for part in (x[..., 8:9], x[..., 4:134], x[..., ::3], x):
        for width in range(4):
            table = torch.cat([torch.zeros(1, 4), sites(tuple(part.shape), 6)])[:, :width].long()
            values, scale = capture_int8(part, table)
            expected_values, expected_scale = reference.capture_int8(part, table)
            assert torch.equal(values, expected_values) and same(scale, expected_scale)


# -- dequantize ------------------------------------------------------------------------------------


def packed_bytes(packed_as: str, n_blocks: int) -> Tensor:
    """Any bytes, but for the two scales, whose exponents must not mean infinity."""
    packed = torch.randint(0, 256, (n_blocks, FORMATS[packed_as].n_bytes), dtype=torch.uint8)
    packed[:, 1] &= 0b10111011
    packed[:, 3] &= 0b10111011 if packed_as == "Q4_1" else 0xFF
    return packed


@pytest.mark.parametrize("packed_as", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_blocks(launchers, poison_empty, packed_as, dtype):
    for shape in ((1,), (3, 7), (2, 3, 5)):
        packed = packed_bytes(packed_as, int(torch.tensor(shape).prod()))
        packed = packed.reshape(*shape[:-1], -1)
        found = dequantize(packed, None, packed_as, dtype)
        assert same(found, reference.dequantize(packed, None, packed_as, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_rows(launchers, poison_empty, dtype):
    for shape in ((1,), (3, 129), (2, 3, 257)):
        packed = torch.randint(-127, 128, shape, dtype=torch.int8)
        scale = torch.rand(shape[:-1])
        found = dequantize(packed, scale, "int8", dtype)
        assert same(found, reference.dequantize(packed, scale, "int8", dtype))


# -- nothing outside the tensors is touched --------------------------------------------------------


def patch_between_guards(launch, guarded, length, mode, dtype=torch.float32):
    x, values = torch.randn(7, length).to(dtype), torch.randn(3, length).to(dtype)
    numbers = torch.tensor([6, 0, 2])
    out, kept = guarded(x), [guarded(numbers), guarded(numbers * 0), guarded(values)]
    stride, samples = (0, (3, length)) if mode == "mean" else (length, (0, 0))
    pointers = [tensor.data_ptr() for tensor in (out, *kept)]
    code = compiled.MODES[mode], compiled.DTYPES[dtype]
    launch(*pointers, 3, length, stride, 1, *samples, *code, 0)
    expected = reference.patch_sites(x, numbers[:, None], values, mode)
    assert torch.allclose(out.float(), expected.float(), atol=1e-6)


def capture_between_guards(launch, guarded, length, dtype=torch.float32):
    x = torch.randn(4, 3, length).to(dtype)
    table = torch.tensor([[3, 2], [0, 0], [3, 2], [1, 1], [2, 0]])
    source, out = guarded(x), guarded(torch.full((5, length), torch.nan))
    offsets = guarded(row_offsets(x, table))
    pointers = [tensor.data_ptr() for tensor in (source, offsets, out)]
    launch(*pointers, 5, length, 1, compiled.DTYPES[dtype], 0, 0)
    assert torch.equal(out, reference.capture(x, table, torch.float32))


def capture_int8_between_guards(launch, guarded, length, dtype=torch.float32):
    x = torch.randn(4, 3, length).to(dtype)
    table = torch.tensor([[3, 2], [0, 0], [3, 2], [1, 1], [2, 0]])
    source, offsets = guarded(x), guarded(row_offsets(x, table))
    values = guarded(torch.full((5, length), -128, dtype=torch.int8))
    scale = guarded(torch.full((5,), torch.nan))
    pointers = [tensor.data_ptr() for tensor in (source, offsets, values, scale)]
    launch(*pointers, 5, length, 1, compiled.DTYPES[dtype], 0)
    expected = reference.capture_int8(x, table)
    assert torch.equal(values, expected[0]) and torch.equal(scale, expected[1])


def dequantize_between_guards(launch, guarded, packed_as, n_blocks=9):
    if packed_as == "int8":
        packed = torch.randint(-127, 128, (n_blocks, 33), dtype=torch.int8)
        scale = torch.rand(n_blocks)
        width, n_items = 33, packed.numel()
    else:
        packed, scale, width, n_items = packed_bytes(packed_as, n_blocks), None, 32, n_blocks
    kept = guarded(packed)
    scales = None if scale is None else guarded(scale)
    out = guarded(torch.full((n_blocks, width), torch.nan))
    scale_at = 0 if scales is None else scales.data_ptr()
    format_code = compiled.FORMATS[packed_as]
    launch(kept.data_ptr(), scale_at, out.data_ptr(), n_items, width, format_code, 0, 0)
    assert torch.equal(out, reference.dequantize(packed, scale, packed_as, torch.float32))


@pytest.fixture(params=["end", "begin"])
def guarded(request):
    made = Guarded(request.param)
    yield made
    made.close()


# Lengths: one number, whole packs, one more, more than a block of threads covers at once.
LENGTHS = [1, 7, 16, 129, 640]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_between_guard_pages(on_cpu, guarded, length, dtype):
    on_cpu.set_order("forward")
    for mode in MODES:
        if mode == "mean" and dtype == torch.bfloat16:
            continue  # the order of the sum shows in a rounding
        patch_between_guards(on_cpu.patch_sites, guarded, length, mode, dtype)
    capture_between_guards(on_cpu.capture, guarded, length, dtype)
    capture_int8_between_guards(on_cpu.capture_int8, guarded, length, dtype)


@pytest.mark.parametrize("packed_as", FORMATS)
def test_dequantize_between_guard_pages(on_cpu, guarded, packed_as):
    on_cpu.set_order("forward")
    for n_blocks in (1, 9):
        dequantize_between_guards(on_cpu.dequantize, guarded, packed_as, n_blocks)


def test_launchers_refuse_what_they_can_see(on_cpu):
    with pytest.raises(RuntimeError, match="no such mode"):
        on_cpu.patch_sites(0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 9, 0, 0)
    with pytest.raises(RuntimeError, match="a mean needs a sample"):
        on_cpu.patch_sites(0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 4, 0, 0)
    with pytest.raises(RuntimeError, match="nothing to capture"):
        on_cpu.capture(0, 0, 0, 0, 1, 1, 0, 0, 0)
    with pytest.raises(RuntimeError, match="no such dtype"):
        on_cpu.capture(0, 0, 0, 1, 1, 1, 0, 4, 0)
    with pytest.raises(RuntimeError, match="no such dtype"):
        on_cpu.capture_int8(0, 0, 0, 0, 1, 1, 1, -1, 0)
    with pytest.raises(RuntimeError, match="no such format"):
        on_cpu.dequantize(0, 0, 0, 1, 1, 7, 0, 0)
    with pytest.raises(RuntimeError, match="more rows than a grid"):
        on_cpu.capture(0, 0, 0, 2**40, 1, 1, 0, 0, 0)


# -- kernels broken on purpose ---------------------------------------------------------------------


def broken(name: str, folder, *changes) -> object:
    text = source_of(name)
    for change in changes:
        text = changed(text, *change)
    return launcher(compile_text(text, folder, "broken"), name)


def capture_two_rows_a_block(launch, guarded):
    """Every block goes on to further rows, as with more than 65,535 of them."""
    capture_int8_between_guards(launch, guarded, 200)


FEW_BLOCKS = ("at_most(n_rows, kMaxGridY)", "at_most(n_rows, 2)")
BARRIER = "        __syncthreads();\n"


def test_further_rows_of_a_block(tmp_path, guarded):
    capture_two_rows_a_block(broken("capture_int8", tmp_path, FEW_BLOCKS), guarded)


@pytest.mark.parametrize("which", [0, 1])
def test_a_dropped_barrier_is_found(tmp_path, guarded, which):
    launch = broken("capture_int8", tmp_path, FEW_BLOCKS, (BARRIER, "", which))
    with pytest.raises(RuntimeError, match="shared memory"):
        capture_two_rows_a_block(launch, guarded)


MUTANTS = {
    "a barrier that some threads skip": (
        "capture_int8",
        (BARRIER, "        if (lane < 31) __syncthreads();\n"),
        lambda launch, guarded: capture_int8_between_guards(launch, guarded, 200),
        "divergent barrier|shared memory race",
    ),
    "a shuffle that some lanes skip": (
        "capture_int8",
        ("for (int apart = kWarp / 2;", "if (lane < 31) for (int apart = kWarp / 2;"),
        lambda launch, guarded: capture_int8_between_guards(launch, guarded, 200),
        "divergent barrier|deadlock",
    ),
    "one number too many": (
        "capture",
        ("j < length; j += stride", "j <= length; j += stride"),
        lambda launch, guarded: capture_between_guards(launch, guarded, 128),
        "outside every tensor",
    ),
    "one site too many": (
        "patch_sites",
        ("if (site >= n_sites) return;", ""),
        lambda launch, guarded: patch_between_guards(launch, guarded, 640, "add"),
        "outside every tensor",
    ),
    "one block too many": (
        "dequantize",
        ("b < n_blocks; b += stride", "b <= n_blocks; b += stride"),
        lambda launch, guarded: dequantize_between_guards(launch, guarded, "Q4_0"),
        "outside every tensor",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_kernel_is_stopped(tmp_path, mutant):
    name, change, check, sentence = MUTANTS[mutant]
    guarded = Guarded("end")
    with pytest.raises(RuntimeError, match=sentence):
        check(broken(name, tmp_path, change), guarded)
    guarded.close()


def test_packs_that_do_not_fit_are_found(tmp_path):
    launch = broken("patch_sites", tmp_path, ("length % kWide == 0 &&", ""))
    # Where the first site is aligned, the third, 129 numbers on, is not.
    guarded = Guarded("begin")
    with pytest.raises(RuntimeError, match="misaligned"):
        patch_between_guards(launch, guarded, 129, "zero")
    guarded.close()


WRONG = {
    "nibbles swapped": (
        "dequantize",
        ("lane < 16 ?", "lane >= 16 ?"),
        lambda launch, guarded: dequantize_between_guards(launch, guarded, "Q4_1"),
    ),
    "the largest number of one warp only": (
        "capture_int8",
        ("w < kQuantizeWarps", "w < 1"),
        lambda launch, guarded: capture_int8_between_guards(launch, guarded, 200),
    ),
    "rounded down": (
        "capture_int8",
        ("__float2int_rn(", "static_cast<int>("),
        lambda launch, guarded: capture_int8_between_guards(launch, guarded, 200),
    ),
    "the next site": (
        "patch_sites",
        ("sites[site] * length", "sites[site ^ 1] * length"),
        lambda launch, guarded: patch_between_guards(launch, guarded, 16, "add"),
    ),
}


@pytest.mark.parametrize("mutant", WRONG)
def test_a_wrong_result_is_seen(tmp_path, mutant):
    name, change, check = WRONG[mutant]
    guarded = Guarded("begin")
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(name, tmp_path, change), guarded)
    guarded.close()
