"""The PTX interpreter on programs of a few lines: what it computes, and what it refuses."""

import pytest
import torch

from tests.gpu.ptx import run_ptx
from tests.gpu.ptx_program import PtxError, parse

HEADER = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .u32 k_param_1)
.reqntid 64
{
.reg .pred %p<9>;
.reg .b16 %rs<9>;
.reg .b32 %r<30>;
.reg .b64 %rd<9>;
ld.param.b64 %rd1, [k_param_0];
ld.param.b32 %r1, [k_param_1];
mov.u32 %r2, %tid.x;
mov.u32 %r3, %ctaid.x;
mul.wide.u32 %rd2, %r2, 4;
add.s64 %rd3, %rd1, %rd2;
"""
END = "ret;\n}\n"


def run(body: str, tensor: torch.Tensor, number: int = 0, grid: tuple[int, ...] = (1,)) -> None:
    run_ptx(HEADER + body + END, [tensor, number], grid, 64, 1024)


def test_threads_store_what_they_computed():
    out = torch.zeros(64, dtype=torch.int32)
    run("mad.lo.s32 %r4, %r2, %r1, -3;\nst.global.b32 [%rd3], %r4;\n", out, 5)
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) * 5 - 3)


def test_loops_of_different_length_meet_again():
    body = """
    mov.b32 %r4, 0;
    mov.b32 %r5, 0;
    $L_loop:
    add.s32 %r5, %r5, %r4;
    add.s32 %r4, %r4, 1;
    setp.le.u32 %p1, %r4, %r2;
    @%p1 bra $L_loop;
    st.global.b32 [%rd3], %r5;
    """
    out = torch.zeros(64, dtype=torch.int32)
    run(body, out)
    assert out.tolist() == [n * (n + 1) // 2 for n in range(64)]


@pytest.mark.parametrize(
    ("a", "b", "quotient", "remainder"), [(7, 2, 3, 1), (-7, 2, -3, -1), (7, -2, -3, 1)]
)
def test_signed_division_is_towards_zero(a, b, quotient, remainder):
    out = torch.zeros(64, dtype=torch.int32)
    body = f"mov.b32 %r4, {a};\nmov.b32 %r5, {b};\n"
    run(body + "div.s32 %r6, %r4, %r5;\nst.global.b32 [%rd3], %r6;\n", out)
    assert out[0] == quotient
    run(body + "rem.s32 %r6, %r4, %r5;\nst.global.b32 [%rd3], %r6;\n", out)
    assert out[0] == remainder


def test_bit_fields_bytes_and_shifts():
    out = torch.zeros(64, dtype=torch.int32)
    for line, value in {
        "bfe.u32 %r4, 0x12345678, 8, 8;": 0x56,
        "bfe.s32 %r4, 0xF0, 4, 4;": -1,
        "prmt.b32 %r4, 0x33221100, 0x77665544, 0x7410;": 0x77441100,
        "shl.b32 %r4, 1, 32;": 0,
        "shr.s32 %r4, -8, 1;": -4,
        "selp.b32 %r4, 1, 2, %p1;": 2,
        "popc.b32 %r4, 0;": 0,
        "popc.b32 %r4, -1;": 32,
        "popc.b64 %r4, 0x8000000000000101;": 3,
    }.items():
        run(f"setp.eq.b32 %p1, 1, 2;\n{line}\nst.global.b32 [%rd3], %r4;\n", out)
        assert out[0] == value, line


def test_set_bits_are_counted_thread_by_thread():
    out = torch.zeros(64, dtype=torch.int32)
    run("popc.b32 %r4, %r2;\nst.global.b32 [%rd3], %r4;\n", out)
    assert out.tolist() == [n.bit_count() for n in range(64)]
    with pytest.raises(PtxError, match="not known: popc"):
        run("popc.s32 %r4, %r2;\n", out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_as_torch(dtype):
    x = torch.cat([torch.randn(60) * 100, torch.tensor([0.0, -0.0, float("inf"), 1e-7])])
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    body = f"""
    ld.global.b32 %r4, [%rd3];
    cvt.rn.{name}.f32 %rs1, %r4;
    cvt.f32.{name} %r5, %rs1;
    st.global.b32 [%rd3], %r5;
    """
    wanted = x.to(dtype).float()
    run(body, x)
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_in_16_bits_rounds_once(dtype):
    """Against float64, which holds each product and most sums exactly."""
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    halves = torch.cat([torch.randn(56), torch.tensor([0.0, -0.0, 1e-6, 3e4, 6e4, 1.0, 257, 2049])])
    x, y, z = (halves[torch.randperm(64)].to(dtype) for _ in range(3))
    for line, expected in {
        "add.rn": x.double() + y.double(),
        "mul.rn": x.double() * y.double(),
        "fma.rn": x.double() * y.double() + z.double(),
        "max": torch.maximum(x, y).double(),
    }.items():
        third = ", %rs3" if line == "fma.rn" else ""
        body = f"""
        mul.wide.u32 %rd4, %r2, 2;
        add.s64 %rd5, %rd1, %rd4;
        ld.global.b16 %rs1, [%rd5];
        ld.global.b16 %rs2, [%rd5+128];
        ld.global.b16 %rs3, [%rd5+256];
        {line}.{name} %rs4, %rs1, %rs2{third};
        st.global.b16 [%rd5], %rs4;
        {line}.{name}x2 %r4, %r2, %r2{", %r2" if third else ""};
        """
        memory = torch.cat([x, y, z])
        run(body, memory)
        wanted = torch.from_numpy(expected.numpy())
        # numpy and torch round float64 to 16 bits by way of float32, if at all.
        found, near = memory[:64].double(), wanted.to(dtype).double()
        assert bool((found - wanted).abs().le((near - wanted).abs()).logical_or(near.isinf()).all())
        assert torch.equal(found.isinf(), near.isinf())


def test_a_product_in_16_bits_is_not_one_of_integers():
    """1.5 * 2 in both halves of a register; and what is not known is refused."""
    out = torch.zeros(64, dtype=torch.int32)
    body = "mov.b32 %r4, {};\nmov.b32 %r5, {};\n{} %r6, %r4, %r5;\nst.global.b32 [%rd3], %r6;\n"
    run(body.format("0x3E003E00", "0x40004000", "mul.f16x2"), out)
    assert out[0] == 0x42004200
    run(body.format("0x3FC03FC0", "0x40004000", "mul.bf16x2"), out)
    assert out[0] == 0x40404040
    with pytest.raises(PtxError, match="not known: div"):
        run(body.format("1", "1", "div.rn.f16x2"), out)


def test_float64_is_only_stored():
    out = torch.zeros(64, dtype=torch.float64)
    body = """
    mul.wide.u32 %rd4, %r2, 8;
    add.s64 %rd5, %rd1, %rd4;
    cvt.rn.f32.u32 %r4, %r2;
    mul.f32 %r4, %r4, 0f3DCCCCCD;
    cvt.f64.f32 %rd6, %r4;
    st.global.b64 [%rd5], %rd6;
    """
    run(body, out)
    assert torch.equal(out, (torch.arange(64) * torch.tensor(0.1)).double())


def test_a_butterfly_sum_over_a_warp():
    body = "mov.b32 %r4, %r2;\n" + "".join(
        f"shfl.sync.bfly.b32 %r5, %r4, {step}, 31, -1;\nadd.s32 %r4, %r4, %r5;\n"
        for step in (16, 8, 4, 2, 1)
    )
    out = torch.zeros(64, dtype=torch.int32)
    run(body + "st.global.b32 [%rd3], %r4;\n", out)
    assert set(out[:32].tolist()) == {496} and set(out[32:].tolist()) == {496 + 1024}


def test_a_sum_over_the_lanes_of_a_mask():
    out = torch.zeros(64, dtype=torch.int32)
    run("redux.sync.add.s32 %r4, %r2, -1;\nst.global.b32 [%rd3], %r4;\n", out)
    assert set(out[:32].tolist()) == {496} and set(out[32:].tolist()) == {496 + 1024}
    halves = """
    and.b32 %r5, %r2, 16;
    mov.b32 %r6, 0xFFFF;
    shl.b32 %r6, %r6, %r5;
    redux.sync.max.u32 %r4, %r2, %r6;
    st.global.b32 [%rd3], %r4;
    """
    run(halves, out)
    assert out.tolist() == [n // 16 * 16 + 15 for n in range(64)]
    with pytest.raises(PtxError, match="do not agree who reduces"):
        run("redux.sync.add.s32 %r4, %r2, %r2;\n", out)


EXCHANGE = """
shl.b32 %r4, %r2, 2;
mov.b32 %r5, smem;
add.s32 %r6, %r5, %r4;
st.shared.b32 [%r6], %r2;
BARRIER
xor.b32 %r7, %r4, 128;
add.s32 %r8, %r5, %r7;
ld.shared.b32 %r9, [%r8];
st.global.b32 [%rd3], %r9;
"""


def test_warps_exchange_through_shared_memory_only_with_a_barrier():
    out = torch.zeros(64, dtype=torch.int32)
    run(EXCHANGE.replace("BARRIER", "bar.sync 0;"), out)
    assert out.tolist() == [n ^ 32 for n in range(64)]
    with pytest.raises(PtxError, match="race: read after another warp's write"):
        run(EXCHANGE.replace("BARRIER", ""), out)


def test_a_write_after_a_read_needs_a_barrier():
    body = EXCHANGE.replace("BARRIER", "bar.sync 0;") + "MORE st.shared.b32 [%r6], %r3;\n"
    out = torch.zeros(64, dtype=torch.int32)
    run(body.replace("MORE", "bar.sync 0;\n"), out)
    with pytest.raises(PtxError, match="race: write after another warp's read"):
        run(body.replace("MORE", ""), out)


@pytest.mark.parametrize(("value", "races"), [("%r3", False), ("%r2", True)])
def test_warps_may_write_one_place_only_with_one_value(value, races):
    body = f"mov.b32 %r5, smem;\nst.shared.b32 [%r5], {value};\n"
    if races:
        with pytest.raises(PtxError, match="race: two warps write"):
            run(body, torch.zeros(64))
    else:
        run(body, torch.zeros(64))


COPY = """
shl.b32 %r4, %r2, 2;
mov.b32 %r5, smem;
add.s32 %r6, %r5, %r4;
cp.async.ca.shared.global [%r6], [%rd3], 0x4;
cp.async.commit_group;
WAIT
bar.sync 0;
ld.shared.b32 %r9, [%r6];
neg.s32 %r9, %r9;
st.global.b32 [%rd3], %r9;
"""


def test_an_asynchronous_copy_must_be_waited_for():
    out = torch.arange(64, dtype=torch.int32)
    run(COPY.replace("WAIT", "cp.async.wait_group 0;"), out)
    assert torch.equal(out, -torch.arange(64, dtype=torch.int32))
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(PtxError, match="not waited for"):
            run(COPY.replace("WAIT", wait), out)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("st.global.b32 [%rd3+256], %r2;", "out-of-bounds global store"),
        ("ld.global.b32 %r4, [%rd3+-4];", "out-of-bounds global load"),
        ("st.global.b32 [%rd3+2], %r2;", "misaligned 4-byte global store"),
        ("mov.b32 %r5, smem;\nst.shared.b32 [%r5+1024], %r2;", "out-of-bounds shared"),
        ("mov.b32 %r5, smem;\nld.shared.b32 %r4, [%r5+1];", "misaligned 4-byte shared"),
        ("setp.lt.u32 %p1, %r2, 7;\n@%p1 bar.sync 0;", "a barrier that 57 threads miss"),
        ("add.s32 %r4, %r20, 1;", "%r20 is read and was never written"),
        ("frobnicate.b32 %r4, %r2;", "not known: frobnicate"),
        (
            "mov.b32 %r5, smem;\nadd.s32 %r5, %r5, 0;\n"
            "cp.async.ca.shared.global [%r5], [%rd1], 0x4;\ncp.async.commit_group;",
            "race|on their way",
        ),
    ],
    ids=lambda text: text.split("\n")[-1][:30],
)
def test_what_is_refused(body, why):
    with pytest.raises(PtxError, match=why):
        run(body + "\n", torch.zeros(64, dtype=torch.int32))


def test_two_blocks_may_not_store_to_one_address():
    out = torch.zeros(128, dtype=torch.int32)
    apart = "mul.wide.u32 %rd4, %r3, 256;\nadd.s64 %rd3, %rd3, %rd4;\n"
    run(apart + "st.global.b32 [%rd3], %r2;\n", out, grid=(2,))
    assert out.tolist() == [*range(64), *range(64)]
    with pytest.raises(PtxError, match="two blocks store to one address"):
        run("st.global.b32 [%rd3], %r2;\n", out, grid=(2,))


def test_a_matrix_product_with_its_operands_read_by_ldmatrix():
    """One warp's 16 x 8 x 16 product, laid out as the PTX ISA's tables say."""
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    # Shared memory: a row by row from 0, b row by row from 512; read back transposed.
    data = torch.cat([a.flatten(), b.flatten()]).view(torch.int32)
    out = torch.zeros(16, 8)
    body = """
    shl.b32 %r4, %r2, 4;
    mov.b32 %r5, smem;
    add.s32 %r6, %r5, %r4;
    mul.wide.u32 %rd4, %r2, 16;
    add.s64 %rd5, %rd1, %rd4;
    setp.lt.u32 %p1, %r2, 48;
    @!%p1 bra $L_stored;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd5];
    st.shared.v4.b32 [%r6], {%r10, %r11, %r12, %r13};
    $L_stored:
    bar.sync 0;
    and.b32 %r7, %r2, 15;
    shl.b32 %r7, %r7, 5;
    and.b32 %r8, %r2, 16;
    add.s32 %r7, %r7, %r8;
    add.s32 %r7, %r7, %r5;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r7];
    and.b32 %r8, %r2, 15;
    shl.b32 %r8, %r8, 4;
    add.s32 %r8, %r8, %r5;
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r14, %r15}, [%r8+512];
    mov.b32 %r16, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r20, %r21, %r22, %r23},
      {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r16, %r16, %r16};
    setp.lt.u32 %p1, %r2, 32;
    @!%p1 ret;
    shr.u32 %r7, %r2, 2;
    shl.b32 %r7, %r7, 5;
    and.b32 %r8, %r2, 3;
    shl.b32 %r8, %r8, 3;
    add.s32 %r7, %r7, %r8;
    cvt.u64.u32 %rd6, %r7;
    cvt.s64.s32 %rd7, %r1;
    add.s64 %rd6, %rd6, %rd7;
    add.s64 %rd6, %rd6, %rd1;
    st.global.v2.b32 [%rd6], {%r20, %r21};
    st.global.v2.b32 [%rd6+256], {%r22, %r23};
    """
    memory = torch.cat([data, out.flatten().view(torch.int32)])
    run(body, memory, data.numel() * 4)
    found = memory[data.numel() :].view(torch.float32).view(16, 8)
    assert torch.allclose(found, a.float() @ b.float(), atol=1e-5)


def test_what_is_read_of_a_program():
    program = parse(HEADER + "$L_a:\nret;\n}\n")
    assert program.parameters == [("k_param_0", 8), ("k_param_1", 4)]
    assert program.n_threads == 64 and program.labels == {"$L_a": 6}
    assert program.width("%rs3") == 16 and program.width("%p1") == 1
    assert program.instructions[0].operands == ("%rd1", ("k_param_0", 0))
