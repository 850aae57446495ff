"""Indirect object identification (Wang et al. 2211.00593): the sentences and the score."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastlens.errors import FastlensError, TokenError


class IOIError(FastlensError, ValueError):
    """Sentences that do not ask what the indirect object is."""


class IOIDataset(Dataset):
    """Sentences of two names, the last word being the name that is said once before.

    >>> data = IOIDataset(model.tokenizer, num_samples=100, seed=42)
    >>> ioi_eval(model, data)["Accuracy"]

    Args:
        tokenizer: For the tokens of ``data[i]``.
        templates: Texts that end with ``[A]``, the name that was said once; ``[B]`` is the other,
            and ``[WORD]`` one of ``nouns["WORD"]``, the same all over the text.
        names: At least two.
        nouns: For each word in brackets, what may stand there.
        num_samples: Number of sentences; an odd number is one less if ``symmetric``.
        symmetric: Every sentence comes a second time with the names exchanged.
        prepend_bos: Put the tokenizer's BOS in front, once.
        seed: Draws TransformerLens' sentences of that seed. By default Python's global `random` is
            drawn from, as it is.

    ``samples`` are dicts of strings: ``text``, ``IO`` and ``S`` (the names, with a space in front).
    Items are dicts of tokens: ``prompt`` (the whole text), ``IO`` and ``S``.
    """

    def __init__(
        self,
        tokenizer: Any,
        templates: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        nouns: Mapping[str, Sequence[str]] | None = None,
        num_samples: int = 1000,
        symmetric: bool = False,
        prepend_bos: bool = True,
        seed: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.prepend_bos = prepend_bos
        self.templates = self.get_default_templates() if templates is None else templates
        self.names = self.get_default_names() if names is None else names
        self.nouns = self.get_default_nouns() if nouns is None else nouns
        # A seed of ours must not reseed the whole process.
        self._random: Any = random if seed is None else random.Random(seed)
        self.samples: list[dict[str, str]] = []
        for _ in range(num_samples // 2 if symmetric else num_samples):
            self.samples.extend(self.get_sample(symmetric=symmetric))

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.samples)

    def __getitem__(self, idx: int) -> dict[str, Int[Tensor, " pos"]]:
        """Tokens of one sentence and of its two names, without special tokens but BOS in front.

        Raises: TokenError if BOS is wanted and there is none.
        """
        sample = self.samples[idx]
        bos = self.tokenizer.bos_token_id
        if self.prepend_bos and bos is None:
            raise TokenError(
                "prepend_bos=True, but the tokenizer has no BOS. Pass prepend_bos=False."
            )
        front = [bos] if self.prepend_bos else []
        # Many tokenizers add BOS by themselves, which would give two of them.
        ids = {
            name: self.tokenizer.encode(text, add_special_tokens=False)
            for name, text in sample.items()
        }
        return {
            "prompt": torch.tensor(front + ids["text"], dtype=torch.long),
            "IO": torch.tensor(ids["IO"], dtype=torch.long),
            "S": torch.tensor(ids["S"], dtype=torch.long),
        }

    def get_sample(self, symmetric: bool = False) -> list[dict[str, str]]:
        """Draw one sentence, or that and the one with the names exchanged."""
        template = self._random.choice(self.templates)
        for word, choices in self.nouns.items():
            template = template.replace(f"[{word}]", self._random.choice(choices))
        first, second = self._random.sample(self.names, 2)
        pairs = [(first, second), (second, first)] if symmetric else [(first, second)]
        return [
            {"text": template.replace("[A]", a).replace("[B]", b), "IO": f" {a}", "S": f" {b}"}
            for a, b in pairs
        ]

    @staticmethod
    def get_default_names() -> list[str]:
        """Two names that most tokenizers have a token for."""
        return ["John", "Mary"]

    @staticmethod
    def get_default_templates() -> list[str]:
        """One sentence that names the indirect object first, one that names it second."""
        return [
            "[A] and [B] went to the [LOCATION] to buy [OBJECT]. [B] handed the [OBJECT] to [A]",
            "Then, [B] and [A] went to the [LOCATION]. [B] gave the [OBJECT] to [A]",
        ]

    @staticmethod
    def get_default_nouns() -> dict[str, list[str]]:
        """Places and things."""
        return {"LOCATION": ["store", "market"], "OBJECT": ["milk", "eggs", "bread"]}


@torch.no_grad()
def ioi_eval(
    model: Any,
    dataset: Any = None,
    batch_size: int = 8,
    num_samples: int = 1000,
    tokenizer: Any = None,
    symmetric: bool = False,
) -> dict[str, float]:
    """How well a model finds the indirect object.

    Args:
        dataset: Items like `IOIDataset`'s; by default one of ``num_samples`` sentences (see
            ``symmetric`` there), drawn from Python's `random`.
        tokenizer: For that default; the model's, if none is given.

    Returns: ``"Logit Difference"``, the mean of the indirect object's logit minus the subject's, at
        the first token in which the two names differ, and ``"Accuracy"``, the fraction of
        sentences where that is positive.

    Raises: IOIError for a sentence that does not end with the name, or names that do not differ.
    """
    from tqdm import tqdm

    if dataset is None:
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        dataset = IOIDataset(tokenizer, num_samples=num_samples, symmetric=symmetric)
    if len(dataset) == 0:
        raise IOIError("the dataset has no sentence. Ask for at least one (symmetric: two).")
    # Sums do not depend on the order.
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=_collate)
    differences: list[float] = []
    for batch in tqdm(loader):
        prompts, mask = batch["prompts"].to(model.cfg.device), batch["mask"].to(model.cfg.device)
        logits = model(prompts, return_type="logits", attention_mask=mask)
        rows = torch.arange(len(prompts), device=logits.device)
        place, names = batch["place"].to(logits.device), batch["names"].to(logits.device)
        chosen = logits[rows[:, None], place[:, None], names]
        differences.extend((chosen[:, 0] - chosen[:, 1]).tolist())
    return {
        "Logit Difference": sum(differences) / len(differences),
        "Accuracy": sum(difference > 0 for difference in differences) / len(differences),
    }


def _collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Prompts padded right, their mask, and where which two tokens are to be compared."""
    prompts = [sample["prompt"] for sample in samples]
    questions = [_question(sample) for sample in samples]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "prompts": pad(prompts, batch_first=True),
        "mask": pad([torch.ones_like(prompt) for prompt in prompts], batch_first=True),
        "place": torch.tensor([place for place, _, _ in questions]),
        "names": torch.tensor([[right, wrong] for _, right, wrong in questions]),
    }


def _question(sample: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """The position before the first token in which the names differ, and those two tokens."""
    prompt, right, wrong = (sample[name].tolist() for name in ("prompt", "IO", "S"))
    pairs = list(zip(right, wrong, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        raise IOIError(
            f"the names cannot be told apart: their tokens are {right} (IO) and {wrong} (S)."
        )
    place = len(prompt) - len(right) + first - 1
    if place < 0 or prompt[place + 1] != right[first]:
        raise IOIError(
            f"a prompt must end with the tokens of IO: it ends with {prompt[-len(right) :]}, IO is "
            f"{right}. Templates end with [A], without a full stop."
        )
    return place, right[first], wrong[first]
