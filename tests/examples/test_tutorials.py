"""Code in the manner of TransformerLens' tutorials: only the import differs.

Each workflow is written once, against the names a tutorial imports, and run with both libraries on
identical weights; what it computes must be the same.
"""

import importlib
import warnings
from functools import partial
from typing import Any

import pytest
import torch

from tests.configs import tiny
from tests.fixtures_tokens import gpt2_like, reloadable
from tests.models import randomise

pytestmark = pytest.mark.tl
CONFIGS = ("gpt2", "llama", "attn_only")
PROMPT, ANSWER, WRONG = "the cat in the can", " cat", " the"
CORRUPTED = "the cat an the can"


def library(name: str) -> Any:
    """The module whose names a tutorial imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
        # `from transformer_lens import utils` would import it.
        if name == "transformer_lens":
            importlib.import_module("transformer_lens.utils")
    return module


# -- the workflows -------------------------------------------------------------------------------


def attention_patterns(lens: Any, model: Any) -> Any:
    """The main demo's first steps: tokens, a cache, patterns by their short name."""
    tokens = model.to_tokens(PROMPT)
    logits, cache = model.run_with_cache(tokens, remove_batch_dim=True)
    pattern = cache["pattern", 0, "attn"]
    str_tokens = model.to_str_tokens(PROMPT)
    assert pattern.shape == (model.cfg.n_heads, len(str_tokens), len(str_tokens))
    named = lens.utils.get_act_name("pattern", 1)
    assert lens.utils.to_numpy(cache[named]).shape == pattern.shape
    loss = model(tokens, return_type="loss")
    return [logits, pattern, cache[named], loss, model.to_string(logits.argmax(dim=-1)[0])]


def ablate_a_head(lens: Any, model: Any) -> Any:
    """The main demo's hook: zero one head's value vectors and look at the loss."""
    layer_to_ablate, head_index_to_ablate = 0, 1
    tokens = model.to_tokens(PROMPT)

    def head_ablation_hook(value, hook):
        value[:, :, head_index_to_ablate, :] = 0.0
        return value

    original_loss = model(tokens, return_type="loss")
    ablated_loss = model.run_with_hooks(
        tokens,
        return_type="loss",
        fwd_hooks=[(lens.utils.get_act_name("z", layer_to_ablate), head_ablation_hook)],
    )
    assert ablated_loss != original_loss
    return [original_loss, ablated_loss]


def patch_the_residual_stream(lens: Any, model: Any) -> Any:
    """Activation patching, one run_with_hooks for each layer and position."""
    clean_tokens, corrupted_tokens = model.to_tokens(PROMPT), model.to_tokens(CORRUPTED)
    answer_token, wrong_token = model.to_single_token(ANSWER), model.to_single_token(WRONG)

    def logits_to_logit_diff(logits):
        return logits[0, -1, answer_token] - logits[0, -1, wrong_token]

    clean_logits, clean_cache = model.run_with_cache(clean_tokens)
    corrupted_logits = model(corrupted_tokens)
    gap = logits_to_logit_diff(clean_logits) - logits_to_logit_diff(corrupted_logits)

    def residual_stream_patching_hook(resid_pre, hook, position):
        clean_resid_pre = clean_cache[hook.name]
        resid_pre[:, position, :] = clean_resid_pre[:, position, :]
        return resid_pre

    num_positions = len(clean_tokens[0])
    result = torch.zeros((model.cfg.n_layers, num_positions), device=model.cfg.device)
    for layer in range(model.cfg.n_layers):
        for position in range(num_positions):
            temp_hook_fn = partial(residual_stream_patching_hook, position=position)
            patched_logits = model.run_with_hooks(
                corrupted_tokens,
                fwd_hooks=[(lens.utils.get_act_name("resid_pre", layer), temp_hook_fn)],
            )
            patched = logits_to_logit_diff(patched_logits).detach()
            result[layer, position] = (patched - logits_to_logit_diff(corrupted_logits)) / gap
    # Same tokens before the one that differs: nothing to restore there.
    assert result[0, 0] == 0.0 and result.abs().max() > 0.01
    return [result]


