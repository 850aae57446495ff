import pyvene

config, tokenizer, gpt2 = pyvene.create_gpt2_lm("gpt2")
clean, corrupted = (
    tokenizer(text, return_tensors="pt") for text in ("the cat in the can", "the cat on the can")
)
right, wrong = (tokenizer(text).input_ids[0] for text in (" cat", " the"))
length = clean["input_ids"].shape[1]


def logit_diff(logits):
    return (logits[0, -1, right] - logits[0, -1, wrong]).item()


# Read the residual stream that enters block 1.
read = pyvene.IntervenableModel(
    {"layer": 1, "component": "block_input", "intervention_type": pyvene.CollectIntervention},
    model=gpt2,
)
(_, collected), _ = read(base=clean, unit_locations={"base": length - 1})
print("norm", collected[0].norm().item())

# Set the output of one head to zero.
ablate = pyvene.IntervenableModel(
    {
        "layer": 1,
        "component": "head_attention_value_output",
        "unit": "h",
        "intervention_type": pyvene.ZeroIntervention,
    },
    model=gpt2,
)
_, ablated = ablate(base=clean, unit_locations={"base": 2})
print("ablated", logit_diff(ablated.logits))

# Patch that residual stream from the clean prompt into the corrupted one, position by position.
patch = pyvene.IntervenableModel(
    {"layer": 1, "component": "block_input", "intervention_type": pyvene.VanillaIntervention},
    model=gpt2,
)
for pos in range(length):
    _, patched = patch(base=corrupted, sources=clean, unit_locations={"sources->base": pos})
    print("patched", pos, logit_diff(patched.logits))
