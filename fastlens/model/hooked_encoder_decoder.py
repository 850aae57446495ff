"""`HookedEncoderDecoder`: TransformerLens 3's class for T5, running fused wherever nobody looks."""

import logging
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.embed import Embed, Unembed
from fastlens.components.kv_cache import TransformerLensKeyValueCache
from fastlens.components.norms import RMSNorm
from fastlens.components.t5_block import T5Block
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, ShapeError, TokenError, did_you_mean
from fastlens.generate import Step, generate_tokens
from fastlens.hooks.point import HookPoint, is_live
from fastlens.model.generation import evaluating, stop_at
from fastlens.model.open_model import open_model
from fastlens.model.root import TransformerRoot, named_tokenizer
from fastlens.model.weights import StackedWeights
from fastlens.sampling import Sampling
from fastlens.weights import initialize, load

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="HookedEncoderDecoder")

_RETURN_TYPES = ("input", "str", "tensor", "tokens")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class HookedEncoderDecoder(StackedWeights, TransformerRoot):
    """A T5 whose every activation has a name: ``encoder.{l}...`` and ``decoder.{l}...``.

    The encoder reads the whole input in both directions; the decoder writes token by token and
    attends to the encoder's output through ``decoder.{l}.cross_attn``. Each stack has
    ``cfg.n_layers`` blocks. Weights are never processed (folded or centred).

    `ActivationCache` gives activations by full name; its methods that take the residual stream
    apart are for models with one stack of ``blocks``.
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any] | str,
        tokenizer: Any = None,
        move_to_device: bool = True,
        **kwargs: Any,
    ):
        """A model of this config; matrices are drawn from N(0, ``cfg.initializer_range`` ^ 2).

        Args:
            cfg: The config, or a dict of its fields. ``positional_embedding_type`` is
                "relative_positional_bias". ``tie_word_embeddings`` says, as in TransformerLens,
                that what the unembedding reads is divided by the square root of ``d_model``.
            tokenizer: A Hugging Face tokenizer; by default the one ``cfg.tokenizer_name`` names.
                Without one the model takes tokens only, and ``cfg.d_vocab`` must be set.
            move_to_device: Move to ``cfg.device``.
            kwargs: Ignored with a warning, as TransformerLens takes any.

        Raises: ConfigError for a config that cannot be built.
        """
        super().__init__()
        if isinstance(cfg, str):
            raise ConfigError(
                f"HookedEncoderDecoder({cfg!r}) takes a config. To load a model by name use "
                f"HookedEncoderDecoder.from_pretrained({cfg!r})."
            )
        if kwargs:
            logger.warning("HookedEncoderDecoder ignores %s.", ", ".join(sorted(kwargs)))
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        _check(cfg)
        if tokenizer is None and cfg.tokenizer_name is not None:
            tokenizer = named_tokenizer(cfg.tokenizer_name, cfg.trust_remote_code)
        self.tokenizer = tokenizer
        if cfg.d_vocab == -1:
            if tokenizer is None:
                raise ConfigError("d_vocab is not set. Give d_vocab in the config, or a tokenizer.")
            cfg.d_vocab = len(tokenizer)
        if cfg.d_vocab_out == -1:
            cfg.d_vocab_out = cfg.d_vocab
        layers = range(cfg.n_layers)
        self.embed = Embed(cfg)
        self.encoder = nn.ModuleList([T5Block(cfg, n, is_decoder=False) for n in layers])
        self.encoder_final_ln = RMSNorm(cfg)
        self.decoder = nn.ModuleList([T5Block(cfg, n, is_decoder=True) for n in layers])
        self.decoder_final_ln = RMSNorm(cfg)
        self.unembed = Unembed(cfg)
        self.hook_embed = HookPoint("batch pos d_model")
        if cfg.init_weights:
            if cfg.seed is not None:
                torch.manual_seed(cfg.seed)
            initialize.gpt2(self.named_parameters(), cfg.initializer_range)
        if move_to_device:
            nn.Module.to(self, cfg.device)
        self.setup()

    @classmethod
    def from_pretrained(
        cls: type[T],
        model_name: str | Path,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        hf_model: Any = None,
        device: str | torch.device | None = None,
        tokenizer: Any = None,
        move_to_device: bool = True,
        dtype: str | torch.dtype | None = torch.float32,
        **from_pretrained_kwargs: Any,
    ) -> T:
        """Load a T5: original, v1.1 or Flan.

        Args:
            model_name: A hub repository or alias ("t5-small"), or a folder in Hugging Face's
                layout.
            checkpoint_index, checkpoint_value: As in `HookedTransformer.from_pretrained`.
            hf_model: A ``T5ForConditionalGeneration`` in memory; nothing is then fetched.
            device: Where the model goes; by default CUDA if there is any.
            tokenizer: By default the one that comes with the weights.
            move_to_device: False leaves the model on the CPU.
            dtype: Of the parameters; None is float32.
            from_pretrained_kwargs: As in `HookedTransformer.from_pretrained`.

        Raises: ModelNameError, SourceError, ConfigError, WeightsError; see `open_source`.
        """
        source, cfg, verbose = open_model(
            "HookedEncoderDecoder",
            model_name,
            from_pretrained_kwargs,
            hf_model=hf_model,
            dtype=torch.float32 if dtype is None else dtype,
            device=device,
            checkpoint_index=checkpoint_index,
            checkpoint_value=checkpoint_value,
        )
        tokenizer = source.tokenizer() if tokenizer is None else tokenizer
        model = cls(cfg, tokenizer, move_to_device=False)
        load.load_source(model, source, {})
        if move_to_device:
            nn.Module.to(model, cfg.device)
        if verbose:
            # As TransformerLens does.
            print(f"Loaded pretrained model {model_name} into HookedEncoderDecoder")  # noqa: T201
        return model

    # -- text --------------------------------------------------------------------------------

    def to_tokens(
        self, input: str | list[str], move_to_device: bool = True, truncate: bool = True
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Tokens and their mask (0 for padding), as the tokenizer makes them: T5's ends in EOS.

        Args:
            move_to_device: To ``cfg.device``; else they stay on the CPU.
            truncate: Cut texts to ``cfg.n_ctx`` tokens.

        Raises: TokenError if there is no tokenizer, or it cannot pad several texts.
        """
        tokenizer = self._need_tokenizer("text input")
        texts = [input] if isinstance(input, str) else input
        if tokenizer.pad_token_id is None and len(texts) > 1:
            raise TokenError(
                "several texts are padded to one length, and the tokenizer has no pad token. Set "
                "tokenizer.pad_token, or pass one text."
            )
        encoded = tokenizer(
            texts,
            return_tensors="pt",
            padding=tokenizer.pad_token_id is not None,
            truncation=truncate,
            max_length=self.cfg.n_ctx if truncate else None,
            return_attention_mask=True,
        )
        tokens, mask = encoded["input_ids"], encoded["attention_mask"]
        if move_to_device:
            tokens, mask = tokens.to(self.cfg.device), mask.to(self.cfg.device)
        return tokens, mask

    def _need_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise TokenError(
                f"{what} needs a tokenizer, and this model has none. Pass tokenizer= when it is "
                f"built, or pass tokens."
            )
        return self.tokenizer

    def _start(self, batch_size: int) -> Int[Tensor, "batch one"]:
        """What the decoder was trained to start with; by default the pad token, as T5 was."""
        token = self.cfg.decoder_start_token_id
        if token is None and self.tokenizer is not None:
            token = self.tokenizer.pad_token_id
        if token is None:
            raise TokenError(
                "the decoder starts with cfg.decoder_start_token_id or the tokenizer's pad token, "
                "and this model has neither. Set one of them, or pass decoder_input."
            )
        return torch.full((batch_size, 1), token, dtype=torch.long, device=self.W_E.device)

    # -- forward -----------------------------------------------------------------------------

    def forward(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"],
        decoder_input: Int[Tensor, "decoder_batch decoder_pos"] | None = None,
        return_type: str | None = "logits",
        one_zero_attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch decoder_pos d_vocab_out"] | None:
        """Run encoder and decoder.

        Args:
            input: A text, a list of texts, or tokens ``[batch, pos]``, for the encoder.
            decoder_input: Tokens for the decoder, starting with the start token. For text it is by
                default the start token alone: ``cfg.decoder_start_token_id``, else the tokenizer's
                pad token. None of them is masked.
            return_type: ``"logits"``, or None to return nothing.
            one_zero_attention_mask: 0 for padding, of the input's shape; for text made by the
                tokenizer. Without one, all tokens are attended to.

        Returns: logits of the token after each decoder position.
        Raises: TokenError for tokens without ``decoder_input``; ShapeError for tensors that do not
            fit each other.
        """
        if return_type not in ("logits", None):
            raise ValueError(f"return_type={return_type!r} must be 'logits' or None.")
        tokens, mask = self._input(input, one_zero_attention_mask)
        if decoder_input is None:
            if isinstance(input, Tensor):
                raise TokenError(
                    "tokens were given without decoder_input. Pass the decoder's tokens, starting "
                    "with the start token (T5: 0)."
                )
            decoder_input = self._start(len(tokens))
        if decoder_input.ndim != 2 or len(decoder_input) != len(tokens):
            raise ShapeError(
                f"decoder_input must be [{len(tokens)}, decoder_pos] for this input, found "
                f"{list(decoder_input.shape)}."
            )
        encoded, bias = self.run_encoder(tokens, mask)
        logits = self.run_decoder(decoder_input.to(self.W_E.device), encoded, bias)
        return None if return_type is None else logits

    def _input(self, input: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Encoder tokens and mask, checked, where the model is."""
        if not isinstance(input, Tensor):
            input, own = self.to_tokens(input)
            mask = own if mask is None else mask
        if input.ndim != 2 or input.is_floating_point():
            raise ShapeError(
                f"input must be text or integer tokens [batch, pos]; found {input.dtype} of shape "
                f"{list(input.shape)}."
            )
        device = self.W_E.device
        if mask is None:
            pad = None if self.tokenizer is None else self.tokenizer.pad_token_id
            if pad is not None and bool((input == pad).any()):
                logger.warning(
                    "the tokens have pad tokens, which are attended to like others. Pass "
                    "one_zero_attention_mask to mask them."
                )
            return input.to(device), None
        if mask.shape != input.shape:
            raise ShapeError(
                f"one_zero_attention_mask has shape {list(mask.shape)}, the input "
                f"{list(input.shape)}: they must be the same."
            )
        return input.to(device), mask.to(device)

    def run_encoder(
        self, tokens: Int[Tensor, "batch pos"], one_zero_attention_mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch 1 1 pos"] | None]:
        """The encoder's output after its final norm, and what its padding adds to scores.

        Args:
            one_zero_attention_mask: 0 for padding.
        """
        added = None
        if one_zero_attention_mask is not None:
            hidden = 1 - one_zero_attention_mask.to(self.cfg.dtype)
            added = (hidden * torch.finfo(self.cfg.dtype).min)[:, None, None, :]
        resid = self.hook_embed(self.embed(tokens))
        n_pos = tokens.shape[1]
        bias = self.encoder[0].attn.compute_relative_attention_bias(  # type: ignore[operator, union-attr]
            n_pos, n_pos, device=tokens.device
        )
        for block in self.encoder:
            resid = block(resid, additive_attention_mask=added, position_bias=bias)
        return self.encoder_final_ln(resid), added

    def run_decoder(
        self,
        tokens: Int[Tensor, "batch decoder_pos"],
        encoded: Float[Tensor, "batch pos d_model"],
        encoder_bias: Float[Tensor, "batch 1 1 pos"] | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
        cross_kv_cache: TransformerLensKeyValueCache | None = None,
    ) -> Float[Tensor, "batch decoder_pos d_vocab_out"]:
        """Logits after each of these tokens.

        Args:
            encoded, encoder_bias: What `run_encoder` gave.
            past_kv_cache: Keys and values of earlier tokens; new ones are appended.
            cross_kv_cache: Keys and values of ``encoded``: filled at the first call, then read.
        """
        offset = 0 if past_kv_cache is None else past_kv_cache[0].past_keys.size(1)
        n_new = tokens.shape[1]
        bias = self.decoder[0].attn.compute_relative_attention_bias(  # type: ignore[operator, union-attr]
            n_new, offset + n_new, device=tokens.device, offset=offset
        )
        resid = self.embed(tokens)
        for layer, block in enumerate(self.decoder):
            resid = block(
                resid,
                position_bias=bias,
                encoder_hidden_states=encoded,
                encoder_additive_attention_mask=encoder_bias,
                past_kv_cache_entry=None if past_kv_cache is None else past_kv_cache[layer],
                cross_kv_cache_entry=None if cross_kv_cache is None else cross_kv_cache[layer],
            )
        resid = self.decoder_final_ln(resid)
        if self.cfg.tie_word_embeddings:
            resid = resid * self.cfg.d_model**-0.5
        return self.unembed(resid)

    # -- generation --------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"] = "",
        one_zero_attention_mask: Tensor | None = None,
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        return_type: str | None = "input",
        verbose: bool = True,
    ) -> Any:
        """Let the decoder write, starting with the start token. Hooks act at every step.

        Without hooks the encoder runs once and each new token once; with a hook anywhere, all of
        the model runs at every step, as in TransformerLens.

        Args:
            input, one_zero_attention_mask: As in `forward`. A list of texts gives what each text
                alone gives.
            max_new_tokens: Fewer are made if every row stops.
            stop_at_eos: End a row at an EOS token; it is filled with EOS while others go on.
            eos_token_id: One id or several; by default the tokenizer's.
            do_sample: Draw from the distribution; False takes the largest logit.
            top_k, top_p, temperature, freq_penalty: See `fastlens.sampling.sample_logits`. The
                penalty counts the decoder's tokens, the start token included.
            return_type: "str", "tensor", or "input": text for text, tokens for tokens.
            verbose: Show a progress bar.

        Returns: the text written, or the decoder's tokens with the start token in front. A list of
            texts (or "str" for several rows of tokens) gives a list.
        Raises: TokenError where ``stop_at_eos`` finds no EOS token.
        """
        if return_type not in _RETURN_TYPES:
            raise TokenError(
                f"return_type={return_type!r} must be one of {_RETURN_TYPES}."
                f"{did_you_mean(str(return_type), _RETURN_TYPES)}"
            )
        tokens, mask = self._input(input, one_zero_attention_mask)
        start = self._start(len(tokens))
        with evaluating(self):
            made = generate_tokens(
                self._step(tokens, mask, start),
                len(tokens),
                max_new_tokens,
                device=start.device,
                sampling=Sampling(do_sample, top_k, top_p, temperature, freq_penalty),
                stop=stop_at(self.tokenizer, eos_token_id) if stop_at_eos else None,
                prompt=start,
                verbose=verbose,
            )
        written = torch.cat([start, made.tokens], 1)
        is_text = not isinstance(input, Tensor)
        if return_type != "str" and not (return_type == "input" and is_text):
            return written
        decode = self._need_tokenizer("return_type='str'").decode
        texts = [decode(row, skip_special_tokens=True) for row in written]
        return texts if isinstance(input, list) or len(texts) > 1 else texts[0]

    def _step(self, tokens: Tensor, mask: Tensor | None, start: Tensor) -> Step:
        """The function that runs what is new and gives the logits after it."""
        if self._is_watched():
            written = start

            def whole(new: Tensor | None) -> Tensor:
                nonlocal written
                if new is not None:
                    written = torch.cat([written, new[:, None]], 1)
                return self.forward(tokens, written, one_zero_attention_mask=mask)[:, -1]  # type: ignore[index]

            return whole
        encoded, bias = self.run_encoder(tokens, mask)
        past, cross = (
            TransformerLensKeyValueCache.init_cache(self.cfg, tokens.device, len(tokens))
            for _ in range(2)
        )

        def one(new: Tensor | None) -> Tensor:
            run = start if new is None else new[:, None]
            return self.run_decoder(run, encoded, bias, past, cross)[:, -1]

        return one

    def _is_watched(self) -> bool:
        """Whether someone could see, or has replaced, how the model runs."""
        cls = type(self)
        if any(
            getattr(cls, name) is not getattr(HookedEncoderDecoder, name) or name in vars(self)
            for name in ("forward", "run_encoder", "run_decoder")
        ):
            return True
        for module in self.modules():
            state = vars(module)
            if isinstance(module, HookPoint) and is_live(module):
                return True
            ours = type(module).__module__.startswith(("fastlens.", "torch.nn."))
            is_root = module is self
            if not (ours or is_root) or "forward" in state or any(state[name] for name in _HOOKS):
                return True
        return False

    # -- flags, devices ----------------------------------------------------------------------

    def required_flag(self, name: str) -> str | None:
        """The config flag without which the place ``name`` never fires, or None."""
        if name.endswith(".hook_cross_attn_in"):
            return "use_attn_in"
        return super().required_flag(name)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Give every head its own copy of what self-attention reads."""
        self.cfg.use_attn_in = use_attn_in

    def to(self: T, *args: Any, **kwargs: Any) -> T:  # type: ignore[override]
        """Move or cast, as ``nn.Module.to``; ``cfg.device`` and ``cfg.dtype`` stay in step."""
        # What `TransformerRoot` passes: this class prints nothing.
        kwargs.pop("print_details", None)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        nn.Module.to(self, *args, **kwargs)
        if device is not None:
            self.cfg.device = str(device)
        if dtype is not None:
            self.cfg.dtype = dtype
        return self

    # -- weights -----------------------------------------------------------------------------

    def _layers(self) -> Iterable[Any]:
        return chain(self.encoder, self.decoder)

    @property
    def W_pos(self) -> None:
        """T5 has no position embedding: this raises NotImplementedError."""
        raise NotImplementedError(
            "T5 has no position embeddings but relative biases: "
            "model.encoder[0].attn.rel_pos_bias and model.decoder[0].attn.rel_pos_bias."
        )

    def all_head_labels(self) -> list[str]:
        """``EL0H0, EL0H1, ...`` for the encoder's self-attention, then ``DL0H0, ...``: the order
        of the stacked weights."""
        layers, heads = range(self.cfg.n_layers), range(self.cfg.n_heads)
        return [f"{stack}L{n}H{h}" for stack in "ED" for n in layers for h in heads]


def _check(cfg: HookedTransformerConfig) -> None:
    if cfg.n_devices != 1:
        raise ConfigError(
            f"n_devices={cfg.n_devices}, but HookedEncoderDecoder runs on one device."
        )
    if cfg.positional_embedding_type != "relative_positional_bias":
        raise ConfigError(
            f"positional_embedding_type={cfg.positional_embedding_type!r}, but T5 has "
            f"'relative_positional_bias'. For one stack of blocks use HookedTransformer."
        )
