"""Finding and reverse-engineering induction heads, in the way the ARENA exercises teach it.

Written for TransformerLens; it imports nothing else of its kind.
"""

import functools
import json

import einops
import torch as t
from jaxtyping import Float, Int
from reporting import folder, report
from torch import Tensor
from transformers import AutoTokenizer

from transformer_lens import (
    ActivationCache,
    FactoredMatrix,
    HookedTransformer,
    HookedTransformerConfig,
    utils,
)
from transformer_lens.hook_points import HookPoint

t.set_grad_enabled(False)
device = t.device("cpu")

cfg = HookedTransformerConfig(
    d_model=64,
    d_head=16,
    n_heads=4,
    n_layers=2,
    n_ctx=128,
    d_vocab=100,
    attention_dir="causal",
    attn_only=True,
    seed=398,
    use_attn_result=True,
    normalization_type="LN",
    positional_embedding_type="standard",
)
tokenizer = AutoTokenizer.from_pretrained(folder() / "toy")
model = HookedTransformer(cfg, tokenizer=tokenizer)
pretrained_weights = t.load(folder() / "toy" / "weights.pt", map_location=device, weights_only=True)
model.load_state_dict(pretrained_weights, strict=False)

# --- a first look -------------------------------------------------------------------------------
text = "the cat sat on the mat and the cat sat"
logits, cache = model.run_with_cache(text, remove_batch_dim=True)
str_tokens = model.to_str_tokens(text)
report("str_tokens", str_tokens)
report("cache names", list(cache.keys()))
report("pattern of layer 0", cache["pattern", 0])
layer0_pattern_from_cache = cache["pattern", 0]
q, k = cache["q", 0], cache["k", 0]
seq, nhead, headsize = q.shape
layer0_attn_scores = einops.einsum(q, k, "seqQ n h, seqK n h -> n seqQ seqK")
mask = t.triu(t.ones((seq, seq), dtype=t.bool), diagonal=1)
layer0_attn_scores.masked_fill_(mask, -1e9)
layer0_pattern_from_q_and_k = (layer0_attn_scores / headsize**0.5).softmax(-1)
t.testing.assert_close(layer0_pattern_from_cache, layer0_pattern_from_q_and_k)


def head_with(score_at) -> list[str]:
    found = []
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            if score_at(cache["pattern", layer][head]) > 0.4:
                found.append(f"{layer}.{head}")
    return found


report("current", head_with(lambda pattern: pattern.diagonal().mean()))
report("previous", head_with(lambda pattern: pattern.diagonal(-1).mean()))
report("first", head_with(lambda pattern: pattern[:, 0].mean()))

# --- repeated tokens ----------------------------------------------------------------------------


def generate_repeated_tokens(
    model: HookedTransformer, seq_len: int, batch_size: int = 1
) -> Int[Tensor, "batch_size full_seq_len"]:
    t.manual_seed(0)
    prefix = (t.ones(batch_size, 1) * model.tokenizer.bos_token_id).long()
    rep_tokens_half = t.randint(4, model.cfg.d_vocab, (batch_size, seq_len), dtype=t.int64)
    return t.cat([prefix, rep_tokens_half, rep_tokens_half], dim=-1).to(device)


def run_and_cache_model_repeated_tokens(
    model: HookedTransformer, seq_len: int, batch_size: int = 1
) -> tuple[Tensor, Tensor, ActivationCache]:
    rep_tokens = generate_repeated_tokens(model, seq_len, batch_size)
    rep_logits, rep_cache = model.run_with_cache(rep_tokens)
    return rep_tokens, rep_logits, rep_cache


