"""Run under an interpreter that has transformer-lens 4 (`test_transformer_lens_4.py` does).

A fastlens model is given to TransformerLens 4's own patching, head detector, SVD interpreter and
activation cache; what they find must be what fastlens' own functions find. Prints a line for each.
"""

import inspect
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from transformer_lens import head_detector as their_detector
from transformer_lens import patching as theirs
from transformer_lens.ActivationCache import ActivationCache as TheirCache
from transformer_lens.model_protocol import (
    TrainableTransformerLensModel,
    TransformerLensModel,
    TransformerLensModelWithWeights,
)
from transformer_lens.SVDInterpreter import SVDInterpreter as TheirSVD

from fastlens import ActivationCache, HookedTransformer, patching
from fastlens.analysis.head_detector import detect_head
from fastlens.analysis.svd_interpreter import SVDInterpreter
from tests.close import assert_close_to
from tests.models import ours as tiny_model
from tests.models import prompts

FAMILIES = ("gpt2", "llama", "neox", "attn_only")
PROTOCOLS = (TransformerLensModel, TrainableTransformerLensModel, TransformerLensModelWithWeights)
OF_ALL_MODELS = (
    "get_act_patch_resid_pre", "get_act_patch_attn_out",
    "get_act_patch_attn_head_out_by_pos", "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_k_by_pos", "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_head_pattern_by_pos", "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_out_all_pos", "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_k_all_pos", "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_pattern_all_pos", "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
)  # fmt: skip
OF_MODELS_WITH_MLPS = ("get_act_patch_mlp_out", "get_act_patch_block_every")
# Unset arguments; the result's first axis is the component.
CACHE_CALLS: dict[str, dict[str, Any]] = {
    "accumulated_resid": {"apply_ln": True},
    "decompose_resid": {"apply_ln": True},
    "stack_head_results": {"incl_remainder": True},
    "get_full_resid_decomposition": {"expand_neurons": False},
    "stack_activation": {"activation_name": "z"},
}


def metric(logits: Any) -> Any:
    """A logit difference at the last position."""
    return (logits[:, -1, 3] - logits[:, -1, 7]).mean()


def said(what: str) -> None:
    """One more thing agrees."""
    sys.stdout.write(f"ok {what}\n")


def members_of(protocol: Any) -> dict[str, str]:
    """What a protocol asks for: name -> signature, or ``property``."""
    found = {}
    for cls in reversed(protocol.__mro__[:-1]):
        for name, member in vars(cls).items():
            if isinstance(member, property):
                found[name] = "property"
            elif callable(member) and (name == "__call__" or not name.startswith("_")):
                parameters = inspect.signature(member).parameters.values()
                found[name] = ", ".join(str(one).split(":")[0] for one in parameters)
    return found


def check_patching(name: str) -> None:
    """Every ``get_act_patch`` function, ours and theirs, on one model of ours."""
    model = tiny_model(name)
    clean, corrupted = prompts(2, 6, seed=1), prompts(2, 6, seed=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        functions = OF_ALL_MODELS + (() if model.cfg.attn_only else OF_MODELS_WITH_MLPS)
        functions = (*functions, *(("get_act_patch_resid_mid",) if name == "gpt2" else ()))
        for function in functions:
            want = getattr(theirs, function)(
                model, corrupted, TheirCache(cache.cache_dict, model), metric
            )
            got = getattr(patching, function)(model, corrupted, cache, metric)
            assert_close_to(got, want, atol=2e-5, name=f"{name} {function}")
            said(f"patching.{function} {name}")


def check_cache(name: str) -> None:
    """Methods of their cache over a run of ours, against our cache's."""
    model, tokens = tiny_model(name), prompts(2, 6)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        their_cache = TheirCache(cache.cache_dict, model)
        for method, arguments in CACHE_CALLS.items():
            if method == "get_full_resid_decomposition" and model.cfg.attn_only:
                continue  # theirs asks for MLPs
            want = getattr(their_cache, method)(**arguments)
            got = getattr(cache, method)(**arguments)
            assert_close_to(got, want, atol=2e-5, name=f"{name} {method}")
            said(f"ActivationCache.{method} {name}")
        stack = cache.decompose_resid()
        for answer in (5, tokens):
            want = their_cache.logit_attrs(stack, answer)
            assert_close_to(cache.logit_attrs(stack, answer), want, atol=2e-5)
        said(f"ActivationCache.logit_attrs {name}")
        if not model.cfg.attn_only:
            want = their_cache.stack_neuron_results(-1, apply_ln=True)
            assert_close_to(cache.stack_neuron_results(-1, apply_ln=True), want, atol=2e-5)
            said(f"ActivationCache.stack_neuron_results {name}")


def check_detector() -> None:
    """`detect_head` on text."""
    model = HookedTransformer.from_pretrained("toy-induction", device="cpu", verbose=False)
    for kind in ("previous_token_head", "duplicate_token_head", "induction_head"):
        for error_measure in ("mul", "abs"):
            options = {"error_measure": error_measure, "exclude_bos": True}
            want = their_detector.detect_head(model, "abcdabcd", kind, **options)
            got = detect_head(model, "abcdabcd", kind, **options)
            assert_close_to(got, want, atol=1e-5, name=f"{kind} {error_measure}")
            said(f"head_detector.detect_head {kind} {error_measure}")


def check_svd() -> None:
    """Singular vectors, up to their sign."""
    model = tiny_model("gpt2")
    for kind, head in (("OV", 1), ("w_in", None), ("w_out", None)):
        want = TheirSVD(model).get_singular_vectors(kind, 1, 3, head)
        got = SVDInterpreter(model).get_singular_vectors(kind, 1, 3, head)
        sign = (want * got).sum(0, keepdim=True).sign()
        assert_close_to(got * sign, want, atol=1e-4, name=kind)
        said(f"SVDInterpreter {kind}")


def main() -> None:
    """Everything."""
    assert version("transformer-lens").startswith("4."), version("transformer-lens")
    torch.set_num_threads(1)
    members = json.dumps({one.__name__: members_of(one) for one in PROTOCOLS})
    sys.stdout.write(f"members {members}\n")
    for name in (*FAMILIES, "no_norm"):
        model = tiny_model(name)
        for protocol in PROTOCOLS[: 2 if name == "no_norm" else 3]:
            assert isinstance(model, protocol), (name, protocol)
        said(f"model_protocol {name}")
    assert ActivationCache is not TheirCache
    for name in FAMILIES:
        check_patching(name)
        check_cache(name)
    check_detector()
    check_svd()
    said("done")


if __name__ == "__main__":
    main()
