"""A look at how a model continues a prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlens.tokens import USE_DEFAULT_VALUE


def test_prompt(
    prompt: str,
    answer: str | Sequence[str],
    model: Any,
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = USE_DEFAULT_VALUE,
    top_k: int = 10,
) -> None:
    """Print how well the model continues the prompt with the answer: rank, logit, probability.

    Args:
        answer: Each of its tokens is looked at, the earlier ones given; of several answers only
            the first tokens, as rivals.
        prepend_space_to_answer: Put a space in front of an answer that has none.
        print_details: Print the tokens and the ``top_k`` predictions too.
        prepend_bos: Of the prompt; by default ``cfg.default_prepend_bos``.

    The lines printed are TransformerLens'. Ranks count from 0.
    """
    answers = [answer] if isinstance(answer, str) else list(answer)
    if prepend_space_to_answer:
        answers = [text if text.startswith(" ") else f" {text}" for text in answers]
    names = [model.to_str_tokens(text, prepend_bos=False) for text in answers]
    rivals = len(answers) > 1
    prompt_tokens = model.to_tokens(prompt, prepend_bos=prepend_bos)
    ids = [model.to_tokens(text, prepend_bos=False)[0] for text in answers]
    if print_details:
        print("Tokenized prompt:", model.to_str_tokens(prompt, prepend_bos=prepend_bos))
        print(f"Tokenized answer{'s' if rivals else ''}:", names if rivals else names[0])
    rows = [prompt_tokens[0], *([] if rivals else ids)]
    logits = model(torch.cat(rows)[None])[0].detach()
    ranks = []
    for step in range(1 if rivals else len(ids[0])):
        row = logits[prompt_tokens.shape[1] - 1 + step]
        probs = row.softmax(-1)
        order = probs.argsort(descending=True)
        rank_of = order.argsort()
        found = [
            (texts[step], int(rank_of[tokens[step]]))
            for texts, tokens in zip(names, ids, strict=True)
        ]
        ranks.append(found if rivals else found[0])
        if not print_details:
            continue
        print(f"Performance on answer token{'s' if rivals else ''}:")
        for (text, rank), tokens in zip(found, ids, strict=True):
            token = tokens[step]
            print(f"Rank: {rank: <8} {_odds(row, probs, token)} Token: |{text}|")
        for place, token in enumerate(order[:top_k]):
            text = model.to_string(token)
            print(f"Top {place}th token. {_odds(row, probs, token)} Token: |{text}|")
    print("Ranks of the answer tokens:", ranks)


# Its name is TransformerLens'; pytest must not take it for a test.
test_prompt.__test__ = False  # type: ignore[attr-defined]


def _odds(row: Tensor, probs: Tensor, token: Tensor) -> str:
    return f"Logit: {row[token].item():5.2f} Prob: {probs[token].item():6.2%}"
