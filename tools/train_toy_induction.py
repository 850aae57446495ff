"""Trains the model that ships inside the package: ``from_pretrained("toy-induction")``.

    python tools/train_toy_induction.py --out /tmp/toy

A 2-layer attention-only transformer over characters learns two things at once: the English of
Python's own manual, and to continue random characters that repeat. The second takes a head in
layer 0 that attends to the previous token and heads in layer 1 that attend to what followed last
time: an induction circuit (Olsson et al. 2022, arXiv 2209.11895). About half a minute on one core.
"""

import argparse
import importlib.resources
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from fastlens import HookedTransformer

NAME = "toy-induction"
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
CHARACTERS = ["\n", *map(chr, range(32, 127))]
D_VOCAB = len(SPECIAL) + len(CHARACTERS)
BOS = 0
CONFIG = {
    "n_layers": 2, "d_model": 64, "n_heads": 4, "d_head": 16, "n_ctx": 128, "d_vocab": D_VOCAB,
    "attn_only": True, "act_fn": None, "model_name": NAME, "device": "cpu",
}  # fmt: skip

STEPS = 900
LEARNING_RATE, WARM_UP_STEPS = 8e-3, 50
# Where embeddings start: with small ones no induction head appears in the time there is.
TOKEN_SCALE, POSITION_SCALE = 0.6, 0.8
# Nothing foretells the first round of a repeated sequence: it counts little in the loss.
FIRST_ROUND_WEIGHT = 0.2
HELD_OUT_CHARACTERS = 20_000
EVALUATED_PERIOD, EVALUATED_ROWS = 50, 32
# Best and second-best induction head, best previous-token head of layer 0.
MIN_SCORES = (0.8, 0.8, 0.8)


@dataclass(frozen=True)
class Stage:
    """A stretch of training: its share of the steps, and what a batch is made of."""

    share: float
    length: int
    random_rows: int
    copied_rows: int
    text_rows: int
    shortest_period: int


# Short sequences first: with fewer places to look at, heads find the previous token sooner. But no
# short periods then: any token seen before is a good guess there, and models would stay with it.
STAGES = (
    Stage(0.4, length=48, random_rows=36, copied_rows=0, text_rows=12, shortest_period=8),
    Stage(0.6, length=128, random_rows=6, copied_rows=4, text_rows=6, shortest_period=2),
)


@dataclass(frozen=True)
class Quality:
    """What a trained model can do.

    Scores are mean attention probabilities, losses are nats per token on held-out sequences.
    """

    induction: list[list[float]]
    previous_token: list[list[float]]
    first_round_loss: float
    repeated_loss: float
    text_loss: float

    @property
    def loss(self) -> float:
        """The one number two models are compared by: it weighs text and repetition equally."""
        return (self.repeated_loss + self.text_loss) / 2

    def shortcomings(self) -> list[str]:
        """The promised scores that are not reached; empty if all are."""
        best, second = sorted((score for row in self.induction for score in row), reverse=True)[:2]
        found = zip(
            ("best induction head", "second-best induction head", "previous-token head"),
            (best, second, max(self.previous_token[0])),
            MIN_SCORES,
            strict=True,
        )
        return [f"{what}: {score:.2f} < {least}" for what, score, least in found if score < least]

    def __str__(self) -> str:
        def table(scores: list[list[float]]) -> str:
            return "\n".join(
                f"  layer {layer}:  " + "  ".join(f"{score:.2f}" for score in row)
                for layer, row in enumerate(scores)
            )

        return (
            f"induction score of each head\n{table(self.induction)}\n"
            f"previous-token score of each head\n{table(self.previous_token)}\n"
            f"loss on {EVALUATED_PERIOD} random characters {self.first_round_loss:.2f}, "
            f"on their repetition {self.repeated_loss:.2f}, on text {self.text_loss:.2f} nats/token"
        )


# -- data ----------------------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """One token per printable ASCII character and newline; anything else is ``<unk>``."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate([*SPECIAL.values(), *CHARACTERS])}
    # Byte-pair encoding without a single merge: characters stay characters.
    plain = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=SPECIAL["unk_token"]))
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=CONFIG["n_ctx"],
        **SPECIAL,
    )


