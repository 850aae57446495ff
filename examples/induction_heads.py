"""Find induction heads with random tokens that are repeated once.

Nothing predicts a random token, except having seen it before: in the second half, a head that looks
at the token after the previous occurrence of the current one knows what comes next (Elhage et al.
2021; Olsson et al. 2209.11895).

    python examples/induction_heads.py --model toy-induction
"""

import argparse

import torch

from fastlens import HookedTransformer, Scores
from fastlens.analysis.head_scores import head_scores


def repeated_tokens(model: HookedTransformer, length: int, batch: int) -> torch.Tensor:
    """``[batch, 2 * length]``: random tokens, twice; special tokens, if any, are low ids."""
    first = min(1000, model.cfg.d_vocab // 4)
    random = torch.randint(first, model.cfg.d_vocab, (batch, length))
    return torch.cat([random, random], dim=1).to(model.cfg.device)


def loss_by_half(model: HookedTransformer, tokens: torch.Tensor) -> tuple[float, float]:
    """Mean next-token loss in the first and in the second half, in nats."""
    loss = model(tokens, return_type="loss", loss_per_token=True)
    half = tokens.shape[1] // 2
    return loss[:, : half - 1].mean().item(), loss[:, half:].mean().item()


def induction_stripe(model: HookedTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """``[layer, head]``: mean attention from a token to the one after its previous occurrence."""
    half = tokens.shape[1] // 2
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)

    def read_stripe(pattern, hook):
        stripe = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - half)
        scores[hook.layer()] = stripe.mean(dim=(0, 2))

    def is_pattern(name):
        return name.endswith("hook_pattern")

    model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(is_pattern, read_stripe)])
    return scores


def without_heads(model: HookedTransformer, tokens: torch.Tensor, heads: list) -> float:
    """The second half's loss with the outputs of these heads set to zero."""

    def ablate(z, hook):
        for layer, head in heads:
            if layer == hook.layer():
                z[:, :, head] = 0.0
        return z

    with model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_z"), ablate)]):
        return loss_by_half(model, tokens)[1]


@torch.no_grad()
def main(model: HookedTransformer, length: int = 50, batch: int = 4) -> tuple[Scores, float, float]:
    """Loss, the heads behind it, and the loss without them."""
    # The model may have seen no more positions than n_ctx.
    length = min(length, model.cfg.n_ctx // 2)
    tokens = repeated_tokens(model, length, batch)
    first, second = loss_by_half(model, tokens)
    print(f"loss per token: first half {first:.2f}, second half {second:.2f}")

    stripe = induction_stripe(model, tokens)
    order = stripe.flatten().argsort(descending=True)[:5].tolist()
    heads = [divmod(i, model.cfg.n_heads) for i in order]
    print("induction heads:", ", ".join(f"L{i}H{h} {stripe[i, h]:.2f}" for i, h in heads))
    ablated = without_heads(model, tokens, heads)
    print(f"second half without these five: {ablated:.2f}")

    # The same measure, with previous-token and duplicate-token heads, in one call.
    scores = head_scores(model, seq_len=length, batch=batch)
    for kind in scores.labels["kind"]:
        found = scores.select(kind=kind).top(3)
        print(f"{kind}:", ", ".join(f"{cell.name} {cell.value:.2f}" for cell in found))
    return scores, second, ablated


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    main(HookedTransformer.from_pretrained(parser.parse_args().model, default_prepend_bos=False))
