from fastlens import HookedTransformer, patching

model = HookedTransformer.from_pretrained_no_processing("gpt2")
clean = model.to_tokens("the cat in the can", prepend_bos=False)
corrupted = model.to_tokens("the cat on the can", prepend_bos=False)
logit_diff = patching.logit_diff(" cat", " the")

# Read the residual stream that enters block 1; nothing behind it is computed.
_, cache = model.run_with_cache(clean, names_filter="blocks.1.hook_resid_pre", return_type=None)
print("norm", cache["resid_pre", 1][0, -1].norm().item())

# Set the output of one head to zero, in any number of runs.
runs = {"ablated": patching.Patch("z", 1, head=2, source="zero")}
ablated = patching.sweep(model, corrupted, clean, runs=runs, metric=logit_diff)
print("ablated", ablated.values[0].item())

# Patch that residual stream from the clean prompt into the corrupted one, position by position.
# Without `layers` it is every layer as well, in one pass.
patched = patching.sweep(
    model, clean, corrupted, sites="resid_pre", by=("layer", "pos"), layers=[1], metric=logit_diff
)
for pos, value in enumerate(patched.values[0].tolist()):
    print("patched", pos, value)
