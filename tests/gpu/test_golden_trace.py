"""What a GPU would be asked: every op of each kind of work, and the kernel that would serve it.

With FASTLENS_TRITON=1 on a pretended GPU (`tests.gpu.pretend_cuda`) a model's forward, caches and
sweeps must use exactly the kernels of the tables below, as often as they say, and give what the CPU
gives; and no kernel may be left that nothing uses. The tests marked ``kernels`` carry the launches
out, by Triton's interpreter and by launchers in Python, instead of only recording them.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlens import HookedTransformer, patching
from fastlens.kernels.masks import AttentionRule
from fastlens.ops import dispatch
from fastlens.ops.attention import attention_with_lse
from fastlens.ops.attention_pattern import attention_pattern_rows
from fastlens.ops.attention_summary import attention_summary
from fastlens.ops.capture import capture, capture_int8
from fastlens.ops.dequantize import dequantize
from fastlens.ops.norm import layer_norm_with_scale, rms_norm_with_scale
from fastlens.ops.patch_sites import patch_sites
from tests.close import assert_close_to
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.pretend_cuda import Pretended, PretendedGpu, pretend_cuda
from tests.gpu.workers import interpreted
from tests.models import ours, prompts

# GPT-2; Llama: grouped heads, rotary, RMS; Gemma 2: caps, a window in each other layer, more norms.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "softcap": {
        "n_layers": 2,
        "use_local_attn": True,
        "window_size": 3,
        "attn_types": ["local", "global"],
        "use_normalization_before_and_after": True,
        "initializer_range": 0.2,
    },
}


def model_of(family: str, **changes: Any) -> HookedTransformer:
    model = ours(family, **{**FAMILIES[family], **changes})
    # As users who only look do; the sweeps need it on a GPU.
    return model.requires_grad_(False)


def pair() -> tuple[Tensor, Tensor]:
    """Two prompts of seven tokens that differ from the third on."""
    clean = prompts(batch=1, pos=7)
    corrupted = clean.clone()
    corrupted[0, 2:] = (corrupted[0, 2:] + 1) % 50
    return clean, corrupted


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


# -- the work --------------------------------------------------------------------------------------


def forward(model, tokens, other):
    return model(tokens)


def forward_with_a_pattern(model, tokens, other):
    """A hook on layer 1's pattern: the other layers stay fused."""
    seen = []
    hook = ("blocks.1.attn.hook_pattern", lambda x, hook: seen.append(x.clone()))
    return model.run_with_hooks(tokens, fwd_hooks=[hook]), seen[0]


def selective_cache(model, tokens, other):
    names = ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"]
    logits, cache = model.run_with_cache(tokens, names_filter=names, pos_slice=[0, 3])
    return logits, *(cache[name] for name in names)


def sweep_of(**options: Any) -> Callable[..., Any]:
    def sweep(model, tokens, other):
        scores = patching.sweep(
            model, tokens, other, metric=metric, verify=False, progress=False, **options
        )
        return torch.as_tensor(scores.values)

    return sweep


MODEL_WORK: dict[str, Callable[..., Any]] = {
    "forward": forward,
    "forward, one pattern hooked": forward_with_a_pattern,
    "selective cache": selective_cache,
    "resid_pre sweep": sweep_of(sites="resid_pre"),
    "z sweep": sweep_of(sites="z"),
    "pattern sweep": sweep_of(sites="pattern"),
    "mean ablation": sweep_of(sites="mlp_out", source="mean"),
}

