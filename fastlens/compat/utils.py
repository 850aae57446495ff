"""The names that code written for TransformerLens finds in `transformer_lens.utils`.

Most live elsewhere in fastlens and are only gathered here; the few that exist for such code alone
are defined here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import einops
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from fastlens.act_names import get_act_name
from fastlens.errors import did_you_mean
from fastlens.ops.activations import gelu_fast, gelu_new, solu
from fastlens.sampling import sample_logits
from fastlens.slices import Slice, SliceInput
from fastlens.tokens import (
    USE_DEFAULT_VALUE,
    LocallyOverridenDefaults,
    get_attention_mask,
    get_cumsum_along_dim,
    get_input_with_manually_prepended_bos,
    get_offset_position_ids,
    get_tokenizer_with_bos,
    get_tokens_with_bos_removed,
    lm_cross_entropy_loss,
    override_or_use_default_value,
)

__all__ = [
    "USE_DEFAULT_VALUE",
    "LocallyOverridenDefaults",
    "Slice",
    "SliceInput",
    "filter_dict_by_prefix",
    "gelu_fast",
    "gelu_new",
    "get_act_name",
    "get_attention_mask",
    "get_corner",
    "get_cumsum_along_dim",
    "get_device",
    "get_input_with_manually_prepended_bos",
    "get_offset_position_ids",
    "get_tokenizer_with_bos",
    "get_tokens_with_bos_removed",
    "is_lower_triangular",
    "is_square",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "override_or_use_default_value",
    "remove_batch_dim",
    "repeat_along_head_dimension",
    "sample_logits",
    "solu",
    "test_prompt",
    "to_numpy",
    "transpose",
]


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"fastlens has no utils.{name} (yet, if transformer_lens.utils has it)."
        f"{did_you_mean(name, __all__)}"
    )


def to_numpy(tensor: Any) -> np.ndarray:
    """An array of the same values: from a tensor (detached, on the CPU), list, tuple or number.

    bfloat16, which numpy does not know, becomes float32.
    """
    if isinstance(tensor, Tensor):
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if isinstance(tensor, np.ndarray | list | tuple | bool | int | float | str):
        return np.asarray(tensor)
    raise ValueError(f"to_numpy takes a tensor, array, list, tuple or number; got {type(tensor)}.")


def get_corner(tensor: Any, n: int = 3) -> Any:
    """The first ``n`` entries along every axis."""
    return tensor[tuple(slice(n) for _ in range(tensor.ndim))]


def remove_batch_dim(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Without its first axis if that has length 1, else as it is."""
    return tensor.squeeze(0) if tensor.shape[0] == 1 else tensor


def transpose(tensor: Shaped[Tensor, "*lead a b"]) -> Shaped[Tensor, "*lead b a"]:
    """With its last two axes swapped."""
    return tensor.transpose(-1, -2)


def is_square(x: Shaped[Tensor, "..."]) -> bool:
    """Whether it is a matrix with as many rows as columns."""
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Shaped[Tensor, "..."]) -> bool:
    """Whether it is a square matrix with zeros above the diagonal."""
    return is_square(x) and x.equal(x.tril())


def repeat_along_head_dimension(
    tensor: Float[Tensor, "batch pos d_model"], n_heads: int, clone_tensor: bool = True
) -> Float[Tensor, "batch pos head d_model"]:
    """A head axis with the same values in every head: a copy of its own, or a view."""
    repeated = einops.repeat(tensor, "batch pos d -> batch pos head d", head=n_heads)
    return repeated.clone() if clone_tensor else repeated


def filter_dict_by_prefix(dictionary: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries below ``prefix`` (which need not end in a dot), their keys without it."""
    start = prefix if prefix.endswith(".") else f"{prefix}."
    return {k.removeprefix(start): v for k, v in dictionary.items() if k.startswith(start)}


def get_device() -> str:
    """``"cuda"`` where there is one, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def lm_accuracy(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    per_token: bool = False,
) -> Float[Tensor, ""] | Bool[Tensor, "batch pos_less_one"]:
    """The fraction of next tokens that have the largest logit, or whether each one has."""
    hits = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    return hits if per_token else hits.float().mean()


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
