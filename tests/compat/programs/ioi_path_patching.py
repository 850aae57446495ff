"""The IOI exercises in ARENA's style: attribution, patching, path patching, a minimal circuit."""

import itertools
from functools import partial
from typing import Callable, Literal

import einops
import torch as t
from jaxtyping import Float, Int
from reporting import folder, report
from torch import Tensor
from transformers import AutoTokenizer

import transformer_lens.patching as patching
from transformer_lens import ActivationCache, HookedTransformer, HookedTransformerConfig, utils
from transformer_lens.hook_points import HookPoint

t.set_grad_enabled(False)
tokenizer = AutoTokenizer.from_pretrained(folder() / "toy")
cfg = HookedTransformerConfig(
    n_layers=3, d_model=48, n_ctx=64, d_head=12, n_heads=4, d_mlp=96, act_fn="gelu_new",
    d_vocab=100, seed=3, initializer_range=0.15,
)  # fmt: skip
model = HookedTransformer(cfg, tokenizer=tokenizer)
model.set_use_split_qkv_input(True)
model.set_use_attn_result(True)

prompts = ["ann gave bob a cup so bob", "ann gave bob a cup so ann", "tom saw kim run on so kim"]
answers = [(" a", " b"), (" b", " a"), (" t", " k")]
clean_tokens = model.to_tokens(prompts, prepend_bos=True)
flipped = clean_tokens[[1, 0, 2]].clone()
flipped[2, 1:4] = clean_tokens[2, 9:12]
answer_tokens = t.tensor([[model.to_tokens(s)[0, -1].item() for s in pair] for pair in answers])
report("tokens", clean_tokens)


def logits_to_ave_logit_diff(
    logits: Float[Tensor, "batch seq d_vocab"],
    answer_tokens: Int[Tensor, "batch 2"] = answer_tokens,
    per_prompt: bool = False,
):
    final_logits = logits[:, -1, :]
    answer_logits = final_logits.gather(dim=-1, index=answer_tokens)
    correct, incorrect = answer_logits.unbind(dim=-1)
    answer_logit_diff = correct - incorrect
    return answer_logit_diff if per_prompt else answer_logit_diff.mean()


clean_logits, clean_cache = model.run_with_cache(clean_tokens)
corrupted_logits, corrupted_cache = model.run_with_cache(flipped)
clean_diff = logits_to_ave_logit_diff(clean_logits)
corrupted_diff = logits_to_ave_logit_diff(corrupted_logits)
report("logit differences", [clean_diff.item(), corrupted_diff.item()])

# --- direct logit attribution -------------------------------------------------------------------
answer_residual_directions = model.tokens_to_residual_directions(answer_tokens)
correct_dirs, incorrect_dirs = answer_residual_directions.unbind(dim=1)
logit_diff_directions = correct_dirs - incorrect_dirs


def residual_stack_to_logit_diff(residual_stack, cache: ActivationCache) -> Tensor:
    batch_size = residual_stack.size(-2)
    scaled = cache.apply_ln_to_stack(residual_stack, layer=-1, pos_slice=-1)
    return (
        einops.einsum(scaled, logit_diff_directions, "... batch d_model, batch d_model -> ...")
        / batch_size
    )


accumulated, labels = clean_cache.accumulated_resid(
    layer=-1, incl_mid=True, pos_slice=-1, return_labels=True
)
report("logit lens labels", labels)
report("logit lens", residual_stack_to_logit_diff(accumulated, clean_cache))
per_layer, labels = clean_cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
report("per layer labels", labels)
report("per layer", residual_stack_to_logit_diff(per_layer, clean_cache))
per_head, labels = clean_cache.stack_head_results(layer=-1, pos_slice=-1, return_labels=True)
report("per head labels", labels)
report(
    "per head",
    einops.rearrange(residual_stack_to_logit_diff(per_head, clean_cache), "(l h) -> l h", l=3),
)
report("attribution", clean_cache.logit_attrs(per_layer, answer_tokens[:, 0], pos_slice=-1,
                                              incorrect_tokens=answer_tokens[:, 1]))  # fmt: skip

# --- activation patching ------------------------------------------------------------------------


def ioi_metric(logits: Float[Tensor, "batch seq d_vocab"]) -> Float[Tensor, ""]:
    patched = logits_to_ave_logit_diff(logits)
    return (patched - corrupted_diff) / (clean_diff - corrupted_diff)


for name in (
    "resid_pre", "attn_out", "mlp_out", "attn_head_out_by_pos", "attn_head_out_all_pos",
    "attn_head_v_all_pos", "attn_head_pattern_all_pos", "attn_head_all_pos_every",
):  # fmt: skip
    function = getattr(patching, f"get_act_patch_{name}")
    report(f"get_act_patch_{name}", function(model, flipped, clean_cache, ioi_metric))


def patch_head_vector(corrupted_head_vector, hook: HookPoint, head_index: int, clean_cache):
    corrupted_head_vector[:, :, head_index] = clean_cache[hook.name][:, :, head_index]
    return corrupted_head_vector


by_hand = t.zeros(3, 4)
for layer, head in itertools.product(range(3), range(4)):
    hook_fn = partial(patch_head_vector, head_index=head, clean_cache=clean_cache)
    patched = model.run_with_hooks(
        flipped, fwd_hooks=[(utils.get_act_name("z", layer), hook_fn)], return_type="logits"
    )
    by_hand[layer, head] = ioi_metric(patched)
