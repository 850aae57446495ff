import functools

import pytest
import torch
from torch import Tensor

from fastlens import HookedTransformer
from fastlens.cache import ActivationCache
from fastlens.errors import ConfigError, HookNameError, LayerError, ShapeError
from tests.close import assert_close_to
from tests.configs import tiny
from tests.test_decompose import LargestTensor

BATCH, POS = 2, 5


@functools.cache
def folded(name: str) -> tuple[HookedTransformer, Tensor, Tensor, dict[str, Tensor]]:
    """A float64 model without gains, its tokens, logits and activations."""
    norm = {"llama": "RMSPre", "no_norm": None}.get(name, "LNPre")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HookedTransformer(tiny(name, normalization_type=norm, dtype=torch.float64))
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        tokens = torch.randint(0, model.cfg.d_vocab, (BATCH, POS))
        logits, cache = model.run_with_cache(tokens)
    return model, tokens, logits.detach(), dict(cache.cache_dict)


def cache_of(name: str = "gpt2", *leave_out: str) -> ActivationCache:
    model, _, _, held = folded(name)
    return ActivationCache(
        {key: value for key, value in held.items() if not key.endswith(leave_out)}
        if leave_out
        else dict(held),
        model,
    )


def close(ours: Tensor, truth: Tensor) -> None:
    assert_close_to(ours, truth, atol=1e-10)


several = pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "attn_only", "no_norm"])


@several
def test_attributions_sum_to_the_logit(name):
    model, tokens, logits, _ = folded(name)
    cache = cache_of(name)
    logits = logits - model.b_U
    stack = cache.get_full_resid_decomposition()
    close(cache.logit_attrs(stack, 7).sum(0), logits[..., 7])
    close(cache.logit_attrs(stack, 7, 3).sum(0), logits[..., 7] - logits[..., 3])
    at_each = logits.gather(-1, tokens[..., None])[..., 0]
    close(cache.logit_attrs(stack, tokens).sum(0), at_each)
    a_prompt = logits.gather(-1, tokens[:, :1, None].expand(-1, POS, 1))[..., 0]
    close(cache.logit_attrs(stack, tokens[:, :1]).sum(0), a_prompt)
    last = cache.get_full_resid_decomposition(pos_slice=-1)
    close(cache.logit_attrs(last, tokens[:, 0], pos_slice=-1).sum(0), a_prompt[:, -1])
    one = cache.logit_attrs(stack, tokens[1], batch_slice=1)
    close(one.sum(0), at_each[1])
    some = cache.logit_attrs(stack, tokens[1:], batch_slice=(1, 2))
    close(some.sum(0), at_each[1:])


@several
def test_attribution_is_projection_onto_the_token(name):
    model = folded(name)[0]
    cache = cache_of(name)
    direction = model.tokens_to_residual_directions(7)
    whole = cache.logit_attrs(cache.get_full_resid_decomposition(), 7)
    projected = cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=direction)
    close(projected, whole)


@several
def test_the_logit_lens_ends_at_the_logits(name):
    model, _, logits, _ = folded(name)
    lens = cache_of(name).accumulated_resid(apply_ln=True) @ model.W_U + model.b_U
    close(lens[-1], logits)
    # Each row is normalised by itself, as if the model ended there.
    if model.cfg.normalization_type is not None:
        alone = model.unembed(model.ln_final(cache_of(name)["resid_pre", 1]))
        close(lens[1], alone)


@several
def test_everything_works_without_a_batch_axis(name):
    whole = cache_of(name)
    single = whole.apply_slice_to_batch_dim(1)
    alone = whole.apply_slice_to_batch_dim((1, 2)).remove_batch_dim()
    calls = {
        "accumulated_resid": {"apply_ln": True},
        "decompose_resid": {"apply_ln": True},
        "stack_head_results": {"apply_ln": True, "incl_remainder": True},
        "get_full_resid_decomposition": {"apply_ln": True},
    }
    for method, options in calls.items():
        for pos in (None, -1, (1, 3), [0, 2]):
            want = getattr(whole, method)(pos_slice=pos, **options)[:, 1]
            for cache in (single, alone):
                close(getattr(cache, method)(pos_slice=pos, **options), want)
    stack = single.decompose_resid()
    want = whole.logit_attrs(whole.decompose_resid(), 7)[:, 1]
    close(single.logit_attrs(stack, 7, has_batch_dim=False), want)


