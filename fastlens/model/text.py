"""The part of `HookedTransformer` that turns text into tokens and back."""

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import TokenError, did_you_mean
from fastlens.tokens import (
    USE_DEFAULT_VALUE,
    get_tokenizer_with_bos,
    override_or_use_default_value,
    prepends_something,
    token_is_known,
    tokenize,
)

Side = Literal["left", "right"]
# OLMo's tokenizers lose their own post-processor if BOS is turned on.
_KEEPS_ITS_TOKENIZER = ("OlmoForCausalLM", "OlmoeForCausalLM", "Olmo2ForCausalLM")
_TOKENIZER_METHODS = ("__call__", "encode", "decode", "batch_decode", "convert_tokens_to_ids")
_DEFAULT_EOS = "<|endoftext|>"
# Longer prompts are cut in error messages.
_SHOWN_TOKENS = 64


class TextMixin:
    """Tokens, strings and token directions, with TransformerLens 3's names and meanings.

    ``prepend_bos`` is ``cfg.default_prepend_bos`` unless given, and applies to text only: pass
    ``prepend_bos=False`` for a piece of a longer prompt. A tokenizer that has no BOS gets none.
    """

    cfg: HookedTransformerConfig
    tokenizer: Any
    W_U: Any

    def set_tokenizer(self, tokenizer: Any, default_padding_side: Side | None = None) -> None:
        """Use this Hugging Face tokenizer from now on.

        A tokenizer that could prepend its BOS itself but does not is copied, and the copy does; so
        ``model.tokenizer`` may be another object than the one given. Missing special tokens are
        filled: EOS by ``<|endoftext|>`` if the vocabulary has it, pad and BOS by EOS.
        ``cfg.d_vocab`` is taken from the tokenizer if it is not set.

        Args:
            default_padding_side: None keeps the tokenizer's (or "right" if it has none).
        """
        missing = [name for name in _TOKENIZER_METHODS if not hasattr(tokenizer, name)]
        if missing:
            raise TokenError(
                f"set_tokenizer got {type(tokenizer).__name__}, which has no {', '.join(missing)}. "
                f"Give a transformers tokenizer, e.g. AutoTokenizer.from_pretrained(folder)."
            )
        if default_padding_side not in (None, "left", "right"):
            raise TokenError(
                f"default_padding_side={default_padding_side!r} must be 'left', 'right' or None."
            )
        if self.cfg.original_architecture not in _KEEPS_ITS_TOKENIZER:
            tokenizer = get_tokenizer_with_bos(tokenizer)
        tokenizer.padding_side = default_padding_side or tokenizer.padding_side or "right"
        self.cfg.tokenizer_prepends_bos = prepends_something(tokenizer)
        if tokenizer.eos_token is None and token_is_known(tokenizer, _DEFAULT_EOS):
            tokenizer.eos_token = _DEFAULT_EOS
        if tokenizer.eos_token is not None:
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            if tokenizer.bos_token is None:
                tokenizer.bos_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        if self.cfg.d_vocab == -1:
            self.cfg.d_vocab = max(tokenizer.get_vocab().values()) + 1
        if self.cfg.d_vocab_out == -1:
            self.cfg.d_vocab_out = self.cfg.d_vocab

    def _need_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise TokenError(
                f"{what} needs a tokenizer, and this model has none. Give it one: "
                f"model.set_tokenizer(tokenizer), or tokenizer= when it is built; or pass tokens."
            )
        return self.tokenizer

    def _tokenize(
        self,
        input: str | list[str],
        prepend_bos: bool | None,
        padding_side: Side | None,
        truncate: bool = True,
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Tokens and their exact padding mask, on the CPU."""
        tokenizer = self._need_tokenizer("text input")
        if padding_side not in (None, "left", "right"):
            raise TokenError(f"padding_side={padding_side!r} must be 'left', 'right' or None.")
        itself = self.cfg.tokenizer_prepends_bos
        if itself is None:
            raise TokenError(
                "model.tokenizer was assigned, so it is not known whether it prepends BOS. "
                "Call model.set_tokenizer(tokenizer) instead."
            )
        if prepend_bos and not itself and not token_is_known(tokenizer, tokenizer.bos_token):
            raise TokenError(
                "prepend_bos=True was asked for, but the tokenizer has no BOS token. Set "
                "tokenizer.bos_token to a token it knows and call set_tokenizer, or leave "
                "prepend_bos out."
            )
        return tokenize(
            tokenizer,
            [input] if isinstance(input, str) else input,
            prepend_bos=override_or_use_default_value(self.cfg.default_prepend_bos, prepend_bos),
            tokenizer_prepends_bos=itself,
            padding_side=padding_side or tokenizer.padding_side,
            max_length=self.cfg.n_ctx if truncate else None,
        )

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: Side | None = USE_DEFAULT_VALUE,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Text to token ids; a list of texts is padded to the longest.

        Args:
            prepend_bos: Put BOS in front; by default ``cfg.default_prepend_bos``.
            padding_side: "left" or "right"; by default the tokenizer's.
            move_to_device: To ``cfg.device``; else the tokens stay on the CPU.
            truncate: Cut texts to ``cfg.n_ctx`` tokens.

        Raises: TokenError if the model has no tokenizer, or texts of different length cannot be
            padded.
        """
        tokens, _ = self._tokenize(input, prepend_bos, padding_side, truncate)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def to_string(self, tokens: Any) -> str | list[str]:
        """Token ids to text: one text for ``[pos]`` (or one id), a list for ``[batch, pos]``.

        Special tokens are shown, spaces are not tidied up: texts round-trip.

        Args:
            tokens: A tensor, array or list of ids, or a list of such rows.
        """
        tokenizer = self._need_tokenizer("to_string")
        ids = _as_lists(tokens)
        ids: Any = [ids] if isinstance(ids, int) else ids
        if all(isinstance(item, int) for item in ids):
            return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if all(isinstance(item, int) for row in ids for item in row):
            return tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        raise TokenError(
            f"to_string takes ids [pos] or [batch, pos], found shape {list(np.shape(ids))}."
        )

    def to_str_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: Side | None = USE_DEFAULT_VALUE,
    ) -> list[Any]:
        """Each token as a string, special tokens included.

        Args:
            input: A text, ids ``[pos]`` or ``[1, pos]`` (tensor, array or a list of integers), or a
                list of texts or of ids, which gives a list of lists.
            prepend_bos, padding_side: For text; see `to_tokens`.
        """
        tokenizer = self._need_tokenizer("to_str_tokens")
        if isinstance(input, list | tuple) and not all(
            isinstance(item, int | np.integer) for item in input
        ):
            return [self.to_str_tokens(item, prepend_bos, padding_side) for item in input]
        if isinstance(input, str):
            ids = self.to_tokens(input, prepend_bos, padding_side, move_to_device=False)[0].tolist()
        else:
            ids = _one_row(input, "to_str_tokens")
        # transformers decodes no rows at all as one empty string.
        rows = [[i] for i in ids]
        return tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False) if rows else []

    def to_single_token(self, string: str) -> int:
        """The id of a string that is exactly one token, without BOS.

        Raises: TokenError if it is none or several; the message shows which.
        """
        ids = self.to_tokens(string, prepend_bos=False, move_to_device=False)[0].tolist()
        if len(ids) == 1:
            return ids[0]
        other = string.lstrip() if string.startswith(" ") else " " + string
        hint = ""
        if self.to_tokens(other, prepend_bos=False, move_to_device=False).shape[1] == 1:
            hint = f" {other!r}, {'without' if string.startswith(' ') else 'with'} a space, is one."
        pieces = self.to_str_tokens(ids) if ids else []
        raise TokenError(
            f"{string!r} must be a single token, but is {len(ids)}: {pieces}.{hint} "
            f"Choose a word that is one token, or use to_tokens(..., prepend_bos=False)."
        )

    def to_single_str_token(self, int_token: int) -> str:
        """The string of one token id."""
        if not isinstance(int_token, int):
            raise TokenError(
                f"to_single_str_token takes one integer, found {type(int_token).__name__}."
            )
        return self.to_str_tokens([int_token])[0]

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: Side | None = USE_DEFAULT_VALUE,
    ) -> int:
        """Where a token stands in a prompt.

        Args:
            single_token: An id, or a string that is exactly one token.
            input: A text, or ids ``[pos]`` or ``[1, pos]``.
            mode: "first" or "last", for a token that occurs several times.
            prepend_bos, padding_side: For text. A BOS in front counts as position 0.

        Raises: TokenError if the token does not occur; the message shows the tokens that do.
        """
        if mode not in ("first", "last"):
            raise ValueError(
                f"mode={mode!r} must be 'first' or 'last'.{did_you_mean(mode, ['first', 'last'])}"
            )
        if isinstance(input, str):
            ids = self.to_tokens(input, prepend_bos, padding_side, move_to_device=False)[0].tolist()
        else:
            ids = _one_row(input, "get_token_position")
        wanted = single_token
        if isinstance(wanted, str):
            wanted = self.to_single_token(wanted)
        elif isinstance(wanted, Tensor):
            wanted = int(wanted.item())
        if wanted in ids:
            return ids.index(wanted) if mode == "first" else len(ids) - 1 - ids[::-1].index(wanted)
        shown: Any = ids if self.tokenizer is None else self.to_str_tokens(ids)
        more = f" and {len(ids) - _SHOWN_TOKENS} more" if len(ids) > _SHOWN_TOKENS else ""
        raise TokenError(
            f"token {single_token!r} (id {wanted}) does not occur in the prompt, whose tokens are "
            f"{shown[:_SHOWN_TOKENS]}{more}. A leading space makes another token."
        )

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "..."]
    ) -> Float[Tensor, "... d_model"]:
        """Columns of W_U: the residual-stream direction whose dot product is a token's logit.

        A string must be a single token. One token, in whatever form, gives ``[d_model]``; several
        give one direction each. Exact logit directions only if the final norm's gain is folded
        into W_U (``fold_ln=True``), and up to the norm's scale: see
        ``ActivationCache.apply_ln_to_stack``. ``b_U`` is not part of it.

        Cost: copies only the rows asked for. A single direction is a view of W_U.
        """
        # Where W_U is not in memory, a few columns of it are read.
        columns = getattr(getattr(self, "unembed", None), "columns", None)
        if isinstance(tokens, Tensor) and columns is not None:
            some = columns(tokens.flatten())
            if some is not None:
                shape = tokens.shape if tokens.numel() > 1 else ()
                return some[0].reshape(*shape, self.cfg.d_model)
        if isinstance(tokens, Tensor) and tokens.numel() > 1:
            # W_U lies in memory as [d_vocab, d_model], so these are whole rows.
            return self.W_U.t()[tokens.to(self.W_U.device)]
        if isinstance(tokens, str):
            return self.W_U[:, self.to_single_token(tokens)]
        if isinstance(tokens, Tensor) and tokens.numel() == 1:
            return self.W_U[:, int(tokens.item())]
        if isinstance(tokens, int):
            return self.W_U[:, tokens]
        raise TokenError(
            f"tokens_to_residual_directions takes a string, an id or a tensor of ids, found "
            f"{f'shape {list(tokens.shape)}' if isinstance(tokens, Tensor) else type(tokens)}."
        )


def _as_lists(tokens: Any) -> Any:
    """A tensor, array or nested list of them as plain lists of integers."""
    if isinstance(tokens, Tensor | np.ndarray | np.generic):
        return tokens.tolist()
    if isinstance(tokens, list | tuple):
        return [_as_lists(item) for item in tokens]
    return tokens


def _one_row(tokens: Any, what: str) -> list[int]:
    row = torch.as_tensor(tokens).squeeze()
    if row.ndim > 1:
        raise TokenError(
            f"{what} takes the tokens of one text, [pos] or [1, pos]; found "
            f"{list(torch.as_tensor(tokens).shape)}. Give one row."
        )
    return row.reshape(-1).tolist()
