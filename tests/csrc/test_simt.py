"""The machine that runs .cu files on the CPU: it computes, and each fault it looks for is found."""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from tests.csrc.guarded import Guarded
from tests.csrc.on_cpu import ORDERS, ROOT, compile_text, needs_compiler

pytestmark = [pytest.mark.kernels, needs_compiler]

# One kernel a fault, and its right twin: `run(which, x, n)` launches one block of 64 threads on x.
SOURCE = """
#include "device.cuh"
namespace {
__global__ void reverse(int* x, int n) {
    FASTLENS_SHARED(int, held, 64);
    const int t = threadIdx.x;
    held[t] = x[t];
    __syncthreads();
    x[t] = held[n - 1 - t];
}
__global__ void reverse_without_a_barrier(int* x, int n) {
    FASTLENS_SHARED(int, held, 64);
    const int t = threadIdx.x;
    held[t] = x[t];
    x[t] = held[n - 1 - t];
}
__global__ void write_after_read(int* x, int n) {
    FASTLENS_SHARED(int, held, 64);
    const int t = threadIdx.x;
    held[t] = x[t];
    __syncthreads();
    x[t] = held[n - 1 - t];
    held[t] = 0;
}
__global__ void two_writers(int* x, int n) {
    FASTLENS_SHARED(int, held, 64);
    held[threadIdx.x / 2] = x[threadIdx.x];
}
__global__ void never_written(int* x, int n) {
    FASTLENS_SHARED(int, held, 64);
    x[threadIdx.x] = held[threadIdx.x];
}
__global__ void beyond_shared(int* x, int n) {
    FASTLENS_SHARED(int, held, 64);
    held[threadIdx.x + 1] = x[threadIdx.x];
}
__global__ void left_before_the_barrier(int* x, int n) {
    if (threadIdx.x == 7) return;
    __syncthreads();
    x[threadIdx.x] = 0;
}
__global__ void two_barriers(int* x, int n) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    x[threadIdx.x] = 0;
}
__global__ void half_a_warp_shuffles(int* x, int n) {
    const int t = threadIdx.x;
    if (t % 32 < 16) x[t] = __shfl_xor_sync(0xffffffffu, t, 1);
}
__global__ void sum_of_warp(int* x, int n) {
    int sum = x[threadIdx.x];
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    x[threadIdx.x] = sum;
}
__global__ void warp_barrier_is_enough(int* x, int n) {
    FASTLENS_SHARED(int, held, 64);
    const int t = threadIdx.x;
    held[t] = x[t];
    __syncwarp();
    x[t] = held[t ^ 1];
}
__global__ void warp_barrier_is_not_enough(int* x, int n) {
    FASTLENS_SHARED(int, held, 64);
    const int t = threadIdx.x;
    held[t] = x[t];
    __syncwarp();
    x[t] = held[t ^ 32];
}
__global__ void past_the_end(int* x, int n) { x[threadIdx.x + 1] = 0; }
__global__ void before_the_begin(int* x, int n) {
    const int t = threadIdx.x;
    x[t] = x[t - 1];
}
__global__ void misaligned(int* x, int n) {
    using four = fastlens::Pack<int, 4>;
    if (threadIdx.x == 0) *reinterpret_cast<four*>(x + 1) = four{};
}
__global__ void last_writer_wins(int* x, int n) { x[0] = threadIdx.x; }
}
extern "C" const char* run(const char* which, int* x, int n) {
    const std::string name = which;
#define CASE(kernel) if (name == #kernel) FASTLENS_LAUNCH(kernel, dim3(1), dim3(64), nullptr, x, n)
    CASE(reverse); CASE(reverse_without_a_barrier); CASE(write_after_read); CASE(two_writers);
    CASE(never_written); CASE(beyond_shared); CASE(left_before_the_barrier); CASE(two_barriers);
    CASE(half_a_warp_shuffles); CASE(sum_of_warp); CASE(warp_barrier_is_enough);
    CASE(warp_barrier_is_not_enough); CASE(past_the_end); CASE(before_the_begin); CASE(misaligned);
    CASE(last_writer_wins);
    if (name == "no_blocks") FASTLENS_LAUNCH(reverse, dim3(0), dim3(64), nullptr, x, n);
    return fastlens::launch_error();
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_text(SOURCE, tmp_path_factory.mktemp("simt"), "faults")


@pytest.fixture(params=ORDERS)
def run(request, library):
    """Runs a kernel of `SOURCE` on a tensor; returns what the launch says."""
    library.simt_set_order(ORDERS[request.param])
    library.run.restype = ctypes.c_char_p
    library.run.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]

    def call(kernel: str, x: torch.Tensor) -> str:
        said = library.run(kernel.encode(), x.data_ptr(), x.numel())
        return "" if said is None else said.decode()

    return call


def numbers() -> torch.Tensor:
    return torch.arange(64, dtype=torch.int32)


def test_right_kernels_run(run):
    x = numbers()
    assert run("reverse", x) == "" and torch.equal(x, numbers().flip(0))
    x = numbers()
    assert run("sum_of_warp", x) == ""
    assert torch.equal(x, numbers().view(2, 32).sum(1, dtype=torch.int32).repeat_interleave(32))
    x = numbers()
    assert run("warp_barrier_is_enough", x) == ""
    assert torch.equal(x, numbers().view(32, 2).flip(1).flatten())


@pytest.mark.parametrize(
    ("kernel", "sentence"),
    [
        # Whoever reads first finds nothing written, or what another thread has just written.
        ("reverse_without_a_barrier", ("race", "uninitialised")),
        ("warp_barrier_is_not_enough", ("race", "uninitialised")),
        ("write_after_read", ("shared memory race",)),
        ("two_writers", ("shared memory race",)),
        ("never_written", ("uninitialised shared memory",)),
        ("beyond_shared", ("64 numbers is indexed with 64",)),
        ("left_before_the_barrier", ("divergent barrier",)),
        ("two_barriers", ("divergent barrier",)),
        ("half_a_warp_shuffles", ("deadlock",)),
        ("no_blocks", ("invalid configuration",)),
        ("misaligned", ("misaligned",)),
    ],
)
def test_each_fault_is_found(run, kernel, sentence):
    said = run(kernel, numbers())
    assert any(part in said for part in sentence), said
    # The next launch starts anew.
    x = numbers()
    assert run("reverse", x) == "" and torch.equal(x, numbers().flip(0))


@pytest.mark.parametrize(
    ("kernel", "flush_with"), [("past_the_end", "end"), ("before_the_begin", "begin")]
)
def test_an_address_outside_a_tensor_is_found(run, kernel, flush_with):
    guarded = Guarded(flush_with)
    assert "outside every tensor" in run(kernel, guarded(numbers()))
    assert run("reverse", guarded(numbers())) == ""
    guarded.close()


def test_a_result_that_hangs_on_the_order_differs(library):
    library.run.restype = ctypes.c_char_p
    library.run.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
    found = set()
    for order in ORDERS.values():
        library.simt_set_order(order)
        x = numbers()
        library.run(b"last_writer_wins", x.data_ptr(), 64)
        found.add(int(x[0]))
    assert {0, 63} <= found


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_what_the_compiler_of_gpus_makes_of_the_same_source(tmp_path):
    """The faults are CUDA, not only what the shim takes for CUDA."""
    import subprocess

    source = tmp_path / "faults.cu"
    source.write_text("#include <string>\n" + SOURCE, encoding="utf-8")
    command = ["nvcc", "-std=c++17", "-cubin", "-arch=sm_80", f"-I{Path(ROOT) / 'csrc'}"]
    built = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "faults.cubin")],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