@pytest.mark.parametrize("flag", [True, False])
def test_head_results_are_computed_or_taken(flag):
    model, tokens, _, _ = folded("gpt2")
    names = ["blocks.0.attn.hook_result"] if flag else None
    _, cache = model.run_with_cache(tokens, names_filter=names)
    if flag:
        truth = cache["result", 0].movedim(-2, 0)
        close(cache.stack_head_results(1), truth)
        cache["result", 0][:, :, 1] = 0
        assert (cache.stack_head_results(1)[1] == 0).all()
    else:
        before = list(cache)
        rows = cache.stack_head_results(1)
        assert list(cache) == before
        cache.compute_head_results()
        assert list(cache)[len(before) :] == [f"blocks.{i}.attn.hook_result" for i in range(3)]
        close(cache["result", 0].movedim(-2, 0), rows)
        assert cache["result", 0].shape == (BATCH, POS, 4, 32)


def test_computing_head_results_again_says_so_and_keeps_edits(caplog):
    cache = cache_of()
    cache.compute_head_results()
    cache["result", 2].zero_()
    assert not caplog.text
    cache.compute_head_results()
    assert "already cached" in caplog.text
    assert (cache["result", 2] == 0).all()
    # A layer that is missing is computed, whatever layer 0 is.
    del cache.cache_dict["blocks.1.attn.hook_result"]
    cache.compute_head_results()
    assert cache["result", 1].abs().max() > 0 and (cache["result", 2] == 0).all()


def test_heads_follow_edits_of_z():
    cache = cache_of()
    cache.cache_dict["blocks.1.attn.hook_z"] = cache["z", 1].clone()
    cache["z", 1][:, :, 2] = 0
    rows, labels = cache.stack_head_results(2, return_labels=True)
    assert (rows[labels.index("L1H2")] == 0).all() and (rows[labels.index("L1H1")] != 0).all()


def test_labels_and_order():
    cache = cache_of()
    labels = cache.get_full_resid_decomposition(
        2, mlp_input=True, expand_neurons=False, return_labels=True
    )[1]
    heads = [f"L{i}H{h}" for i in range(3) for h in range(4)]
    assert labels == [*heads, "0_mlp_out", "1_mlp_out", "embed", "pos_embed", "bias"]
    labels = cache.accumulated_resid(1, incl_mid=True, mlp_input=True, return_labels=True)[1]
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid"]
    assert cache.accumulated_resid(return_labels=True)[1] == [
        "0_pre",
        "1_pre",
        "2_pre",
        "final_post",
    ]
    labels = cache.stack_neuron_results(2, neuron_slice=[5, 1], return_labels=True)[1]
    assert labels == ["L0N5", "L0N1", "L1N5", "L1N1"]
    labels = cache.stack_neuron_results(1, neuron_slice=-1, return_labels=True)[1]
    assert labels == ["L0N127"]


def test_neurons():
    cache = cache_of()
    W_out, post = cache.model.blocks[1].mlp.W_out, cache["post", 1]
    whole = cache.get_neuron_results(1)
    close(whole.sum(-2) + cache.model.blocks[1].mlp.b_out, cache["mlp_out", 1])
    close(cache.get_neuron_results(-2), whole)
    direction = torch.randn(32, 2, dtype=torch.float64)
    for chosen in (None, 3, (2, 9), [4, 1]):
        index = slice(*chosen) if isinstance(chosen, tuple) else chosen
        kept = whole if chosen is None else whole[:, :, index]
        for pos in (None, 2, (1, 3)):
            places = slice(*pos) if isinstance(pos, tuple) else slice(None) if pos is None else pos
            close(cache.get_neuron_results(1, chosen, pos), kept[:, places])
            for along in (direction, direction[:, 0]):
                close(cache.get_neuron_results(1, chosen, pos, along), kept[:, places] @ along)
    close(cache.stack_neuron_results(2, neuron_slice=3)[1], post[..., 3, None] * W_out[3])


def test_projected_neurons_never_have_d_model():
    cache = cache_of()
    model = cache.model
    d_mlp, direction = model.cfg.d_mlp, torch.randn(32, dtype=torch.float64)
    weights = d_mlp * 32
    with torch.no_grad(), LargestTensor() as seen:
        cache.stack_neuron_results(3, apply_ln=True, project_output_onto=direction)
        cache.get_neuron_results(0, project_output_onto=direction)
        cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=direction)
    assert seen.numel <= max(weights, (3 * d_mlp + 16) * BATCH * POS)
    assert seen.numel < d_mlp * 32 * BATCH * POS


def test_heads_never_have_d_head_and_d_model_together():
    cache = cache_of()
    with torch.no_grad(), LargestTensor() as seen:
        cache.stack_head_results()
    assert seen.numel <= 3 * 4 * BATCH * POS * 32


