from transformer_lens.model_bridge import TransformerBridge

model = TransformerBridge.boot_transformers("gpt2")
model.enable_compatibility_mode(no_processing=True)
clean = model.to_tokens("the cat in the can", prepend_bos=False)
corrupted = model.to_tokens("the cat on the can", prepend_bos=False)
right, wrong = model.to_single_token(" cat"), model.to_single_token(" the")


def logit_diff(logits):
    return (logits[0, -1, right] - logits[0, -1, wrong]).item()


# Read the residual stream that enters block 1.
_, cache = model.run_with_cache(clean)
print("norm", cache["resid_pre", 1][0, -1].norm().item())


# Set the output of one head to zero.
def zero_head(z, hook):
    z[:, :, 2] = 0.0
    return z


ablated = model.run_with_hooks(clean, fwd_hooks=[("blocks.1.attn.hook_z", zero_head)])
print("ablated", logit_diff(ablated))

# Patch that residual stream from the clean prompt into the corrupted one, position by position.
for pos in range(clean.shape[1]):

    def patch(resid, hook, pos=pos):
        resid[:, pos] = cache["resid_pre", 1][:, pos]
        return resid

    patched = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.hook_resid_pre", patch)])
    print("patched", pos, logit_diff(patched))
