"""Which features of a sparse autoencoder carry "the token before me was ..."? Feature patching.

An induction head finds the token after the previous occurrence of the current one, because an
earlier head wrote there which token came before (Elhage et al. 2021). Here a small autoencoder
is trained on that stream (Bricken et al. 2023), and every feature at every position is patched from
one prompt into another: `patching.codes` makes an autoencoder's codes a site like any other.

    python examples/sae.py --model toy-induction
"""

import argparse

import torch
from torch import nn

from fastlens import HookedTransformer, Scores
from fastlens.patching import Patch, answer_prob, codes, sweep

HALF = 12  # tokens of a sequence, which is then repeated


class SparseAutoencoder(nn.Module):
    """The usual one. Anything with `encode` and `decode` will do; SAELens' bring their place."""

    def __init__(self, width: int, n_features: int):
        super().__init__()
        self.encoder = nn.Linear(width, n_features)
        self.decoder = nn.Linear(n_features, width)
        nn.init.normal_(self.decoder.weight, std=width**-0.5)
        self.encoder.weight.data.copy_(self.decoder.weight.T)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.encoder(x - self.decoder.bias))

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return self.decoder(features)


def repeated_tokens(model: HookedTransformer, batch: int) -> torch.Tensor:
    """``[batch, 1 + 2 * HALF]``: BOS, random tokens, and the same again."""
    first = min(1000, model.cfg.d_vocab // 4)
    random = torch.stack(
        [torch.randperm(model.cfg.d_vocab - first)[:HALF] + first for _ in range(batch)]
    )
    bos = torch.full((batch, 1), model.tokenizer.bos_token_id)
    return torch.cat([bos, random, random], 1).to(model.cfg.device)


def train(model: HookedTransformer, hook: str, n_features: int, steps: int) -> SparseAutoencoder:
    """An autoencoder of what passes the hook, with a price on every active feature."""
    sae = SparseAutoencoder(model.cfg.d_model, n_features).to(model.cfg.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3)
    for step in range(steps):
        with torch.no_grad():
            tokens = repeated_tokens(model, 32)
            _, cache = model.run_with_cache(tokens, names_filter=hook, stop_at_layer=2)
        # BOS is unlike the rest.
        x = cache[hook][:, 1:].flatten(0, 1)
        features = sae.encode(x)
        error = (sae.decode(features) - x).square().sum(-1).mean()
        price = (features * sae.decoder.weight.norm(dim=0)).sum(-1).mean()
        (error + 0.05 * price).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % (steps // 4) == steps // 4 - 1:
            explained = 1 - error / (x - x.mean(0)).square().sum(-1).mean()
            n_active = (features > 0).sum(-1).float().mean()
            print(f"step {step + 1}: {explained:.1%} explained by {n_active:.1f} features a token")
    return sae.requires_grad_(False)


def main(model: HookedTransformer, steps: int = 400) -> tuple[Scores, Scores]:
    """Train, then patch every feature everywhere, then take away those that mattered."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = train(model, "blocks.1.hook_resid_pre", 8 * model.cfg.d_model, steps)
        clean = repeated_tokens(model, 1)[:, : 1 + HALF + 5]
        # The last token stood at position 5 the first time: there, another one.
        corrupted = clean.clone()
        corrupted[0, 5] = (set(range(model.cfg.d_vocab // 4, model.cfg.d_vocab))
                           - set(clean[0].tolist())).pop()  # fmt: skip
    answer = int(clean[0, 6])
    features = codes(sae, layer=1, site="resid_pre", decoder=sae.decoder.weight.T)

    # Denoising: one feature at one position at a time gets its value from the clean prompt.
    by_feature = sweep(
        *(model, clean, corrupted),
        sites=features,
        by=("layer", "pos", "feature"),
        metric=answer_prob(answer, normalize=True),
    )
    print(by_feature.table(8))

    # The other way round: without all features of a position, one feature, or none.
    top = int(by_feature.values[0, 6].argmax())
    runs = {
        "as it was": Patch(features, pos=6, source=0.0, mode="add"),
        f"without feature {top}": Patch(features, pos=6, feature=top, source="zero"),
        "without all features": Patch(features, pos=6, source="zero"),
    }
    ablated = sweep(model, corrupted, clean, runs=runs, metric=answer_prob(answer))
    print(ablated.table(3))
    return by_feature, ablated


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toy-induction")
    main(HookedTransformer.from_pretrained(parser.parse_args().model))
