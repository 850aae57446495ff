"""Which heads find the indirect object? Direct logit attribution.

"When John and Mary went to the store, Mary gave a bottle to" is completed with " John". The logit
difference John - Mary is a linear function of the final residual stream (the norm's scale held),
and the stream is a sum of what embedding, heads and MLPs wrote. So each of them has a share of the
difference, and the shares sum to it (Wang et al. 2211.00593).

    python examples/ioi.py
"""

import argparse

import torch

from fastlens import HookedTransformer, utils

PROMPT = "When John and Mary went to the store, Mary gave a bottle to"
ANSWER, WRONG = " John", " Mary"


def strongest(labels: list[str], shares: torch.Tensor, k: int = 5) -> str:
    """The ``k`` shares furthest from zero, as text."""
    order = shares.abs().argsort(descending=True)[:k].tolist()
    return ", ".join(f"{labels[i]} {shares[i]:+.2f}" for i in order)


def main(model: HookedTransformer) -> dict[str, torch.Tensor]:
    """The logit difference, layer by layer, part by part, head by head."""
    tokens = model.to_tokens(PROMPT)
    answer, wrong = model.to_single_token(ANSWER), model.to_single_token(WRONG)
    utils.test_prompt(PROMPT, ANSWER, model, top_k=3)

    # 1. One run, everything it did.
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    logit_diff = logits[0, -1, answer] - logits[0, -1, wrong]
    print(f"\nlogit{ANSWER} - logit{WRONG}: {logit_diff:.3f}")

    # 2. Logit lens: what if the model stopped at each layer?
    stream, layers = cache.accumulated_resid(apply_ln=True, pos_slice=-1, return_labels=True)
    answer_direction, wrong_direction = model.tokens_to_residual_directions(
        torch.tensor([answer, wrong])
    )
    direction = answer_direction - wrong_direction
    lens = stream[:, 0] @ direction
    print("\nlogit difference of the stream, every fifth layer:")
    print("  ".join(f"{layers[i]} {lens[i]:+.2f}" for i in range(0, len(layers), 5)))

    # 3. What each layer's attention and MLP added.
    parts, names = cache.decompose_resid(pos_slice=-1, return_labels=True)
    by_part = cache.logit_attrs(parts, answer, incorrect_tokens=wrong, pos_slice=-1)[:, 0]
    print(f"\nlayers: {strongest(names, by_part)}")
    print(f"they sum to {by_part.sum():.3f}")

    # 4. What each head added.
    heads, names = cache.stack_head_results(pos_slice=-1, return_labels=True)
    by_head = cache.logit_attrs(heads, answer, incorrect_tokens=wrong, pos_slice=-1)[:, 0]
    print(f"heads: {strongest(names, by_head)}")

    # 5. Where the strongest head looks from the last token.
    layer, head = divmod(int(by_head.argmax()), model.cfg.n_heads)
    pattern = cache["pattern", layer][0, head, -1]
    source = int(pattern.argmax())
    token = model.to_str_tokens(tokens)[source]
    print(f"L{layer}H{head} looks at {token!r}, position {source}, with {pattern[source]:.2f}")
    return {"logit_diff": logit_diff, "lens": lens, "by_part": by_part, "by_head": by_head}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    main(HookedTransformer.from_pretrained(parser.parse_args().model, default_prepend_bos=False))
