"""Tokenizers, masks and rows of tokens, by TransformerLens' path."""

from fastlens.text_datasets import keep_single_column, tokenize_and_concatenate
from fastlens.tokens import (
    get_attention_mask,
    get_cumsum_along_dim,
    get_input_with_manually_prepended_bos,
    get_tokenizer_with_bos,
    get_tokens_with_bos_removed,
)

__all__ = [
    "get_attention_mask",
    "get_cumsum_along_dim",
    "get_input_with_manually_prepended_bos",
    "get_tokenizer_with_bos",
    "get_tokens_with_bos_removed",
    "keep_single_column",
    "tokenize_and_concatenate",
]