def attribute_the_logit_difference(lens: Any, model: Any) -> Any:
    """The IOI exploration: which part of the stream writes the answer."""
    prompts = [PROMPT, CORRUPTED]
    answers = [(ANSWER, WRONG), (WRONG, ANSWER)]
    tokens = model.to_tokens(prompts, prepend_bos=True)
    answer_tokens = torch.tensor([[model.to_single_token(t) for t in pair] for pair in answers])
    original_logits, cache = model.run_with_cache(tokens)

    final_logits = original_logits[:, -1, :]
    answer_logits = final_logits.gather(dim=-1, index=answer_tokens)
    original_average = (answer_logits[:, 0] - answer_logits[:, 1]).mean()

    answer_residual_directions = model.tokens_to_residual_directions(answer_tokens)
    logit_diff_directions = answer_residual_directions[:, 0] - answer_residual_directions[:, 1]

    def residual_stack_to_logit_diff(residual_stack, cache):
        scaled = cache.apply_ln_to_stack(residual_stack, layer=-1, pos_slice=-1)
        product = torch.einsum("...bd,bd->...", scaled, logit_diff_directions)
        return product / len(prompts)

    accumulated, labels = cache.accumulated_resid(
        layer=-1, incl_mid=not model.cfg.attn_only, pos_slice=-1, return_labels=True
    )
    logit_lens = residual_stack_to_logit_diff(accumulated, cache)
    per_layer, names = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
    per_layer_diffs = residual_stack_to_logit_diff(per_layer, cache)
    per_head, head_names = cache.stack_head_results(layer=-1, pos_slice=-1, return_labels=True)
    per_head_diffs = residual_stack_to_logit_diff(per_head, cache)
    per_head_grid = per_head_diffs.reshape(model.cfg.n_layers, model.cfg.n_heads)
    attributed = cache.logit_attrs(
        per_head, answer_tokens[:, 0], incorrect_tokens=answer_tokens[:, 1], pos_slice=-1
    )
    return [
        *(original_average, labels, logit_lens, names, per_layer_diffs),
        *(head_names, per_head_grid, attributed),
    ]


def find_induction_heads(lens: Any, model: Any) -> Any:
    """Induction scores on repeated random tokens, read by a hook on every pattern."""
    batch_size, seq_len = 3, 12
    generator = torch.Generator().manual_seed(0)
    random_tokens = torch.randint(5, 50, (batch_size, seq_len), generator=generator)
    repeated_tokens = torch.cat([random_tokens, random_tokens], dim=1).to(model.cfg.device)
    induction_score_store = torch.zeros((model.cfg.n_layers, model.cfg.n_heads))

    def induction_score_hook(pattern, hook):
        induction_stripe = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - seq_len)
        induction_score_store[hook.layer(), :] = induction_stripe.mean(dim=(0, -1))

    pattern_hook_names_filter = lambda name: name.endswith("pattern")  # noqa: E731
    model.run_with_hooks(
        repeated_tokens,
        return_type=None,
        fwd_hooks=[(pattern_hook_names_filter, induction_score_hook)],
    )
    repeated_loss = model(repeated_tokens, return_type="loss", loss_per_token=True)
    return [induction_score_store, repeated_loss]


def read_the_weights(lens: Any, model: Any) -> Any:
    """Factored matrices, and the copying score of each head's OV circuit."""
    OV = model.OV
    assert isinstance(OV, lens.FactoredMatrix)
    full = model.W_E @ OV[0, 1] @ model.W_U
    copying = OV.norm(), model.QK.norm()
    eigenvalues = full.eigenvalues
    return [
        full.AB,
        *copying,
        eigenvalues.real.sum(),
        eigenvalues.imag.abs().sum(),
        model.W_E.norm(),
    ]


def cache_gradients(lens: Any, model: Any) -> Any:
    """Attribution patching's first half: activations and gradients by caching hooks."""
    model.reset_hooks()
    cache: dict[str, torch.Tensor] = {}
    grad_cache: dict[str, torch.Tensor] = {}

    def forward_cache_hook(act, hook):
        cache[hook.name] = act.detach()

    def backward_cache_hook(grad, hook):
        grad_cache[hook.name] = grad.detach()

    def is_stream(name):
        return "resid" in name

    model.add_hook(is_stream, forward_cache_hook, "fwd")
    model.add_hook(is_stream, backward_cache_hook, "bwd")
    model(PROMPT, return_type="loss").backward()
    model.reset_hooks()
    kept = lens.ActivationCache(cache, model)
    return [kept["resid_post", -1], *(cache[n] * grad_cache[n] for n in sorted(cache))]


WORKFLOWS = [
    attention_patterns,
    ablate_a_head,
    patch_the_residual_stream,
    attribute_the_logit_difference,
    find_induction_heads,
    read_the_weights,
    cache_gradients,
]


# -- both libraries ------------------------------------------------------------------------------


def result_of(workflow: Any, config: str, lens: Any, tokenizer: Any) -> list[Any]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = lens.HookedTransformerConfig(**tiny(config, d_vocab=len(tokenizer)))
        model = lens.HookedTransformer(cfg, tokenizer=tokenizer)
        randomise(model)
        return workflow(lens, model)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda w: w.__name__)
def test_only_the_import_differs(workflow, config, tmp_path):
    pytest.importorskip("transformer_lens")
    tokenizer = reloadable(gpt2_like(), tmp_path)
    ours = result_of(workflow, config, library("fastlens"), tokenizer)
    theirs = result_of(workflow, config, library("transformer_lens"), tokenizer)
    assert len(ours) == len(theirs)
    for mine, their in zip(ours, theirs, strict=True):
        if isinstance(mine, torch.Tensor):
            scale = max(1.0, their.abs().max().item())
            assert mine.shape == their.shape
            assert (mine - their).abs().max().item() <= 2e-5 * scale
        else:
            assert mine == their
