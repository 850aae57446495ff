"""For each proof of a kernel without a GPU: where a kernel broken on purpose is shown to be caught.

(a) Triton's interpreter, with bfloat16 corrected and guard pages
    tests/gpu/test_bf16_interpreter.py::test_without_the_correction_it_is_wrong
    tests/gpu/test_guard_pages.py::test_one_element_too_far_is_fatal
    tests/kernels/jit/test_attention.py::test_a_mistake_is_caught
    tests/kernels/jit/test_attention.py::test_a_dropped_mask_hits_a_guard_page
    tests/kernels/jit/test_attention_summary.py::test_a_mistake_is_caught
    tests/kernels/jit/test_attention_summary.py::test_a_dropped_mask_hits_a_guard_page
    tests/kernels/jit/test_dequantize.py::test_a_mistake_is_caught
    tests/kernels/jit/test_dequantize.py::test_a_dropped_mask_hits_a_guard_page
    tests/kernels/jit/test_norm.py::test_a_mistake_is_caught
    tests/kernels/jit/test_norm.py::test_a_dropped_mask_hits_a_guard_page
    tests/kernels/jit/test_rotary.py::test_a_mistake_is_caught
    tests/kernels/jit/test_rotary.py::test_a_dropped_mask_hits_a_guard_page
    tests/kernels/jit/test_sites.py::test_a_mistake_is_caught
    tests/kernels/jit/test_sites.py::test_a_dropped_mask_hits_a_guard_page
    tests/kernels/jit/test_suffix_attention.py::test_a_mistake_is_caught
    tests/kernels/jit/test_suffix_attention.py::test_a_dropped_mask_hits_a_guard_page
    tests/kernels/jit/test_suffix_attention.py::test_bounds_of_tiles_that_are_off_are_caught
    tests/kernels/test_suffix_tiles.py::test_a_mistake_is_caught
(b) compiled ahead of time: spills, shared memory, matrix instructions
    tests/gpu/test_ahead_of_time.py::test_bad_configurations_are_caught
    tests/gpu/test_sites_ahead_of_time.py::test_bad_configurations_are_caught
(c) the compiled PTX, executed on CPU tensors
    tests/gpu/test_ptx.py::test_dropped_barriers_are_caught
    tests/gpu/test_ptx.py::test_dropped_waits_are_caught
    tests/gpu/test_ptx.py::test_a_wait_for_one_group_too_few_is_caught
    tests/gpu/test_ptx.py::test_a_wrong_instruction_is_caught
    tests/gpu/test_ptx.py::test_an_index_that_is_off_is_caught
    tests/gpu/test_ptx.py::test_a_kernel_for_aligned_rows_on_others_is_caught
    tests/gpu/test_ptx_sites.py::test_a_wrong_instruction_is_caught
    tests/gpu/test_ptx_sites.py::test_an_index_that_is_off_is_caught
(d) Triton's own launch, with a driver that is not one
    tests/gpu/test_fake_driver.py::test_wrong_launches_are_caught
    tests/gpu/test_fake_driver.py::test_without_a_driver_a_launch_is_an_error_and_not_silence
    tests/gpu/test_sites_ahead_of_time.py::test_wrong_launches_are_caught
(e) csrc/, run block by block and thread by thread on the CPU, and compiled by nvcc
    tests/csrc/test_simt.py::test_each_fault_is_found
    tests/csrc/test_simt.py::test_an_address_outside_a_tensor_is_found
    tests/csrc/test_simt.py::test_a_result_that_hangs_on_the_order_differs
    tests/csrc/test_kernels.py::test_a_dropped_barrier_is_found
    tests/csrc/test_kernels.py::test_a_broken_kernel_is_stopped
    tests/csrc/test_kernels.py::test_packs_that_do_not_fit_are_found
    tests/csrc/test_kernels.py::test_a_wrong_result_is_seen
    tests/csrc/test_nvcc.py::test_a_spill_would_be_seen
(f) the golden trace on a pretended GPU
    tests/gpu/test_pretend_cuda.py::test_a_launch_with_a_cpu_tensor_is_refused
    tests/gpu/test_broken_kernels.py::test_a_kernel_that_is_no_longer_chosen_is_caught
    tests/gpu/test_broken_kernels.py::test_a_kernel_called_past_its_op_is_caught
    tests/gpu/test_broken_kernels.py::test_a_launcher_whose_result_is_of_another_kind_is_caught
    tests/gpu/test_broken_kernels.py::test_a_wrong_fake_is_caught
    tests/gpu/test_broken_kernels.py::test_a_table_left_on_the_cpu_is_caught
    tests/gpu/test_broken_kernels.py::test_a_read_by_the_host_is_caught
    tests/gpu/test_broken_kernels.py::test_a_kernel_that_nothing_uses_is_caught
    tests/gpu/test_broken_kernels.py::test_a_wrong_kernel_is_caught_in_a_whole_forward

What fails there is what `make test-kernels` would fail on; (f) is part of `make test` but for the
last. The tests below are the broken kernels of (f), and hold that this table is complete.
"""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch

import fastlens.kernels.jit
from fastlens.kernels import triton_capture
from fastlens.kernels.kernel import Kernel
from fastlens.ops import dispatch, norm, rotary
from tests.gpu import pretend_cuda
from tests.gpu import test_golden_trace as trace
from tests.gpu.mutation import mutated
from tests.gpu.workers import interpreted

ROOT = Path(__file__).parents[2]
LISTED = re.findall(r"^    (tests/\S+\.py)::(\w+)$", __doc__ or "", re.MULTILINE)


