"""A walk through the interface in the order of TransformerLens' main demo, on a tiny model."""

import copy
import io
import tempfile
from pathlib import Path

import torch
from reporting import folder, report
from transformers import AutoTokenizer

import transformer_lens.utils as utils
from transformer_lens import (
    FactoredMatrix,
    HookedTransformer,
    HookedTransformerConfig,
    TransformerLensKeyValueCache,
)

torch.set_grad_enabled(False)
tokenizer = AutoTokenizer.from_pretrained(folder() / "toy")
model = HookedTransformer(
    {
        "n_layers": 2, "d_model": 64, "n_ctx": 128, "d_head": 16, "n_heads": 4, "attn_only": True,
        "d_vocab": 100, "normalization_type": "LN", "seed": 1,
    },
    tokenizer=tokenizer,
)  # fmt: skip
weights = torch.load(folder() / "toy" / "weights.pt", weights_only=True)
model.load_and_process_state_dict(dict(weights), fold_ln=True, center_writing_weights=True)
report("normalization", model.cfg.normalization_type)

# --- running ------------------------------------------------------------------------------------
text = "the dog ran to the dog and the dog ran to"
report("loss", model(text, return_type="loss"))
both = model(text, return_type="both")
report("both", [list(both.logits.shape), both.loss.item()])
report("per token", model(text, return_type="loss", loss_per_token=True))
report("a batch", model([text, "the dog"], return_type="logits")[:, 0, :6])
report("left padded", model([text, "the dog"], padding_side="left")[1, -1, :6])

# --- tokens -------------------------------------------------------------------------------------
report("to_tokens", model.to_tokens(text))
report("without bos", model.to_tokens(text, prepend_bos=False))
report("to_str_tokens", model.to_str_tokens(text))
report("of tokens", model.to_str_tokens(model.to_tokens("cat")[0]))
report("to_string", model.to_string(model.to_tokens(text)[0, 1:]))
report("strings", model.to_string(model.to_tokens(["a cat", "a dog"])))
report("single token", model.to_single_token("a"))
report("single string", model.to_single_str_token(20))
report("position", model.get_token_position("d", text))
report("last position", model.get_token_position("d", text, mode="last", prepend_bos=False))
report("direction", model.tokens_to_residual_directions("a"))
utils.test_prompt("the dog ran to the", "d", model, prepend_space_to_answer=False, top_k=3)

# --- activations --------------------------------------------------------------------------------
logits, cache = model.run_with_cache(text, remove_batch_dim=True)
report("cache", {name: list(value.shape) for name, value in cache.items()})
report("same thing", torch.equal(cache["pattern", 0], cache["blocks.0.attn.hook_pattern"]))
report("shorthands", [utils.get_act_name(*args) for args in
                      [("k", 6, "a"), ("pre", 2), ("embed",), ("normalized", 27, "ln2"),
                       ("k6",), ("scale4ln1",), ("pre5",)]])  # fmt: skip
report("stacked", list(cache.stack_activation("resid_pre").shape))
heads, labels = cache.stack_head_results(return_labels=True, apply_ln=True, pos_slice=-1)
report("heads", heads.norm(dim=-1))
resid, labels = cache.get_full_resid_decomposition(return_labels=True, expand_neurons=False)
report("decomposition", labels)
report("its sum", (resid.sum(0) - cache["resid_post", -1]).abs().max() < 1e-4)

# --- weights ------------------------------------------------------------------------------------
for name in ("W_E", "W_pos", "W_U", "b_U", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_O"):
    value = getattr(model, name)
    report(name, [list(value.shape), value.norm().item()])
report("accumulated bias", model.accumulated_bias(2, include_mlp_biases=False))
OV = model.OV
report("OV", [list(OV.shape), type(OV).__name__, OV[0, 1].norm().item()])
report("circuit", (model.W_E @ model.OV @ model.W_U).norm())
report("eigenvalues", model.OV.eigenvalues.real.sum(-1))
report("svd", FactoredMatrix(model.W_V[0, 0], model.W_O[0, 0]).svd()[1])
report("parts", [len(model.blocks), type(model.blocks[0].attn).__name__, list(model.mod_dict)[:8]])

# --- generation ---------------------------------------------------------------------------------
greedy = {"do_sample": False, "verbose": False, "max_new_tokens": 12}
report("greedy", model.generate("the dog ran to the dog and the", **greedy))
report("uncached", model.generate("the dog ran to the dog and the", use_past_kv_cache=False,
                                  **greedy))  # fmt: skip
report("as tokens", model.generate(model.to_tokens("the dog and the"), **greedy))
torch.manual_seed(0)
report("sampled", model.generate("the dog ran to", max_new_tokens=12, temperature=0.7, top_k=5,
                                 verbose=False))  # fmt: skip
torch.manual_seed(0)
report("nucleus", model.generate("the dog ran to", max_new_tokens=12, top_p=0.9, freq_penalty=0.5,
                                 verbose=False, stop_at_eos=False))  # fmt: skip
kv_cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, 1)
first = model(model.to_tokens("the dog ran"), past_kv_cache=kv_cache)
second = model(model.to_tokens(" to", prepend_bos=False), past_kv_cache=kv_cache)
whole = model(model.to_tokens("the dog ran to"))
report("with a cache", (whole[:, -second.shape[1] :] - second).abs().max() < 1e-4)
kv_cache.freeze()

# --- parts of a run -----------------------------------------------------------------------------
residual = model(text, stop_at_layer=1)
report("stopped", residual.norm())
report("went on", model(residual, start_at_layer=1)[0, -1, :6])
report("from the end", model(residual, start_at_layer=-1, stop_at_layer=None)[0, -1, :6])

# --- moving, saving, training -------------------------------------------------------------------
report("dtype", str(model.to(torch.float64, print_details=False)(text).dtype))
model.to(torch.float32, print_details=False)
with tempfile.TemporaryDirectory() as place:
    path = Path(place) / "model.pt"
    torch.save(model.state_dict(), path)
    other = HookedTransformer(copy.deepcopy(model.cfg), tokenizer=tokenizer)
    other.load_state_dict(torch.load(path, weights_only=True))
    report("loaded", (other(text) - model(text)).abs().max().item() == 0.0)
clone = copy.deepcopy(model)
report("copied", (clone(text) - model(text)).abs().max().item() == 0.0)
buffer = io.BytesIO()
torch.save(model, buffer)
buffer.seek(0)
report("pickled", (torch.load(buffer, weights_only=False)(text) - model(text)).abs().max() == 0.0)
with torch.enable_grad():
    trained = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=32, d_head=8, n_ctx=16, d_vocab=20, act_fn="solu_ln", seed=4
        )
    )
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    data = torch.randint(0, 20, (8, 16), generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(5):
        loss = trained(data, return_type="loss")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
report("training", losses)
