from transformers import AutoModelForCausalLM, AutoTokenizer

from fastlens import HookedModule

tokenizer = AutoTokenizer.from_pretrained("gpt2")
model = HookedModule(AutoModelForCausalLM.from_pretrained("gpt2"))
clean, corrupted = (
    tokenizer(text, return_tensors="pt").input_ids
    for text in ("the cat in the can", "the cat on the can")
)
right, wrong = (tokenizer(text).input_ids[0] for text in (" cat", " the"))
d_head = model.config.n_embd // model.config.n_head


def logit_diff(output):
    return (output.logits[0, -1, right] - output.logits[0, -1, wrong]).item()


# Read the residual stream that enters block 1.
place = "transformer.h.1.hook_in"
_, cache = model.run_with_cache(clean, names_filter=place)
print("norm", cache[place][0, -1].norm().item())


# Set the output of one head to zero: its slice of what the output projection reads.
def zero_head(z, hook):
    z[..., 2 * d_head : 3 * d_head] = 0.0


heads = "transformer.h.1.attn.c_proj.hook_in"
print("ablated", logit_diff(model.run_with_hooks(clean, fwd_hooks=[(heads, zero_head)])))

# Patch that residual stream from the clean prompt into the corrupted one, position by position.
for pos in range(clean.shape[1]):

    def patch(stream, hook, pos=pos):
        stream[:, pos] = cache[hook.name][:, pos]

    print("patched", pos, logit_diff(model.run_with_hooks(corrupted, fwd_hooks=[(place, patch)])))
