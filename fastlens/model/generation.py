"""The part of `HookedTransformer` that continues text."""

import contextlib
import dataclasses
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.embed import Unembed
from fastlens.components.kv_cache import TransformerLensKeyValueCache
from fastlens.components.norms import LayerNorm, LayerNormPre, RMSNorm, RMSNormPre
from fastlens.components.rotary_tables import turns_long
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ShapeError, TokenError, did_you_mean
from fastlens.generate import Generated, Step, Stop, generate_tokens, stream_tokens
from fastlens.hooks.point import is_live
from fastlens.ops.activations import soft_cap
from fastlens.sampling import Sampling
from fastlens.tokens import USE_DEFAULT_VALUE, get_prompt_mask, override_or_use_default_value

_RETURN_TYPES = ("input", "str", "tokens", "embeds")
_STREAMED_TYPES = ("input", "tokens", "tensor")
_KNOWN_KWARGS = ("output_logits", "return_dict_in_generate", "repetition_penalty")
_OUR_TAIL = (LayerNorm, LayerNormPre, RMSNorm, RMSNormPre, Unembed, nn.Identity)


@dataclass
class Prompt:
    """What `generate` continues.

    ``given`` is the input as tokens, or as embeddings. ``run`` is the same with every row's padding
    moved to the left, so that the next token follows the last column; ``mask`` is 0 for that
    padding, None where there is none.
    """

    kind: Literal["str", "tokens", "embeds"]
    given: Tensor
    run: Tensor
    mask: Int[Tensor, "batch pos"] | None

    @property
    def tokens(self) -> Int[Tensor, "batch pos"] | None:
        """The tokens as run, or None for embeddings."""
        return None if self.kind == "embeds" else self.run

    @property
    def token_dtype(self) -> torch.dtype:
        """Of the tokens that come back: the prompt's, or int64 for embeddings."""
        return torch.int64 if self.kind == "embeds" else self.given.dtype

    @property
    def longest(self) -> int:
        """Tokens of the longest row, padding not counted."""
        return self.run.shape[1] if self.mask is None else int(self.mask.sum(-1).max())


