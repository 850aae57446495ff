from nnsight import LanguageModel

model = LanguageModel("gpt2", dispatch=True)
clean, corrupted = "the cat in the can", "the cat on the can"
right, wrong = (model.tokenizer(text).input_ids[0] for text in (" cat", " the"))
d_head = model.config.n_embd // model.config.n_head


def logit_diff(logits):
    return (logits[0, -1, right] - logits[0, -1, wrong]).item()


# Read the residual stream that enters block 1.
with model.trace(clean):
    stream = model.transformer.h[1].input.save()
print("norm", stream[0, -1].norm().item())

# Set the output of one head to zero: its slice of what the output projection reads.
with model.trace(clean):
    model.transformer.h[1].attn.c_proj.input[..., 2 * d_head : 3 * d_head] = 0.0
    logits = model.lm_head.output.save()
print("ablated", logit_diff(logits))

# Patch that residual stream from the clean prompt into the corrupted one, position by position.
for pos in range(stream.shape[1]):
    with model.trace(corrupted):
        model.transformer.h[1].input[:, pos] = stream[:, pos]
        logits = model.lm_head.output.save()
    print("patched", pos, logit_diff(logits))