def functions(path: Path) -> dict[str, str]:
    """The source of each test in a file."""
    text = path.read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_source_segment(text, node) or "" for node in nodes}


def test_every_proof_has_its_broken_kernels():
    proofs = re.split(r"^\([a-f]\) ", __doc__ or "", flags=re.MULTILINE)[1:]
    assert len(proofs) == 6 and all("    tests/" in proof for proof in proofs)
    for file, name in LISTED:
        assert name in functions(ROOT / file), f"{file} has no {name}"


def test_every_source_is_broken_on_purpose():
    """Each module of Triton kernels by its own tests, and each file of csrc/ by those of csrc."""
    for path in sorted(Path(fastlens.kernels.jit.__path__[0]).glob("[!_]*.py")):
        file = f"tests/kernels/jit/test_{path.stem}.py"
        text = (ROOT / file).read_text(encoding="utf-8")
        assert f'mutated("{path.stem}", right, wrong)' in text, path
        assert (file, "test_a_mistake_is_caught") in LISTED
    mutants = (ROOT / "tests/csrc/test_kernels.py").read_text(encoding="utf-8")
    mutants = mutants[mutants.index("# -- kernels broken on purpose") :]
    for path in sorted((ROOT / "csrc").glob("*.cu")):
        assert f'"{path.stem}",' in mutants, path


def registry_with(monkeypatch, op: str, kernel: str, **changes) -> None:
    """The pretended GPU's registry, with one kernel changed."""
    found = {name: list(kernels) for name, kernels in dispatch.kernels().items()}
    index = [k.name for k in found[op]].index(kernel)
    found[op][index] = dataclasses.replace(found[op][index], **changes)
    found[op].sort(key=lambda k: -k.priority)
    monkeypatch.setattr(pretend_cuda, "_REGISTRY", lambda: found)


@pytest.mark.parametrize(
    ("op", "work", "changes"),
    [
        ("rotary", "forward", {"refuses": lambda device, dtype: "it rains"}),
        ("suffix_attention", "z sweep", {"priority": 1}),
        ("capture", "selective cache", {"refuses": lambda device, dtype: "it rains"}),
    ],
)
def test_a_kernel_that_is_no_longer_chosen_is_caught(monkeypatch, op, work, changes):
    registry_with(monkeypatch, op, f"triton {op}", **changes)
    with pytest.raises(AssertionError, match=op):
        trace.test_trace("llama", work)


def test_a_kernel_called_past_its_op_is_caught(monkeypatch):
    monkeypatch.setattr(rotary, "is_opaque", lambda *place: False)
    with pytest.raises(AssertionError, match="would not see"):
        trace.test_trace("llama", "forward")


def rounded(x, cos, sin, adjacent_pairs):
    return x.half()


def strided(activation, table, dtype):
    shape = (len(table), *activation.shape[table.shape[1] :])
    return activation.new_empty(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))


def on_the_cpu(x, cos, sin, adjacent_pairs):
    return torch.empty(x.shape)


# As a launcher's: dispatch tells kernels for GPUs by their module.
for function in (rounded, strided, on_the_cpu):
    function.__module__ = "fastlens.kernels.triton_rotary"


@pytest.mark.parametrize("wrong", [rounded, on_the_cpu])
def test_a_launcher_whose_result_is_of_another_kind_is_caught(monkeypatch, wrong):
    registry_with(monkeypatch, "rotary", "triton rotary", fn=wrong)
    with pytest.raises(RuntimeError, match="triton rotary gives .* and should give"):
        trace.test_trace("llama", "forward")


def test_a_wrong_fake_is_caught(monkeypatch):
    """Compilers take an op's strides from its fake."""
    registry_with(monkeypatch, "capture", "triton capture", fn=strided)
    with pytest.raises(RuntimeError, match="its fake says"):
        trace.test_trace("llama", "selective cache")


def test_a_table_left_on_the_cpu_is_caught(monkeypatch):
    def forgetful(activation, table, dtype):
        """As the launcher, with the table where it came from."""
        monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: x)
        try:
            return triton_capture.capture(activation, table, dtype)
        finally:
            monkeypatch.undo()

    forgetful.__module__ = triton_capture.__name__
    registry_with(monkeypatch, "capture", "triton capture", fn=forgetful)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        trace.test_trace("gpt2", "selective cache")


def test_a_read_by_the_host_is_caught(monkeypatch):
    layer_norm = norm.layer_norm

    def nosy(x, *args, **kwargs):
        assert bool(torch.isfinite(x).all())
        return layer_norm(x, *args, **kwargs)

    monkeypatch.setattr("fastlens.components.norms.layer_norm", nosy)
    with pytest.raises(AssertionError, match="the host waited"):
        trace.test_trace("gpt2", "forward")


def test_a_kernel_that_nothing_uses_is_caught(monkeypatch):
    kernels = dict(dispatch.kernels())
    forgotten = Kernel("forgotten", "triton forgotten", rounded, lambda *place: None)
    monkeypatch.setattr(dispatch, "kernels", lambda: {**kernels, "forgotten": [forgotten]})
    with pytest.raises(AssertionError, match="triton forgotten"):
        trace.test_no_kernel_is_an_orphan()


def broken_forward():
    with mutated("rotary", "cos_b[None, :] + a", "cos_b[None, :] - a"):
        trace.carried_out("llama", "forward", csrc=False)


@trace.needs_triton
def test_a_wrong_kernel_is_caught_in_a_whole_forward():
    with pytest.raises(AssertionError, match="values differ"):
        interpreted(broken_forward)