class GenerationMixin:
    """``generate`` and ``generate_stream``, with TransformerLens 3's arguments."""

    cfg: HookedTransformerConfig
    tokenizer: Any
    embed: nn.Module
    hook_embed: nn.Module
    hook_tokens: nn.Module
    get_residual: Any
    forward: Any
    _to_part: Any
    _tokenize: Any
    _need_tokenizer: Any

    @torch.no_grad()
    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: Literal["left", "right"] | None = USE_DEFAULT_VALUE,
        return_type: str | None = "input",
        verbose: bool = True,
        **generation_kwargs: Any,
    ) -> Any:
        """Continue text, tokens or embeddings. Hooks on the model act at every step.

        A batch of prompts of different length gives what each prompt alone gives, with or without
        the KV cache: padding is masked and does not shift positions. Tokens padded on the right
        are run padded on the left; padding is guessed from the tokens, and a run of pad tokens
        that all rows share is taken for text if the pad token is also BOS or EOS.

        Args:
            input: A text, a list of texts, tokens ``[batch, pos]`` or embeddings
                ``[batch, pos, d_model]`` (before positions are added).
            max_new_tokens: Fewer are made if every row stops, or learned positions run out.
            stop_at_eos: End a row at an EOS token; it is filled with EOS while others go on.
            eos_token_id: One id or several; by default the tokenizer's.
            do_sample: Draw from the distribution; False takes the largest logit.
            top_k, top_p, temperature, freq_penalty: See `fastlens.sampling.sample_logits`. The
                frequency penalty counts prompt and new tokens, not padding.
            use_past_kv_cache: Run each token once. False runs all of the text at every step.
            prepend_bos, padding_side: For text; see `to_tokens`. Lists are padded left whatever is
                said here. For tokens they say where padding is.
            return_type: "str", "tokens", "embeds", or "input": text for text, else what came in.
            verbose: Show a progress bar.
            generation_kwargs: ``output_logits=True`` returns transformers'
                ``GenerateDecoderOnlyOutput`` with ``sequences`` and the ``logits`` of every step.
                ``repetition_penalty`` is that of `fastlens.sampling.sample_logits`
                (TransformerLens ignores it). Others are warned about and ignored.

        Returns: the prompt and its continuation; for embeddings with another ``return_type`` the
            continuation alone. A single text (or a list of one) gives one string.

        Raises: TokenError for inputs that cannot be continued, and where ``stop_at_eos`` finds no
            EOS token.
        """
        if return_type not in _RETURN_TYPES:
            raise TokenError(
                f"return_type={return_type!r} must be one of {_RETURN_TYPES}."
                f"{did_you_mean(str(return_type), _RETURN_TYPES)}"
            )
        _warn_of_unknown(generation_kwargs)
        repetition_penalty = generation_kwargs.get("repetition_penalty")
        sampling = Sampling(
            do_sample,
            top_k,
            top_p,
            temperature,
            freq_penalty,
            1.0 if repetition_penalty is None else float(repetition_penalty),
        )
        prompt = self._prompt(input, prepend_bos, padding_side)
        sampling = _without_counts(sampling) if prompt.kind == "embeds" else sampling
        stop = stop_at(self.tokenizer, eos_token_id) if stop_at_eos else None
        n_steps = min(max_new_tokens, self._room(prompt))
        with evaluating(self):
            made = generate_tokens(
                self._step(prompt, n_steps, use_past_kv_cache),
                len(prompt.run),
                n_steps,
                device=prompt.run.device,
                keep_logits=bool(generation_kwargs.get("output_logits")),
                sampling=sampling,
                stop=stop,
                prompt=prompt.tokens,
                prompt_mask=prompt.mask,
                verbose=verbose,
            )
        if not made.stopped:
            self._warn_if_full(n_steps, max_new_tokens)
        return self._result(prompt, made, return_type)

    def generate_stream(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: Literal["left", "right"] | None = USE_DEFAULT_VALUE,
        return_type: str | None = "input",
        verbose: bool = True,
    ) -> Generator[Int[Tensor, "batch piece"], None, None]:
        """Continue a prompt as `generate` does, and give the tokens while they are made.

        The pieces one after the other are ``generate(..., return_type="tokens")``: the prompt comes
        with the first new token, in the first piece (for embeddings there are new tokens only).
        A piece is given as soon as it holds ``max_tokens_per_yield`` tokens a row, the prompt
        counted; the last one when all rows have stopped or enough is made.

        Arguments are checked at once; the model runs when pieces are asked for, without gradients
        and in evaluation mode, which ends with the generator.

        Args:
            max_tokens_per_yield: The size of a piece.
            return_type: Pieces are tokens whatever is said here, as TransformerLens' are; "str"
                and others are warned about. `tokenizer.decode` makes text of them.

        The other arguments and the errors are `generate`'s.
        """
        if return_type not in _STREAMED_TYPES:
            warnings.warn(
                f"generate_stream gives tokens, as TransformerLens' does, not "
                f"return_type={return_type!r}. Decode the pieces with model.to_string.",
                stacklevel=2,
            )
        sampling = Sampling(do_sample, top_k, top_p, temperature, freq_penalty)
        prompt = self._prompt(input, prepend_bos, padding_side)
        sampling = _without_counts(sampling) if prompt.kind == "embeds" else sampling
        stop = stop_at(self.tokenizer, eos_token_id) if stop_at_eos else None
        n_steps = min(max_new_tokens, self._room(prompt))
        step = self._step(prompt, n_steps, use_past_kv_cache)

        def pieces() -> Generator[Tensor, None, None]:
            waiting = [] if prompt.kind == "embeds" else [prompt.given]
            size = 0 if prompt.kind == "embeds" else prompt.given.shape[1]
            stopped = False
            with evaluating(self):
                for made in stream_tokens(
                    step,
                    len(prompt.run),
                    n_steps,
                    device=prompt.run.device,
                    sampling=sampling,
                    stop=stop,
                    prompt=prompt.tokens,
                    prompt_mask=prompt.mask,
                    verbose=verbose,
                ):
                    waiting.append(made.tokens[:, None].to(prompt.token_dtype))
                    size, stopped = size + 1, made.stopped
                    if size >= max_tokens_per_yield:
                        yield torch.cat(waiting, 1)
                        waiting, size = [], 0
                if waiting and n_steps > 0:
                    yield torch.cat(waiting, 1)
            if not stopped:
                self._warn_if_full(n_steps, max_new_tokens)

        return pieces()

    def _warn_if_full(self, n_steps: int, max_new_tokens: int) -> None:
        if n_steps < max_new_tokens:
            warnings.warn(
                f"{max_new_tokens} new tokens were asked for, but the {self.cfg.n_ctx} positions "
                f"of this model (n_ctx) are full after {n_steps}: returning those.",
                stacklevel=3,
            )

    # -- the prompt --------------------------------------------------------------------------

    def _prompt(
        self, input: Any, prepend_bos: bool | None, padding_side: Literal["left", "right"] | None
    ) -> Prompt:
        device = self.cfg.device
        if padding_side not in (None, "left", "right"):
            raise TokenError(f"padding_side={padding_side!r} must be 'left', 'right' or None.")
        if isinstance(input, str) or (
            isinstance(input, list) and all(isinstance(item, str) for item in input)
        ):
            tokens, mask = self._tokenize(input, prepend_bos, "left")
            tokens, mask = tokens.to(device), mask.to(device)
            _refuse(bool((mask.sum(-1) == 0).any()))
            return Prompt("str", tokens, tokens, None if bool(mask.all()) else mask)
        if not isinstance(input, Tensor):
            raise TokenError(
                f"generate continues a string, a list of strings, or a tensor of tokens or "
                f"embeddings; found {type(input).__name__}."
            )
        # A copy: a stream is run later, when the caller may have written to the tensor.
        given = input.to(device, copy=True)
        if given.is_floating_point():
            if given.ndim != 3 or given.shape[-1] != self.cfg.d_model:
                raise ShapeError(
                    f"embeddings must be [batch, pos, {self.cfg.d_model}], found "
                    f"{list(given.shape)}."
                )
            _refuse(given.numel() == 0)
            return Prompt("embeds", given, given, None)
        given = given[None] if given.ndim == 1 else given
        if given.ndim != 2:
            raise ShapeError(f"tokens must be [batch, pos], found {list(given.shape)}.")
        _refuse(given.numel() == 0)
        bos = override_or_use_default_value(self.cfg.default_prepend_bos, prepend_bos)
        mask = get_prompt_mask(self.tokenizer, given, bos, padding_side)
        if bool(mask.all()):
            return Prompt("tokens", given, given, None)
        # A stable sort by "is a token" moves padding in front and keeps the text in order.
        kept, order = torch.sort(mask, dim=-1, stable=True)
        return Prompt("tokens", given, given.gather(1, order), kept)

    def _room(self, prompt: Prompt) -> int:
        """New tokens that learned positions have room for; the last one needs no position."""
        if self.cfg.positional_embedding_type not in ("standard", "shortformer"):
            return torch.iinfo(torch.int64).max
        room = self.cfg.n_ctx - prompt.longest + 1
        if room < 1:
            raise TokenError(
                f"the prompt has {prompt.longest} tokens, and this model {self.cfg.n_ctx} "
                f"positions (n_ctx). Give a shorter prompt."
            )
        return room

    # -- running -----------------------------------------------------------------------------

    def _step(self, prompt: Prompt, n_steps: int, use_cache: bool) -> Step:
        """The function that runs what is new and gives the logits after it."""
        batch, length = prompt.run.shape[:2]
        mask = None
        if prompt.mask is not None:
            mask = prompt.mask.new_ones(batch, length + n_steps)
            mask[:, :length] = prompt.mask
        # Where earlier tokens see later ones, their keys change with every token: run them all.
        if use_cache and self.cfg.attention_dir == "causal":
            cache = TransformerLensKeyValueCache.init_cache(self.cfg, self.cfg.device, batch)
            return self._cached_step(prompt, mask, cache, n_steps)
        return self._full_step(prompt, mask, n_steps)

    def _cached_step(
        self,
        prompt: Prompt,
        mask: Tensor | None,
        cache: TransformerLensKeyValueCache,
        n_steps: int,
    ) -> Step:
        done = 0
        made: list[Tensor] = []
        full_step: Step | None = None

        def step(new: Tensor | None) -> Tensor:
            nonlocal cache, done, full_step
            kept = (entry.past_keys.shape[1] for entry in cache.entries)
            if full_step is None and any(n != done for n in kept):
                # A part that was replaced keeps no keys, or not all: it must be shown all tokens.
                shown = dataclasses.replace(prompt, run=self._text(prompt, made))
                full_step = self._full_step(shown, mask, n_steps)
            if full_step is not None:
                return full_step(new)
            run = prompt.run if new is None else new[:, None]
            made.extend([] if new is None else [run])
            if self._turns_long(prompt, mask, done):
                cache, done = cache.init_cache(self.cfg, self.cfg.device, len(run)), 0
                run = self._text(prompt, made)
            offset, done = done, done + run.shape[1]
            seen = None if mask is None else mask[:, :done]
            return self._next_logits(self._embedded(run), offset, seen, cache)

        return step

    def _text(self, prompt: Prompt, made: Sequence[Tensor]) -> Tensor:
        """The prompt and the tokens made so far, as `_embedded` takes them."""
        is_embeds = prompt.kind == "embeds"
        return torch.cat([prompt.run, *(self._embedded(x) if is_embeds else x for x in made)], 1)

    def _turns_long(self, prompt: Prompt, mask: Tensor | None, done: int) -> bool:
        """Whether the next token makes one of the texts a long one, all of it (LongRoPE)."""
        if self.cfg.longrope_short_factor is None:
            return False
        before = torch.full((len(prompt.run),), done) if mask is None else mask[:, :done].sum(1)
        return bool(turns_long(self.cfg, before, before + 1).any())

    def _full_step(self, prompt: Prompt, mask: Tensor | None, n_steps: int) -> Step:
        length = prompt.run.shape[1]
        text = prompt.run.new_empty(len(prompt.run), length + n_steps, *prompt.run.shape[2:])
        text[:, :length] = prompt.run

        def step(new: Tensor | None) -> Tensor:
            nonlocal length
            if new is not None:
                text[:, length] = self._embedded(new[:, None])[:, 0] if text.ndim == 3 else new
                length += 1
            seen = None if mask is None else mask[:, :length]
            return self._next_logits(self._embedded(text[:, :length]), 0, seen, None)

        return step

    def _embedded(self, run: Tensor) -> Float[Tensor, "batch pos d_model"]:
        # Copies: a hook that writes in place must not write to the caller's tensor, nor to what the
        # next step reads. Rotary and ALiBi models add nothing to embeddings before the first hook.
        if run.ndim == 3:
            return run.clone()
        run = self.hook_tokens(run.clone()) if self.cfg.use_hook_tokens else run
        return self.hook_embed(self.embed(run))

    def _next_logits(
        self,
        embedded: Float[Tensor, "batch pos d_model"],
        offset: int,
        mask: Int[Tensor, "batch all_pos"] | None,
        cache: TransformerLensKeyValueCache | None,
    ) -> Float[Tensor, "batch d_vocab_out"]:
        """Logits of the last position, the only one unembedded if nobody looks at the others.

        On the device of the embeddings, where tokens are chosen.
        """
        residual, positions = self.get_residual(embedded, offset, attention_mask=mask)
        arguments = {
            "start_at_layer": 0,
            "shortformer_pos_embed": positions,
            "attention_mask": mask,
            "past_kv_cache": cache,
        }
        if embedded.shape[1] == 1 or not self._tail_is_plain():
            logits = self.forward(residual, return_type="logits", **arguments)[:, -1]
            return logits.to(embedded.device)
        residual = self.forward(residual, stop_at_layer=self.cfg.n_layers, **arguments)[:, -1:]
        for name, part in self._tail().items():
            residual = part(self._to_part(name, residual))
        logits = soft_cap(residual[:, -1], self.cfg.output_logits_soft_cap)
        return logits.to(embedded.device)

    def _tail(self) -> dict[str, nn.Module]:
        names = ["unembed"] if self.cfg.normalization_type is None else ["ln_final", "unembed"]
        return {name: getattr(self, name) for name in names}

    def _tail_is_plain(self) -> bool:
        """Whether the final norm and unembedding are ours, unhooked, and run by our forward."""
        ours = type(self).forward.__module__.startswith("fastlens.")
        if not ours or "forward" in self.__dict__:
            return False
        return all(_is_plain(part) for part in self._tail().values())

    # -- the result --------------------------------------------------------------------------

    def _result(self, prompt: Prompt, made: Generated, return_type: str | None) -> Any:
        tokens = made.tokens
        if prompt.kind != "embeds":
            tokens = torch.cat([prompt.given, tokens.to(prompt.token_dtype)], 1)
        if made.logits is not None:
            from transformers.generation.utils import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=tokens, logits=made.logits)  # type: ignore[arg-type]
        if return_type == "input":
            return_type = prompt.kind
        if return_type == "tokens":
            return tokens
        if return_type == "embeds":
            new = self.embed(tokens)
            return torch.cat([prompt.given, new], 1) if prompt.kind == "embeds" else new
        decode = self._need_tokenizer("return_type='str'").decode
        texts = [decode(row, skip_special_tokens=True) for row in tokens]
        return texts[0] if len(texts) == 1 else texts