# How often each op is used; its kernel is in KERNELS. One norm before each part and one at the end,
# one attention a layer; q and k turn together, or apart in a wave, whose keys are more rows.
GOLDEN: dict[str, dict[str, dict[str, int]]] = {
    "gpt2": {
        "forward": {"attention_lse": 3, "norm": 7},
        "forward, one pattern hooked": {"attention_lse": 2, "norm": 7},
        "selective cache": {"attention_lse": 3, "capture": 3, "norm": 7},
        "resid_pre sweep": {"norm": 7, "patch_sites_": 3, "suffix_attention": 3},
        "z sweep": {"norm": 7, "patch_sites_": 3, "suffix_attention": 3},
        "pattern sweep": {"norm": 7, "suffix_attention": 3},
        "mean ablation": {"norm": 7, "patch_sites_": 3, "suffix_attention": 3},
    },
    "llama": {
        "forward": {"attention_lse": 3, "norm": 7, "rotary": 3},
        "forward, one pattern hooked": {"attention_lse": 2, "norm": 7, "rotary": 3},
        "selective cache": {"attention_lse": 3, "capture": 3, "norm": 7, "rotary": 3},
        "resid_pre sweep": {"norm": 7, "patch_sites_": 3, "rotary": 6, "suffix_attention": 3},
        "z sweep": {"norm": 7, "patch_sites_": 3, "rotary": 6, "suffix_attention": 3},
        "pattern sweep": {"norm": 7, "rotary": 6, "suffix_attention": 3},
        "mean ablation": {"norm": 7, "patch_sites_": 3, "rotary": 6, "suffix_attention": 3},
    },
    "softcap": {
        "forward": {"attention_lse": 2, "norm": 9, "rotary": 2},
        "forward, one pattern hooked": {"attention_lse": 1, "norm": 9, "rotary": 2},
        "selective cache": {"attention_lse": 2, "capture": 3, "norm": 9, "rotary": 2},
        "resid_pre sweep": {"norm": 9, "patch_sites_": 2, "rotary": 4, "suffix_attention": 2},
        "z sweep": {"norm": 9, "patch_sites_": 2, "rotary": 4, "suffix_attention": 2},
        "pattern sweep": {"norm": 9, "rotary": 4, "suffix_attention": 2},
        "mean ablation": {"norm": 9, "patch_sites_": 2, "rotary": 4, "suffix_attention": 2},
    },
}
KERNELS = {
    "attention_lse": "triton attention with log-sum-exp",
    "attention_pattern": "torch in blocks",
    "attention_pattern_rows": "triton rows of the pattern",
    "attention_summary": "triton attention_summary",
    "attention_with_pattern": "torch matmul",
    "capture": "triton capture",
    "capture_int8": "triton capture_int8",
    "dequantize": "triton dequantize",
    "norm": "triton norm",
    "patch_sites": "triton patch_sites",
    "patch_sites_": "triton patch_sites_",
    "rotary": "triton rotary",
    "suffix_attention": "triton suffix_attention",
}
# Taken from csrc/ where that was built.
IN_CSRC = ("capture", "capture_int8", "dequantize", "patch_sites", "patch_sites_")
# Registered ops give more than some functions ask for, and one kernel serves both.
SERVED_BY = {
    "triton attention": "triton attention with log-sum-exp",
    "triton layer_norm": "triton norm",
    "triton rms_norm": "triton norm",
}


def an_attention() -> tuple[Tensor, Tensor, Tensor, AttentionRule]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 4, 16), *torch.randn(2, 2, 6, 2, 16).unbind(0)
    return q, k, v, AttentionRule(4.0, window=4)


def on_its_own(device: str) -> dict[str, list[Any]]:
    """Each public op that no forward and no sweep needs, with the ops it uses."""
    q, k, v, rule = an_attention()
    q, k, v = (x.to(device) for x in (q, k, v))
    x = torch.randn(3, 5, 16).to(device)
    w = torch.randn(16).to(device)
    sites = torch.tensor([[0, 1], [2, 4]])
    rows = torch.tensor([[0, 1, 2], [1, 3, 5]])
    z, lse = attention_with_lse(q, k, v, rule)
    kept = capture_int8(x, [None, [0, 3]])
    return {
        "attention_lse": [z, lse],
        "attention_pattern_rows": [
            attention_pattern_rows(q, k, rule, rows),
            attention_pattern_rows(q, k, rule, rows, scores=True),
        ],
        "attention_summary": [*attention_summary(q, k, rule, offsets=(0, 1))[:2]],
        "capture": [capture(x, sites, torch.float16)],
        "capture_int8": [*kept],
        "dequantize": [dequantize(kept.values, "int8", kept.scale), kept.read(torch.bfloat16)],
        "norm": [*layer_norm_with_scale(x, w, w), *rms_norm_with_scale(x, w)],
        "patch_sites": [patch_sites(x, sites, w, mode) for mode in ("replace", "add")],
    }