def get_log_probs(logits: Float[Tensor, "b s v"], tokens: Int[Tensor, "b s"]) -> Tensor:
    logprobs = logits.log_softmax(dim=-1)
    return logprobs[:, :-1].gather(dim=-1, index=tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


seq_len = 30
rep_tokens, rep_logits, rep_cache = run_and_cache_model_repeated_tokens(model, seq_len)
rep_cache.remove_batch_dim()
log_probs = get_log_probs(rep_logits, rep_tokens).squeeze()
report("first half", log_probs[:seq_len].mean())
report("second half", log_probs[seq_len:].mean())
report("loss per token", model(rep_tokens, return_type="loss", loss_per_token=True))

induction_score_store = t.zeros((model.cfg.n_layers, model.cfg.n_heads))


def induction_score_hook(pattern: Float[Tensor, "batch head q k"], hook: HookPoint) -> None:
    induction_stripe = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - seq_len)
    induction_score_store[hook.layer(), :] = induction_stripe.mean(dim=(0, -1))


pattern_hook_names_filter = lambda name: name.endswith("pattern")  # noqa: E731
rep_tokens_10 = generate_repeated_tokens(model, seq_len, batch_size=10)
model.run_with_hooks(
    rep_tokens_10,
    return_type=None,
    fwd_hooks=[(pattern_hook_names_filter, induction_score_hook)],
)
report("induction scores", induction_score_store)

# --- logit attribution --------------------------------------------------------------------------


