"""The compiled sm_80 kernels, executed on CPU tensors from launcher to result; broken ones caught.

This is the code a GPU of compute capability 8.0 would load. It has not been run on one.
"""

import re

import pytest
import torch

from tests.gpu.judged import (
    RULES,
    check_attention,
    check_norm,
    check_rotary,
    check_suffix,
    check_summary,
)
from tests.gpu.launches import all_modules, instead_of_launching, launches_of
from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.mutation import mutated
from tests.gpu.ptx import execute
from tests.gpu.ptx_program import PtxError
from tests.gpu.workers import compiling

pytestmark = NEEDS_TRITON

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def executed(judge, kwargs, edit=None, kernel=""):
    """``judge(**kwargs)`` with every launch run as PTX; ``edit`` changes that of one kernel."""

    def act(launch):
        name = launch.kernel.fn.__name__
        execute(launch, edit if name.startswith(kernel) else None)

    with instead_of_launching(act, *all_modules()):
        judge(**kwargs)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_rules(rule, dtype):
    kwargs = {
        "rule": rule,
        "dtype": dtype,
        "is_padded": rule == "everything",
        "n_queries": 66,
        "n_keys": 75,
        "kv_heads": 1,
        "d_head": 32,
    }
    compiling(executed, judge=check_attention, kwargs=kwargs)