# -- unmarked: recorded, and computed by what the CPU has ------------------------------------------


def traced(
    family: str, name: str, *, csrc: bool = False, triton: bool = True, launch: bool = False
) -> tuple[PretendedGpu, list[Tensor], list[Tensor]]:
    """One piece of work on the pretended GPU: its records, its results and the CPU's."""
    model, tokens = model_of(family), pair()
    with torch.no_grad():
        expected = MODEL_WORK[name](model, *tokens)
    with pretend_cuda(csrc=csrc, triton=triton, launch=launch) as gpu, torch.no_grad():
        model.to("cuda", print_details=False)
        moved = [x.to("cuda") for x in tokens]
        gpu.forget()
        found = MODEL_WORK[name](model, *moved)
    return gpu, *(list(x) if isinstance(x, tuple) else [x] for x in (found, expected))


def assert_same(found: list[Tensor], expected: list[Tensor], error: float = 1e-5) -> None:
    for one, true in zip(found, expected, strict=True):
        one = one.inner if isinstance(one, Pretended) else one
        assert one.dtype == true.dtype
        # A masked score is minus infinity.
        largest = float(true[true.isfinite()].abs().max())
        assert_close_to(one, true, atol=error * max(1.0, largest))


def golden(counts: dict[str, int], csrc: bool = False) -> dict[tuple[str, str], int]:
    def kernel(op: str) -> str:
        return f"CUDA C++ {op}" if csrc and op in IN_CSRC else KERNELS[op]

    return {(op, kernel(op)): count for op, count in counts.items()}


each_trace = pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, table in GOLDEN.items() for name in table]
)


@each_trace
def test_trace(family, name):
    gpu, found, expected = traced(family, name)
    assert gpu.counted() == golden(GOLDEN[family][name])
    assert gpu.direct == [], "kernels that torch.compile and autograd would not see"
    assert_same(found, expected)
    if "sweep" not in name and "mean" not in name:
        assert gpu.reads == [], "the host waited"


@pytest.mark.parametrize("name", MODEL_WORK)
def test_trace_with_the_cuda_module(name):
    gpu, found, expected = traced("llama", name, csrc=True)
    assert gpu.counted() == golden(GOLDEN["llama"][name], csrc=True)
    assert_same(found, expected)


@pytest.mark.parametrize("name", MODEL_WORK)
def test_without_triton_a_gpu_runs_pytorch(name):
    """What a user gets who has neither: the same numbers, and nothing that nobody has run."""
    gpu, found, expected = traced("llama", name, triton=False)
    assert gpu.launches == []
    assert not any("triton" in call.kernel or "CUDA C++" in call.kernel for call in gpu.calls)
    assert_same(found, expected)


def test_the_order_of_a_forward():
    gpu, _, _ = traced("llama", "forward")
    layer = ["norm", "rotary", "attention_lse", "norm"]
    assert [call.op for call in gpu.calls] == layer * 3 + ["norm"]


def test_launches():
    """One a call, whatever it holds; suffix attention has two where a prefix is shared."""
    gpu, _, _ = traced("gpt2", "resid_pre sweep")
    launches, calls = (Counter(x) for x in ((y.call.op for y in gpu.launches), gpu.calls))
    for call, count in calls.items():
        most = 2 * count if call.op == "suffix_attention" else count
        assert count <= launches[call.op] <= most, (call, launches)


def test_ops_on_their_own():
    for csrc in (False, True):
        with pretend_cuda(csrc=csrc) as gpu:
            found = on_its_own("cuda")
        for op, expected in on_its_own("cpu").items():
            assert_same(found[op], expected)
        counts = {op: len(results) for op, results in found.items()}
        # Values and scale, or output and log-sum-exp, come together.
        for op in ("attention_lse", "attention_summary", "capture_int8"):
            counts[op] = 1
        counts["norm"] = 2
        assert gpu.counted() == golden(counts, csrc) and gpu.direct == []
        assert gpu.reads == []


