"""`BertNextSentencePrediction`: a `HookedEncoder` that says whether one text follows another."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastlens.cache import ActivationCache
from fastlens.errors import TokenError
from fastlens.model.hooked_encoder import GivenTokens, HookedEncoder, Tokens

PREDICTIONS = ("The sentences are sequential", "The sentences are NOT sequential")


class BertNextSentencePrediction:
    """Next-sentence prediction with an encoder's pooler and NSP head (Devlin et al. 1810.04805).

    >>> nsp = BertNextSentencePrediction(HookedEncoder.from_pretrained("bert-base-cased"))
    >>> nsp(["She opened the box.", "It was empty."], return_type="predictions")
    'The sentences are sequential'

    Attributes:
        model: The encoder; hooks are put on it.
    """

    def __init__(self, model: HookedEncoder):
        self.model = model

    @property
    def cfg(self) -> Any:
        """The encoder's config."""
        return self.model.cfg

    @property
    def hook_dict(self) -> dict[str, Any]:
        """The encoder's HookPoints by name."""
        return self.model.hook_dict

    def __call__(
        self,
        input: list[str] | GivenTokens,
        return_type: str | None = "logits",
        token_type_ids: GivenTokens | None = None,
        one_zero_attention_mask: Tensor | None = None,
    ) -> Any:
        """`forward`."""
        return self.forward(
            input,
            return_type=return_type,
            token_type_ids=token_type_ids,
            one_zero_attention_mask=one_zero_attention_mask,
        )

    def to_tokens(
        self,
        input: list[str],
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> tuple[Tokens, Tokens, Tokens]:
        """One row ``[CLS] first [SEP] second [SEP]``: tokens, token types, attention mask.

        Args:
            input: Two texts.
            move_to_device, truncate: See `HookedEncoder.to_tokens`.

        Raises: TokenError (a ValueError) unless there are two texts, or without a tokenizer.
        """
        is_pair = isinstance(input, list | tuple) and len(input) == 2
        # Two lists would be read as first texts and second texts, not as two pairs.
        if not is_pair or not all(isinstance(text, str) for text in input):
            raise TokenError(
                f"next-sentence prediction takes two texts, as a list; found {input!r}. For "
                f"several pairs tokenize them yourself, and pass tokens and token_type_ids."
            )
        return self.model._encode((input[0], input[1]), move_to_device, truncate)

    def forward(
        self,
        input: list[str] | GivenTokens,
        return_type: str | None = "logits",
        token_type_ids: GivenTokens | None = None,
        one_zero_attention_mask: Tensor | None = None,
    ) -> Any:
        """Whether the second text follows the first.

        Args:
            input: Two texts, or tokens ``[batch, pos]`` of pairs.
            return_type: ``"logits"``, ``"predictions"``, or None (run and return nothing).
            token_type_ids: 0 for the first text, 1 for the second; needed with tokens.
            one_zero_attention_mask: 0 for padding; see `HookedEncoder.encoder_output`.

        Returns: logits ``[batch, 2]`` for "it follows" and "it does not"; or the prediction as a
            sentence, a list of them for a batch of more than one.

        Raises: TokenError (a ValueError) for tokens without ``token_type_ids``, which would be
            read as one text; WeightsError for a checkpoint without pooler or NSP head.
        """
        if return_type not in (None, "logits", "predictions"):
            raise ValueError(
                f"return_type={return_type!r} must be 'logits', 'predictions' or None."
            )
        if not isinstance(input, Tensor):
            tokens, types, mask = self.to_tokens(input)
            token_type_ids = types if token_type_ids is None else token_type_ids
            if one_zero_attention_mask is None:
                one_zero_attention_mask = mask
        elif token_type_ids is None:
            raise TokenError(
                "tokens were given without token_type_ids, so both texts would be read as one. "
                "Pass token_type_ids (0 for the first text, 1 for the second), or two texts."
            )
        else:
            tokens = input
        self.model.check_present("pooler", "nsp_head")
        resid = self.model.encoder_output(tokens, token_type_ids, one_zero_attention_mask)
        logits = self.model.nsp_head(self.model.pooler(resid))
        if return_type == "predictions":
            sentences = [PREDICTIONS[choice] for choice in logits.argmax(-1).tolist()]
            return sentences[0] if len(sentences) == 1 else sentences
        return None if return_type is None else logits

    @contextlib.contextmanager
    def _as_forward(self) -> Iterator[None]:
        """The encoder's own ways to run, with this forward instead of its own."""
        before = vars(self.model).get("forward")
        self.model.forward = self.forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.model.forward
            if before is not None:
                self.model.forward = before

    def run_with_cache(
        self,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """One `forward` and its activations; arguments are `HookedEncoder.run_with_cache`'s."""
        with self._as_forward():
            output, cache = self.model.run_with_cache(
                *model_args, return_cache_object=False, remove_batch_dim=remove_batch_dim, **kwargs
            )
        if return_cache_object:
            assert isinstance(cache, dict)
            cache = ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
        return output, cache

    def run_with_hooks(self, *model_args: Any, **kwargs: Any) -> Any:
        """One `forward` with hooks; arguments are `HookedEncoder.run_with_hooks`'."""
        with self._as_forward():
            return self.model.run_with_hooks(*model_args, **kwargs)