def test_gradients_reach_the_weights():
    cache = cache_of()
    model = cache.model
    direction = torch.randn(32, dtype=torch.float64)
    loss = cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=direction).sum()
    loss = loss + cache.logit_attrs(cache.stack_head_results(), 7).square().sum()
    grads = torch.autograd.grad(
        loss, [model.blocks[0].attn.W_O, model.blocks[1].mlp.W_out, model.W_U]
    )
    assert all(grad.abs().max() > 0 for grad in grads)


def test_apply_ln_to_stack_slices_the_batch_with_or_without_a_norm():
    for name in ("gpt2", "no_norm"):
        cache = cache_of(name)
        stack = cache.decompose_resid()
        whole = cache.apply_ln_to_stack(stack)
        for batch in (1, (0, 1), [1, 0]):
            index = slice(*batch) if isinstance(batch, tuple) else batch
            close(cache.apply_ln_to_stack(stack, batch_slice=batch), whole[:, index])


@pytest.mark.parametrize("shape", [(BATCH, POS), (BATCH,), (POS,), ()])
def test_recomputed_norms_take_any_places(shape):
    cache = cache_of()
    stack = torch.randn(4, *shape, 32, dtype=torch.float64)
    ours = cache.apply_ln_to_stack(stack, recompute_ln=True)
    truth = cache.model.ln_final(stack.reshape(1, -1, 32)).reshape(stack.shape)
    close(ours, truth)


def test_bfloat16_runs_are_attributed_in_float32():
    model = HookedTransformer(tiny("gpt2", normalization_type="LNPre", dtype=torch.bfloat16))
    tokens = torch.randint(0, 50, (BATCH, POS))
    logits, cache = model.run_with_cache(tokens)
    attributed = cache.logit_attrs(cache.get_full_resid_decomposition(), 7).sum(0)
    assert attributed.dtype == torch.float32
    assert_close_to(attributed, logits[..., 7] - model.b_U[7], atol=0.03)


def test_a_cache_of_some_positions_works_at_those():
    model, tokens, _, _ = folded("gpt2")
    whole = cache_of()
    _, cache = model.run_with_cache(tokens, pos_slice=(1, 3))
    for method in ("accumulated_resid", "stack_head_results", "get_full_resid_decomposition"):
        ours = getattr(cache, method)(apply_ln=True)
        close(ours, getattr(whole, method)(apply_ln=True, pos_slice=(1, 3)))


def test_missing_activations_name_method_and_place():
    cases = [
        (("hook_z",), lambda c: c.stack_head_results(), "stack_head_results", "attn.hook_z"),
        (("hook_mlp_out",), lambda c: c.decompose_resid(), "decompose_resid", "hook_mlp_out"),
        (("hook_scale",), lambda c: c.decompose_resid(apply_ln=True), "decompose_resid",
         "ln_final.hook_scale"),
        (("hook_scale",), lambda c: c.logit_attrs(c.decompose_resid(), 3), "logit_attrs",
         "ln_final.hook_scale"),
        (("hook_post",), lambda c: c.get_neuron_results(1), "get_neuron_results",
         "blocks.1.mlp.hook_post"),
        (("hook_resid_mid",), lambda c: c.accumulated_resid(incl_mid=True), "accumulated_resid",
         "blocks.0.hook_resid_mid"),
        (("hook_z",), lambda c: c.compute_head_results(), "compute_head_results", "hook_z"),
    ]  # fmt: skip
    for leave_out, act, method, place in cases:
        with pytest.raises(HookNameError, match=rf"{method}\(\) needs .*{place}") as caught:
            act(cache_of("gpt2", *leave_out))
        assert "names_filter" in str(caught.value)


def test_wrong_tokens_say_so():
    cache = cache_of()
    stack = cache.decompose_resid()
    with pytest.raises(ShapeError, match="same shape"):
        cache.logit_attrs(stack, 7, torch.tensor([1, 2]))
    with pytest.raises(ShapeError, match=r"\[batch, 1\]"):
        cache.logit_attrs(stack, torch.tensor([1, 2]))
    with pytest.raises(LayerError, match="none"):
        cache.stack_activation("q", 0)


def test_an_mlp_without_neurons_says_so():
    model = HookedTransformer(tiny("gpt2"))
    _, cache = model.run_with_cache(torch.randint(0, 50, (1, POS)))
    model.blocks[1].mlp = torch.nn.Identity()
    with pytest.raises(ConfigError, match="expand_neurons=False"):
        cache.stack_neuron_results(2)


def test_post_norms_are_not_passed_over_in_silence(caplog):
    model = HookedTransformer(tiny("post_norm"))
    _, cache = model.run_with_cache(torch.randint(0, 50, (1, POS)))
    cache.stack_head_results()
    cache.stack_neuron_results(1)
    assert caplog.text.count("before that norm") == 2
    caplog.clear()
    cache.get_full_resid_decomposition()
    assert not caplog.text
