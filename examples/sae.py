"""Which features of a sparse autoencoder carry "the token before me was ..."? Feature patching.

An induction head finds the token after the previous occurrence of the current one, because an
earlier head wrote there which token came before (Elhage et al. 2021). Here a small autoencoder is
trained on that stream (top-k: Gao et al. 2406.04093), and every feature at every position is
patched from one prompt into another: `codes` makes an autoencoder's codes a site like any other.

    python examples/sae.py --model toy-induction
"""

import argparse

import torch
from torch import nn

from fastlens import HookedTransformer, Scores
from fastlens.patching import Patch, answer_prob, codes, sweep

HALF = 12  # tokens of a sequence, which is then repeated
ACTIVE = 8  # features of a token


class SparseAutoencoder(nn.Module):
    """Anything with `encode` and `decode` will do; SAELens' also say where they stand."""

    def __init__(self, width: int, n_features: int):
        super().__init__()
        self.encoder = nn.Linear(width, n_features)
        self.decoder = nn.Linear(n_features, width)
        nn.init.normal_(self.decoder.weight, std=width**-0.5)
        self.encoder.weight.data.copy_(self.decoder.weight.T)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.encoder(x - self.decoder.bias))
        kept = features.topk(ACTIVE, -1)
        return torch.zeros_like(features).scatter(-1, kept.indices, kept.values)

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
    """An autoencoder of what passes the hook."""
    sae = SparseAutoencoder(model.cfg.d_model, n_features).to(model.cfg.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
    for step in range(steps):
        with torch.no_grad():
            tokens = repeated_tokens(model, 32)
            _, cache = model.run_with_cache(tokens, names_filter=hook, stop_at_layer=2)
        # BOS is unlike the rest.
        x = cache[hook][:, 1:].flatten(0, 1)
        error = (sae.decode(sae.encode(x)) - x).square().sum(-1).mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % (steps // 4) == steps // 4 - 1:
            explained = 1 - error / (x - x.mean(0)).square().sum(-1).mean()
            print(f"step {step + 1}: {explained:.1%} of the variance explained")
    return sae.requires_grad_(False)


def main(model: HookedTransformer, steps: int = 600) -> tuple[Scores, Scores]:
    """Train, then patch every feature everywhere, then those that mattered together."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = train(model, "blocks.1.hook_resid_pre", 4 * model.cfg.d_model, steps)
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

    # Several together; and all of them, which leaves out what the autoencoder does not explain.
    top = by_feature.values[0, 6].topk(4).indices.tolist()
    runs = {f"the best {n}": Patch(features, pos=6, feature=top[:n]) for n in (1, 2, 4)}
    runs["all features"] = Patch(features, pos=6)
    runs["the stream itself"] = Patch("resid_pre", 1, pos=6)
    together = sweep(model, clean, corrupted, runs=runs, metric=answer_prob(answer, normalize=True))
    print(together.table(5))
    return by_feature, together


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toy-induction")
    main(HookedTransformer.from_pretrained(parser.parse_args().model))