def corpus() -> Int[Tensor, " pos"]:
    """The Python reference manual as pydoc carries it, in characters of the vocabulary."""
    from pydoc_data.topics import topics

    plain_quotes = str.maketrans("\u201c\u201d\u2018\u2019", "\"\"''")
    text = "\n\n".join(topics[name] for name in sorted(topics)).translate(plain_quotes)
    # Rules and the padding of tables teach nothing: one space or mark stands for a run of it.
    text = re.sub(r"([^\w\n])\1+", r"\1", text)
    ids = {character: index for index, character in enumerate(CHARACTERS, start=len(SPECIAL))}
    return torch.tensor([ids[character] for character in text if character in ids])


def with_bos(tokens: Int[Tensor, "row pos"]) -> Int[Tensor, "row longer"]:
    """Put BOS in front of every row."""
    return F.pad(tokens, (1, 0), value=BOS)


def text_rows(
    text: Int[Tensor, " text"], rows: int, length: int, generator: torch.Generator
) -> Int[Tensor, "row pos"]:
    """BOS and a random stretch of the text."""
    starts = torch.randint(len(text) - length, (rows, 1), generator=generator)
    return with_bos(text[starts + torch.arange(length - 1)])


def random_rows(rows: int, length: int, generator: torch.Generator) -> Int[Tensor, "row pos"]:
    """BOS and random tokens."""
    shape = (rows, length - 1)
    return with_bos(torch.randint(BOS + 1, D_VOCAB, shape, generator=generator))


def repeated(
    tokens: Int[Tensor, "row pos"], shortest: int, generator: torch.Generator
) -> tuple[Int[Tensor, "row pos"], Float[Tensor, "row predicted"]]:
    """Each row starting over, BOS apart, after a period of its own; and loss weights."""
    rows, length = tokens.shape
    # Evenly on a logarithmic scale, but for the root, which makes long periods more common.
    share = torch.rand(rows, 1, generator=generator).sqrt()
    periods = (shortest * (0.6 * length / shortest) ** share).long()
    places = torch.arange(length - 1)
    weights = torch.where(places < periods, FIRST_ROUND_WEIGHT, 1.0)
    return with_bos(tokens[:, 1:].gather(1, places % periods)), weights


def batch_of(
    stage: Stage, text: Int[Tensor, " text"], generator: torch.Generator
) -> tuple[Int[Tensor, "row pos"], Float[Tensor, "row predicted"]]:
    """Tokens and loss weights of one training step."""
    copied = text_rows(text, stage.copied_rows, stage.length, generator)
    fresh = torch.cat([random_rows(stage.random_rows, stage.length, generator), copied])
    tokens, weights = repeated(fresh, stage.shortest_period, generator)
    plain = text_rows(text, stage.text_rows, stage.length, generator)
    return torch.cat([tokens, plain]), torch.cat([weights, torch.ones(plain[:, 1:].shape)])


# -- training ------------------------------------------------------------------------------------