def stop_at(tokenizer: Any, eos_token_id: int | Sequence[int] | None) -> Stop:
    """The tokens that end a text: those given, else the tokenizer's EOS.

    Raises: TokenError if there are none.
    """
    own = None if tokenizer is None else tokenizer.eos_token_id
    if eos_token_id is None:
        eos_token_id = own
    if eos_token_id is None:
        found = "this model has no tokenizer" if tokenizer is None else "its tokenizer has none"
        raise TokenError(
            f"stop_at_eos=True needs an EOS token, and {found}. Pass eos_token_id=, or "
            f"stop_at_eos=False."
        )
    if isinstance(eos_token_id, int):
        return Stop([eos_token_id], eos_token_id)
    ends = [int(token) for token in eos_token_id]
    return Stop(ends, ends[0] if own is None else own)


def _without_counts(sampling: Sampling) -> Sampling:
    """The same without penalties, which count tokens: embeddings have none."""
    for name, none in (("freq_penalty", 0.0), ("repetition_penalty", 1.0)):
        if getattr(sampling, name) != none:
            warnings.warn(
                f"{name} counts tokens, and this prompt is embeddings: it is ignored. Pass tokens "
                f"to use it.",
                stacklevel=3,
            )
            sampling = dataclasses.replace(sampling, **{name: none})
    return sampling


def _refuse(empty: bool) -> None:
    if empty:
        raise TokenError(
            "an empty prompt leaves nothing to continue. Give some text, or prepend_bos=True with "
            "a tokenizer that has a BOS token."
        )


def _is_plain(part: nn.Module) -> bool:
    """Whether a part is ours, and neither it nor its hook points are hooked or replaced."""
    if type(part) not in _OUR_TAIL or "forward" in part.__dict__:
        return False
    state = part.__dict__
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(state[name] for name in hooks):
        return False
    return not any(is_live(child) for child in part.children())


def _warn_of_unknown(generation_kwargs: dict[str, Any]) -> None:
    unknown = [name for name in generation_kwargs if name not in _KNOWN_KWARGS]
    if unknown:
        arguments = [*GenerationMixin.generate.__annotations__, *_KNOWN_KWARGS]
        near = "".join(did_you_mean(name, arguments) for name in unknown)
        warnings.warn(
            f"generate ignores unsupported generation kwargs: {', '.join(unknown)}.{near}",
            stacklevel=3,
        )


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside, and each module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