def test_a_pattern_read_from_a_cache():
    """Rebuilt when it is read, and then only that layer's."""
    with pretend_cuda() as gpu, torch.no_grad():
        model, tokens = model_of("llama"), pair()[0]
        _, expected = model.run_with_cache(tokens)
        truth = expected["pattern", 1].clone()
        model.to("cuda", print_details=False)
        _, cache = model.run_with_cache(tokens.to("cuda"))
        gpu.forget()
        found = cache["pattern", 1]
    assert gpu.counted() == golden({"attention_pattern": 1})
    assert_same([found], [truth])


def test_no_kernel_is_an_orphan():
    """Every kernel for GPUs serves something above, as the other tests here hold."""
    used = {op for tables in GOLDEN.values() for table in tables.values() for op in table}
    used |= on_its_own("cpu").keys()
    named = {kernel for csrc in (False, True) for _, kernel in golden(dict.fromkeys(used, 1), csrc)}
    for kernels in dispatch.kernels().values():
        for kernel in kernels:
            if kernel.is_for_gpus:
                assert SERVED_BY.get(kernel.name, kernel.name) in named, kernel.name
    assert set(SERVED_BY) <= {k.name for kernels in dispatch.kernels().values() for k in kernels}


# Reads by the host in each layer of a sweep (finding which rows belong together), and for each run.
READS_A_LAYER, READS_A_RUN = 8, 1


def reads_of(n_layers: int, positions: list[int]) -> int:
    model, tokens = model_of("gpt2", n_layers=n_layers), pair()
    with pretend_cuda() as gpu, torch.no_grad():
        model.to("cuda", print_details=False)
        moved = [x.to("cuda") for x in tokens]
        gpu.forget()
        sweep_of(sites="resid_pre", layers=0, positions=positions)(model, *moved)
    return len(gpu.reads)


def test_how_often_a_sweep_waits():
    base = reads_of(3, [3, 4])
    assert reads_of(4, [3, 4]) - base == READS_A_LAYER
    assert reads_of(3, [3, 4, 5]) - base == READS_A_RUN


def test_double_precision_is_pytorchs():
    model, tokens = model_of("gpt2").double(), pair()[0]
    expected = model(tokens)
    with pretend_cuda(csrc=True) as gpu:
        model.to("cuda", print_details=False)
        found = model(tokens.to("cuda"))
    assert gpu.launches == [] and gpu.calls
    assert_same([found], [expected], error=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_cpus(family):
    """The registered ops have them, whichever kernel runs forward."""
    model, tokens = ours(family, **FAMILIES[family]), pair()[0]
    model(tokens, return_type="loss").backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with pretend_cuda() as gpu:
        model.to("cuda", print_details=False)
        model(tokens.to("cuda"), return_type="loss").backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {call.op for call in gpu.calls} >= {"attention_lse", "norm"} and gpu.direct == []
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_same([found[name]], [gradient])


# -- marked: launched ------------------------------------------------------------------------------


def carried_out(family, name, csrc):
    """The same traces, each launch interpreted."""
    gpu, found, expected = traced(family, name, csrc=csrc, launch=True)
    assert gpu.counted() == golden(GOLDEN[family][name], csrc)
    assert gpu.launches
    assert_same(found, expected, error=1e-4)


def carried_out_on_their_own():
    with pretend_cuda(launch=True) as gpu:
        found = on_its_own("cuda")
    assert {launch.call.op for launch in gpu.launches} == found.keys()
    for op, expected in on_its_own("cpu").items():
        assert_same(found[op], expected)


def needs_triton(test):
    for mark in NEEDS_TRITON:
        test = mark(test)
    return test


LAUNCHED = [
    *(("llama", name) for name in MODEL_WORK),
    *(("gpt2", "forward"), ("gpt2", "mean ablation"), ("softcap", "resid_pre sweep")),
]


@needs_triton
@pytest.mark.parametrize(("family", "name"), LAUNCHED)
def test_trace_carried_out(family, name):
    interpreted(carried_out, family=family, name=name, csrc=family == "gpt2")


@needs_triton
def test_ops_on_their_own_carried_out():
    interpreted(carried_out_on_their_own)