@pytest.mark.parametrize("d_head", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_head_sizes(d_head, dtype):
    kwargs = {"d_head": d_head, "dtype": dtype, "n_queries": 5, "n_keys": 40, "heads": 1}
    compiling(executed, judge=check_attention, kwargs={**kwargs, "kv_heads": 1})


@pytest.mark.parametrize("strides", ["sliced", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_strides(strides, dtype):
    kwargs = {"strides": strides, "dtype": dtype, "n_queries": 1, "n_keys": 33, "is_padded": True}
    compiling(executed, judge=check_attention, kwargs={**kwargs, "heads": 4})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "rule"), [("each", "everything"), ("of examples", "causal")])
def test_attention_biases(bias, rule, dtype):
    kwargs = {"bias": bias, "rule": rule, "dtype": dtype, "is_padded": rule == "everything"}
    kwargs |= {"n_queries": 20, "n_keys": 75, "d_head": 32}
    compiling(executed, judge=check_attention, kwargs=kwargs)


@pytest.mark.parametrize("rule", ["causal", "bidirectional", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summary_rules(rule, dtype):
    kwargs = {"rule": rule, "dtype": dtype, "is_padded": rule == "everything", "kv_heads": 1}
    kwargs |= {"n_queries": 66, "n_keys": 75, "heads": 2, "d_head": 32}
    compiling(executed, judge=check_summary, kwargs=kwargs)


@pytest.mark.parametrize(
    ("d_head", "strides", "bias"),
    [
        (16, "sliced", ""),
        (80, "transposed", "of heads"),
        (128, "whole", "each"),
        (256, "sliced", ""),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_summary_head_sizes(d_head, strides, bias, dtype):
    kwargs = {"d_head": d_head, "strides": strides, "bias": bias, "dtype": dtype, "heads": 2}
    kwargs |= {"n_queries": 5, "n_keys": 40, "kv_heads": 1}
    compiling(executed, judge=check_summary, kwargs=kwargs)


# Branches from two positions on: prefixes of 20 and 40 keys are shared by three each.
STARTS = (20, 20, 20, 40, 40, 40)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_suffix_rules(rule, dtype):
    kwargs = {"rule": rule, "dtype": dtype, "is_padded": rule == "everything"}
    kwargs |= {"starts": STARTS, "n_pos": 66, "kv_heads": 1, "d_head": 32}
    compiling(executed, judge=check_suffix, kwargs=kwargs)


@pytest.mark.parametrize("d_head", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("strides", ["sliced", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_suffix_head_sizes(d_head, strides, dtype):
    """Of one row a branch, and all of it in one launch."""
    kwargs = {"d_head": d_head, "strides": strides, "dtype": dtype, "starts": (39,) * 4}
    kwargs |= {"n_pos": 40, "wanted": [([2, 3, 4, 5], 39, 40)], "kv_heads": 1}
    for state_cost in (0, 10**6):
        compiling(executed, judge=check_suffix, kwargs={**kwargs, "state_cost": state_cost})


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 64, 129, 1000])
def test_norms(op, dtype, d):
    compiling(executed, judge=check_norm, kwargs={"op": op, "dtype": dtype, "d": d})


@pytest.mark.parametrize("adjacent_pairs", [True, False], ids=["adjacent", "halves"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary(adjacent_pairs, dtype):
    kwargs = {"adjacent_pairs": adjacent_pairs, "dtype": dtype, "rotary_dim": 16, "d_head": 20}
    compiling(executed, judge=check_rotary, kwargs=kwargs)


# -- broken on purpose ---------------------------------------------------------------------------

# Several key blocks, so that shared memory is used again.
LOOPING = {
    "attention": {"n_queries": 64, "n_keys": 200, "d_head": 64, "heads": 1, "kv_heads": 1},
    "summary": {"n_queries": 64, "n_keys": 200, "d_head": 64, "heads": 1, "kv_heads": 1},
    "suffix": {"starts": (150,) * 3, "n_pos": 220, "d_head": 64, "heads": 1, "kv_heads": 1},
}
JUDGES = {"attention": check_attention, "summary": check_summary, "suffix": check_suffix}
KERNELS = {
    "attention": "attention_fwd",
    "summary": "attention_summary",
    "suffix": "suffix_attention",
}
# Rows of branches alone: those of whole runs would look at the same code again.
LOOPING["suffix"]["wanted"] = [([2, 3, 4], 150, 220)]


def outcome(of, kwargs, pattern, replacement, number):
    """What is said when the ``number``-th match in the PTX is replaced; None if nothing is."""
    n_found = 0

    def edit(text):
        nonlocal n_found
        matches = list(re.finditer(pattern, text))
        if number >= len(matches):
            return text
        n_found += 1
        match = matches[number]
        return text[: match.start()] + match.expand(replacement) + text[match.end() :]

    try:
        executed(JUDGES[of], kwargs, edit, KERNELS[of])
    except (PtxError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    if not n_found:
        raise IndexError(number)
    return None


def outcomes(pattern, replacement, dtype, most=8, of="attention", **more):
    """Of each match in turn, in every launch that has so many."""
    found = []
    kwargs = {**LOOPING[of], "dtype": dtype, **more}
    while len(found) < most:
        try:
            found.append(outcome(of, kwargs, pattern, replacement, len(found)))
        except IndexError:
            break
    return found


BARRIER = r"bar\.sync\s+0;"


@pytest.mark.parametrize("of", JUDGES)
def test_dropped_barriers_are_caught(of):
    """All but one, before the output is rearranged: no access on its two sides meets."""
    found = compiling(outcomes, pattern=BARRIER, replacement="", dtype=torch.bfloat16, of=of)
    caught = [said for said in found if said is not None]
    assert len(found) >= 4 and len(caught) >= len(found) - 1, found
    assert all("race" in said or "asynchronous" in said for said in caught), caught


@pytest.mark.parametrize("of", JUDGES)
def test_dropped_waits_are_caught(of):
    pattern = r"cp\.async\.wait_group\s+\d+;"
    found = compiling(outcomes, pattern=pattern, replacement="", dtype=torch.bfloat16, of=of)
    assert found and "asynchronous" in str(found[0]), found
    assert all(said is not None for said in found), found


@pytest.mark.parametrize("of", JUDGES)
def test_a_wait_for_one_group_too_few_is_caught(of):
    found = compiling(
        outcomes,
        of=of,
        pattern=r"(cp\.async\.wait_group\s+)(\d+);",
        replacement=r"\g<1>9;",
        dtype=torch.bfloat16,
    )
    assert any("asynchronous" in str(said) for said in found), found


@pytest.mark.parametrize(
    ("pattern", "replacement", "caught_as"),
    [
        (r"setp\.lt\.s32(\s+%p\d+), ", r"setp.le.s32\1, ", "PtxError|values differ"),
        (r"mma\.sync[^;]*f16\.f32", None, "values differ"),
        (r"ex2\.approx\.ftz\.f32(\s+%r\d+), ", r"lg2.approx.ftz.f32\1, ", "values differ|NaN"),
    ],
    ids=["a comparison off by one", "a product left out", "another function"],
)
def test_a_wrong_instruction_is_caught(pattern, replacement, caught_as):
    if replacement is None:
        # The accumulator moves through as it was.
        pattern = (
            r"mma\.sync[^\n{]*\{ (%r\d+), (%r\d+), (%r\d+), (%r\d+) \}, \{[^}]*\}, \{[^}]*\}, "
            r"\{ (%r\d+), (%r\d+), (%r\d+), (%r\d+) \};"
        )
        replacement = "".join(f"mov.b32 \\{n}, \\{n + 4};" for n in (1, 2, 3, 4))
    # Query and key counts that fill no block, so that every bound matters.
    found = compiling(
        outcomes,
        pattern=pattern,
        replacement=replacement,
        dtype=torch.bfloat16,
        most=6,
        n_queries=61,
        n_keys=100,
    )
    caught = [said for said in found if said is not None]
    assert caught and all(re.search(caught_as, said) for said in caught), found
    if "mma" in pattern:
        assert len(caught) == len(found), found


def source_mistake(right, wrong, kwargs, of="attention", module="attention"):
    with mutated(module, right, wrong):
        executed(JUDGES[of], kwargs)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("key_pos < n_keys\n    # Pos", "key_pos <= n_keys\n    # Pos"),
        ("column[:, None] < n_keys", "column[:, None] <= n_keys"),
        ("mask=is_row[:, None] & is_channel[None, :],", "mask=is_channel[None, :],"),
        ("batch_head.to(tl.int64) * n_queries + row, lse", "batch_head.to(tl.int64) + row, lse"),
    ],
    ids=["past the keys", "past the values", "a store past the rows", "two blocks in one place"],
)
def test_an_index_that_is_off_is_caught(right, wrong):
    kwargs = {"n_queries": 63, "n_keys": 63, "heads": 2, "rule": "bidirectional"}
    with pytest.raises((PtxError, AssertionError), match="out-of-bounds|two blocks|values differ"):
        compiling(source_mistake, right=right, wrong=wrong, kwargs=kwargs)


SUFFIX_MISTAKES = {
    "a table read past its end": (
        "mask=is_key,\n            other=0,\n        ).to(tl.int64)",
        "mask=key_pos >= 0,\n            other=0,\n        ).to(tl.int64)",
        "out-of-bounds",
    ),
    "entries of the next tile": ("in_tile < n_entries", "in_tile < n_entries + 1", "out-of|blocks"),
    "rows in one place": ("written = out_row * n_heads + head", "written = out_row", "two blocks"),
    "no merge": ("tl.where(has_state, 1.0, 0.0)", "tl.where(has_state, 0.0, 0.0)", "values differ"),
    "a prefix one short": ("key_pos < high\n", "key_pos < high - LEAVES_STATE\n", "values differ"),
}


@pytest.mark.parametrize("mistake", SUFFIX_MISTAKES)
def test_a_mistake_of_the_suffix_kernel_is_caught(mistake):
    right, wrong, said = SUFFIX_MISTAKES[mistake]
    rule = "bidirectional" if mistake == "a table read past its end" else "causal"
    call = {"right": right, "wrong": wrong, "of": "suffix", "module": "suffix_attention"}
    with pytest.raises((PtxError, AssertionError), match=said):
        kwargs = {"starts": STARTS, "n_pos": 45, "rule": rule}
        compiling(source_mistake, **call, kwargs=kwargs)


def launch_elsewhere():
    """Compiled for strides divisible by 16, run with one that is not."""
    from fastlens.kernels.masks import AttentionRule
    from fastlens.kernels.triton_attention_lse import attention_lse
    from tests.gpu.ahead_of_time import TARGETS, assembly, compile_for
    from tests.gpu.ptx import run_ptx

    x = torch.randn(1, 64, 1, 64).bfloat16()
    rule = AttentionRule(8.0)
    (launch,) = launches_of(lambda: attention_lse(x, x, x, rule))
    odd = torch.randn(1, 64, 1, 65).bfloat16()[..., :64]
    (other,) = launches_of(lambda: attention_lse(odd, odd, odd, rule))
    compiled = compile_for(launch, TARGETS["sm_80"])
    names = [name for name, kind in launch.signature()[0].items() if kind != "constexpr"]
    arguments = [other.arguments[name] for name in names]
    n_threads = 32 * compiled.metadata.num_warps
    run_ptx(assembly(compiled), arguments, launch.grid, n_threads, compiled.metadata.shared)


def test_a_kernel_for_aligned_rows_on_others_is_caught():
    with pytest.raises(PtxError, match="misaligned 16-byte global"):
        compiling(launch_elsewhere)
