"""Where does the model keep "Eiffel Tower"? Activation patching over layers and positions.

Two prompts of the same length, one fact apart. The corrupted run gets the clean run's residual
stream at one layer and one position at a time; where the clean answer comes back, the stream
carried what it needs (Meng et al. 2202.05262).

    python examples/activation_patching.py --out patching
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from fastlens import HookedTransformer, Scores, utils
from fastlens.patching import logit_diff, sweep

CLEAN, CORRUPTED = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"
ANSWER, WRONG = " Paris", " Rome"


def patch_by_hand(model: HookedTransformer, layer: int) -> torch.Tensor:
    """The logit difference after patching each position of one layer, hook by hook."""
    clean_tokens, corrupted_tokens = model.to_tokens(CLEAN), model.to_tokens(CORRUPTED)
    answer, wrong = model.to_single_token(ANSWER), model.to_single_token(WRONG)

    # 1. Run the clean prompt and keep what the hook points saw.
    clean_logits, clean_cache = model.run_with_cache(clean_tokens)
    print(f"clean:     {clean_logits[0, -1, answer] - clean_logits[0, -1, wrong]:+.3f}")
    corrupted_logits = model(corrupted_tokens)
    print(f"corrupted: {corrupted_logits[0, -1, answer] - corrupted_logits[0, -1, wrong]:+.3f}")

    # 2. A hook gets an activation and may return another one.
    def patch_position(resid, hook, position):
        resid[:, position, :] = clean_cache[hook.name][:, position, :]
        return resid

    # 3. Run the corrupted prompt once for each position, with that hook.
    result = torch.zeros(corrupted_tokens.shape[1])
    for position in range(corrupted_tokens.shape[1]):
        patched_logits = model.run_with_hooks(
            corrupted_tokens,
            fwd_hooks=[
                (utils.get_act_name("resid_pre", layer), partial(patch_position, position=position))
            ],
        )
        result[position] = patched_logits[0, -1, answer] - patched_logits[0, -1, wrong]
    return result


def main(
    model: HookedTransformer, layers: slice = slice(None), out: str | Path | None = None
) -> Scores:
    """By hand for the middle layer, then every layer."""
    with torch.no_grad():
        layer = model.cfg.n_layers // 2
        by_hand = patch_by_hand(model, layer)
        print(f"layer {layer} by hand: {[round(value, 3) for value in by_hand.tolist()]}")

    # The same for all layers: one call, and scores that know their axes and unit.
    metric = logit_diff(ANSWER, WRONG)
    scores = sweep(
        model, CLEAN, CORRUPTED, metric=metric, sites="resid_pre", layers=layers, out=out
    )
    print(scores.table(10))
    if out is not None:
        scores.plot(Path(out) / "heatmap.png")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", help="folder for scores and heatmap")
    arguments = parser.parse_args()
    # SmolLM2's BOS is a chat marker that plain text should not start with.
    main(
        HookedTransformer.from_pretrained(arguments.model, default_prepend_bos=False),
        out=arguments.out,
    )