def sinusoids(n_ctx: int, d_model: int) -> Float[Tensor, "pos d_model"]:
    """Sines and cosines of wavelengths from 4 to ``n_ctx`` tokens (Vaswani et al. 2017)."""
    share = torch.linspace(0, 1, d_model // 2)
    angles = torch.arange(n_ctx)[:, None] * (2 * math.pi / (4 * (n_ctx / 4) ** share))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def new_model(seed: int) -> HookedTransformer:
    """Random weights, but positions that begin as sinusoids.

    With those, one linear map shifts every position by one, so a previous-token head is near.
    """
    model = HookedTransformer({**CONFIG, "seed": seed})
    with torch.no_grad():
        model.W_E.normal_(std=TOKEN_SCALE)
        model.W_pos.copy_(POSITION_SCALE * sinusoids(model.cfg.n_ctx, model.cfg.d_model))
    return model


def losses_at(
    model: HookedTransformer,
    tokens: Int[Tensor, "row pos"],
    positions: Int[Tensor, "row pos"],
) -> Float[Tensor, "row predicted"]:
    """Next-token losses where each token has the position it is told, in nats."""
    residual = model.embed(tokens) + model.W_pos[positions]
    logits = model(residual, start_at_layer=0)
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


def random_positions(
    rows: int, length: int, n_ctx: int, generator: torch.Generator
) -> Int[Tensor, "row pos"]:
    """0 for BOS, then a window anywhere in the context: short rows train every position."""
    positions = torch.arange(length).repeat(rows, 1)
    positions[:, 1:] += torch.randint(n_ctx - length + 1, (rows, 1), generator=generator)
    return positions


def stage_at(progress: float) -> Stage:
    """The stage that a share of the whole training, 0 to 1, falls into."""
    end = 0.0
    for stage in STAGES:
        end += stage.share
        if progress < end:
            return stage
    return STAGES[-1]


def train(
    model: HookedTransformer,
    text: Int[Tensor, " text"],
    *,
    steps: int,
    seconds: float = math.inf,
    seed: int = 0,
) -> None:
    """Train in place for ``steps`` steps, or for ``seconds`` if that is shorter.

    The learning rate and the stages follow whichever of the two is further on.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01
    )
    started = time.monotonic()
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for step in range(steps):
            progress = max(step / steps, (time.monotonic() - started) / seconds)
            if progress >= 1:
                break
            warm_up, decay = (step + 1) / WARM_UP_STEPS, 2 * (1 - progress)
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, warm_up, decay)
            tokens, weights = batch_of(stage_at(progress), text, generator)
            positions = random_positions(*tokens.shape, model.cfg.n_ctx, generator)
            loss = (losses_at(model, tokens, positions) * weights).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
            bar.update()


# -- judging -------------------------------------------------------------------------------------


@torch.no_grad()
def quality_of(model: HookedTransformer, held_out: Int[Tensor, " text"]) -> Quality:
    """Scores and losses on fixed random tokens, repeated once, and on held-out text.

    A head's induction score is its mean attention from a token of the repetition to the token
    after its first occurrence; its previous-token score that from each token to the one before.
    """
    generator = torch.Generator().manual_seed(1234)
    period = min(EVALUATED_PERIOD, (model.cfg.n_ctx - 1) // 2)
    once = random_rows(EVALUATED_ROWS, period + 1, generator)
    tokens = torch.cat([once, once[:, 1:]], dim=1)
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: "pattern" in name)
    losses = model.loss_fn(logits, tokens, per_token=True)
    induction, previous = [], []
    for layer in range(model.cfg.n_layers):
        pattern = cache["pattern", layer]
        # [row, head, query]: of every query from the repetition's first token on.
        to_next = pattern.diagonal(1 - period, dim1=-2, dim2=-1)[..., 2:]
        induction.append(to_next.mean((0, -1)).tolist())
        previous.append(pattern.diagonal(-1, dim1=-2, dim2=-1).mean((0, -1)).tolist())
    text = text_rows(held_out, 4 * EVALUATED_ROWS, model.cfg.n_ctx, generator)
    return Quality(
        induction,
        previous,
        # Loss i is that of token i + 1. The repetition's first token cannot be foretold.
        first_round_loss=losses[:, :period].mean().item(),
        repeated_loss=losses[:, period + 1 :].mean().item(),
        text_loss=model(text, return_type="loss").item(),
    )


def reasons_to_refuse(new: Quality, out: Path, held_out: Int[Tensor, " text"]) -> list[str]:
    """Why the new model should not take the place of what ``out`` holds; empty if it may."""
    reasons = new.shortcomings()
    if (out / "fastlens.json").is_file():
        old_model = HookedTransformer.from_pretrained_no_processing(
            out, device="cpu", verbose=False
        )
        old = quality_of(old_model, held_out)
        if new.loss > old.loss:
            reasons.append(f"held-out loss: {new.loss:.3f} > {old.loss:.3f} of the model there")
    return reasons


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, report, save. Returns 0, or 1 if the new model was not good enough to save."""
    packaged = Path(str(importlib.resources.files("fastlens"))) / "assets" / "toy_induction"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=packaged, help="folder (default: the package)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after that long")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite a better model")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    text = corpus()
    learned, held_out = text[:-HELD_OUT_CHARACTERS], text[-HELD_OUT_CHARACTERS:]
    model = new_model(options.seed)
    started = time.monotonic()
    train(model, learned, steps=options.steps, seconds=options.seconds, seed=options.seed)
    took = time.monotonic() - started
    quality = quality_of(model, held_out)
    print(f"trained in {took:.0f} s\n{quality}")
    reasons = reasons_to_refuse(quality, options.out, held_out)
    if reasons and not options.force:
        print(f"not saved to {options.out} ({'; '.join(reasons)}); --force saves it all the same")
        return 1
    model.save_pretrained(options.out)
    make_tokenizer().save_pretrained(options.out)
    print(f"saved to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