def logit_attribution(
    embed: Float[Tensor, "seq d_model"],
    l1_results: Float[Tensor, "seq nheads d_model"],
    l2_results: Float[Tensor, "seq nheads d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    tokens: Int[Tensor, " seq"],
) -> Float[Tensor, "seq-1 n_components"]:
    W_U_correct_tokens = W_U[:, tokens[1:]]
    direct = einops.einsum(W_U_correct_tokens, embed[:-1], "emb seq, seq emb -> seq")
    l1 = einops.einsum(W_U_correct_tokens, l1_results[:-1], "emb seq, seq nhead emb -> seq nhead")
    l2 = einops.einsum(W_U_correct_tokens, l2_results[:-1], "emb seq, seq nhead emb -> seq nhead")
    return t.concat([direct.unsqueeze(-1), l1, l2], dim=-1)


embed = rep_cache["embed"] + rep_cache["pos_embed"]
attribution = logit_attribution(
    embed, rep_cache["result", 0], rep_cache["result", 1], model.W_U, rep_tokens[0]
)
report("logit attribution", attribution)

# --- ablations ----------------------------------------------------------------------------------


def head_zero_ablation_hook(z: Float[Tensor, "b s n h"], hook: HookPoint, head: int) -> None:
    z[:, :, head, :] = 0.0


def head_mean_ablation_hook(z: Float[Tensor, "b s n h"], hook: HookPoint, head: int) -> None:
    z[:, :, head, :] = z[:, :, head, :].mean(0)


def get_ablation_scores(model: HookedTransformer, tokens: Tensor, ablation_function) -> Tensor:
    scores = t.zeros((model.cfg.n_layers, model.cfg.n_heads))
    model.reset_hooks()
    loss_no_ablation = -get_log_probs(model(tokens), tokens)[:, -(seq_len - 1) :].mean()
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            temp_hook_fn = functools.partial(ablation_function, head=head)
            ablated_logits = model.run_with_hooks(
                tokens, fwd_hooks=[(utils.get_act_name("z", layer), temp_hook_fn)]
            )
            loss = -get_log_probs(ablated_logits, tokens)[:, -(seq_len - 1) :].mean()
            scores[layer, head] = loss - loss_no_ablation
    return scores


report("zero ablation", get_ablation_scores(model, rep_tokens_10, head_zero_ablation_hook))
report("mean ablation", get_ablation_scores(model, rep_tokens_10, head_mean_ablation_hook))

# --- circuits as factored matrices --------------------------------------------------------------
A, B = t.randn(5, 2, generator=t.Generator().manual_seed(0)), t.ones(2, 5)
AB_factor = FactoredMatrix(A, B)
report("norm", AB_factor.norm())
report("right dimension", AB_factor.rdim)
report("singular values", AB_factor.svd()[1])
report("eigenvalues", AB_factor.eigenvalues.abs().sort()[0])

head_index, layer = 1, 1
W_O, W_V = model.W_O[layer, head_index], model.W_V[layer, head_index]
full_OV_circuit = model.W_E @ FactoredMatrix(W_V, W_O) @ model.W_U
report("ov sample", full_OV_circuit[10:14, 10:14].AB)


def top_1_acc(full_OV_circuit: FactoredMatrix, batch_size: int = 40) -> float:
    total = 0
    for indices in t.split(t.arange(full_OV_circuit.shape[0], device=device), batch_size):
        AB_slice = full_OV_circuit[indices].AB
        total += (t.argmax(AB_slice, dim=1) == indices).float().sum().item()
    return total / full_OV_circuit.shape[0]


report("top-1", top_1_acc(full_OV_circuit))
W_O_both = einops.rearrange(model.W_O[1, [0, 2]], "head d_head d_model -> (head d_head) d_model")
W_V_both = einops.rearrange(model.W_V[1, [0, 2]], "head d_model d_head -> d_model (head d_head)")
W_OV_eff = model.W_E @ FactoredMatrix(W_V_both, W_O_both) @ model.W_U
report("top-1 of two heads", top_1_acc(W_OV_eff))

W_QK = model.W_Q[0, 3] @ model.W_K[0, 3].T
pos_by_pos_scores = model.W_pos @ W_QK @ model.W_pos.T
masked = t.tril(pos_by_pos_scores / model.cfg.d_head**0.5)[:40, :40]
report("previous-token circuit", masked.diagonal(-1))


def decompose_qk_input(cache: ActivationCache) -> Float[Tensor, "n_heads+2 posn d_model"]:
    y0 = cache["embed"].unsqueeze(0)
    y1 = cache["pos_embed"].unsqueeze(0)
    y_rest = cache["result", 0].transpose(0, 1)
    return t.concat([y0, y1, y_rest], dim=0)


decomposed = decompose_qk_input(rep_cache)
t.testing.assert_close(
    decomposed.sum(0),
    rep_cache["resid_pre", 1] - model.b_O[0],
    rtol=0.001,
    atol=1e-4,
)
decomposed_q = einops.einsum(
    decomposed, model.W_Q[1, 1], "n seq d_model, d_model d_head -> n seq d_head"
)
report("decomposed q", decomposed_q.norm(dim=-1)[:, ::9])

# --- composition scores -------------------------------------------------------------------------


def get_comp_score(W_A: Float[Tensor, "in_A out_A"], W_B: Float[Tensor, "out_A out_B"]) -> float:
    return ((W_A @ W_B).norm() / (W_A.norm() * W_B.norm())).item()


q_scores = t.zeros(4, 4)
W_QK = model.W_Q @ model.W_K.transpose(-1, -2)
W_OV = model.W_V @ model.W_O
for i in range(4):
    for j in range(4):
        q_scores[i, j] = get_comp_score(W_OV[0, i], W_QK[1, j])
report("q composition by hand", q_scores)
for mode in "QKV":
    report(f"{mode} composition", model.all_composition_scores(mode))
report("head labels", model.all_head_labels())
report("ov circuit norms", model.OV.norm())
report("qk singular values", model.QK.svd()[1])


def ablation_induction_score(prev_head_index: int, ind_head_index: int) -> float:
    def ablation_hook(v: Tensor, hook: HookPoint) -> Tensor:
        v[:, :, prev_head_index] = 0.0
        return v

    def record(attn: Tensor, hook: HookPoint) -> None:
        score = attn[0, ind_head_index].diagonal(-(seq_len - 1)).mean()
        hook.ctx["attn"] = score.item()

    model.run_with_hooks(
        rep_tokens,
        fwd_hooks=[
            (utils.get_act_name("v", 0), ablation_hook),
            (utils.get_act_name("pattern", 1), record),
        ],
    )
    return model.blocks[1].attn.hook_pattern.ctx["attn"]


report(
    "ablated induction",
    [[ablation_induction_score(i, j) for j in range(4)] for i in range(4)],
)
report("config", json.loads(json.dumps({"n_params": cfg.n_params, "d_mlp": cfg.d_mlp})))