report("heads by hand", by_hand)

# --- path patching ------------------------------------------------------------------------------


def patch_or_freeze_head_vectors(
    orig_head_vector, hook: HookPoint, new_cache, orig_cache, head_to_patch: tuple[int, int]
):
    orig_head_vector[...] = orig_cache[hook.name][...]
    if head_to_patch[0] == hook.layer():
        orig_head_vector[:, :, head_to_patch[1]] = new_cache[hook.name][:, :, head_to_patch[1]]
    return orig_head_vector


def get_path_patch_head_to_final_resid_post(model, patching_metric, new_cache, orig_cache):
    model.reset_hooks()
    results = t.zeros(model.cfg.n_layers, model.cfg.n_heads)
    resid_post_hook_name = utils.get_act_name("resid_post", model.cfg.n_layers - 1)
    resid_post_name_filter = lambda name: name == resid_post_hook_name  # noqa: E731
    for sender_layer, sender_head in itertools.product(range(3), range(4)):
        hook_fn = partial(
            patch_or_freeze_head_vectors, new_cache=new_cache, orig_cache=orig_cache,
            head_to_patch=(sender_layer, sender_head),
        )  # fmt: skip
        model.add_hook(lambda name: name.endswith("z"), hook_fn)
        _, patched_cache = model.run_with_cache(
            clean_tokens, names_filter=resid_post_name_filter, return_type=None
        )
        model.reset_hooks()
        patched_logits = model.unembed(model.ln_final(patched_cache[resid_post_hook_name]))
        results[sender_layer, sender_head] = patching_metric(patched_logits)
    return results


report(
    "paths to the end",
    get_path_patch_head_to_final_resid_post(model, ioi_metric, corrupted_cache, clean_cache),
)


def patch_head_input(orig_activation, hook: HookPoint, patched_cache, head_list):
    heads_to_patch = [head for layer, head in head_list if layer == hook.layer()]
    orig_activation[:, :, heads_to_patch] = patched_cache[hook.name][:, :, heads_to_patch]
    return orig_activation


def get_path_patch_head_to_heads(
    receiver_heads: list[tuple[int, int]],
    receiver_input: Literal["q", "k", "v"],
    model: HookedTransformer,
    patching_metric: Callable,
    new_cache: ActivationCache,
    orig_cache: ActivationCache,
) -> Float[Tensor, "layer head"]:
    model.reset_hooks()
    receiver_layers = set(next(zip(*receiver_heads, strict=True)))
    names = [utils.get_act_name(receiver_input, layer) for layer in receiver_layers]
    is_receiver = lambda name: name in names  # noqa: E731
    results = t.zeros(max(receiver_layers), model.cfg.n_heads)
    for sender_layer, sender_head in itertools.product(range(max(receiver_layers)), range(4)):
        hook_fn = partial(
            patch_or_freeze_head_vectors, new_cache=new_cache, orig_cache=orig_cache,
            head_to_patch=(sender_layer, sender_head),
        )  # fmt: skip
        model.add_hook(lambda name: name.endswith("z"), hook_fn, level=1)
        _, patched_cache = model.run_with_cache(
            clean_tokens, names_filter=is_receiver, return_type=None
        )
        model.reset_hooks(including_permanent=True)
        hook_fn = partial(patch_head_input, patched_cache=patched_cache, head_list=receiver_heads)
        patched_logits = model.run_with_hooks(
            clean_tokens, fwd_hooks=[(is_receiver, hook_fn)], return_type="logits"
        )
        results[sender_layer, sender_head] = patching_metric(patched_logits)
    return results


for receiver_input in ("q", "k", "v"):
    scores = get_path_patch_head_to_heads(
        [(2, 1), (2, 3), (1, 0)], receiver_input, model, ioi_metric, corrupted_cache, clean_cache
    )
    report(f"paths to {receiver_input}", scores)

# --- a minimal circuit, everything else at its mean ---------------------------------------------
CIRCUIT = [(0, 1), (1, 2), (2, 0), (2, 3)]


def hook_fn_mask_z(z, hook: HookPoint, kept, means):
    mask = t.zeros(1, 1, z.shape[2], 1, dtype=t.bool)
    mask[:, :, kept[hook.layer()]] = True
    return t.where(mask, z, means[hook.layer()])


def add_mean_ablation_hook(model: HookedTransformer, is_permanent: bool = True):
    model.reset_hooks(including_permanent=True)
    _, means_cache = model.run_with_cache(
        flipped, return_type=None, names_filter=lambda name: name.endswith("z")
    )
    means = [means_cache["z", layer].mean(0, keepdim=True) for layer in range(3)]
    kept = {layer: [h for at, h in CIRCUIT if at == layer] for layer in range(3)}
    hook_fn = partial(hook_fn_mask_z, kept=kept, means=means)
    model.add_hook(lambda name: name.endswith("z"), hook_fn, is_permanent=is_permanent)
    return model


model = add_mean_ablation_hook(model)
report("the circuit alone", logits_to_ave_logit_diff(model(clean_tokens), per_prompt=True))
model.reset_hooks()
report("still", logits_to_ave_logit_diff(model(clean_tokens), per_prompt=True))
model.reset_hooks(including_permanent=True)
report("whole again", logits_to_ave_logit_diff(model(clean_tokens), per_prompt=True))
