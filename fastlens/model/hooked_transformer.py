"""`HookedTransformer`: TransformerLens 3's class, running fused wherever nobody looks."""

import contextlib
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.block import TransformerBlock
from fastlens.components.embed import Embed, PosEmbed, Unembed
from fastlens.components.kv_cache import TransformerLensKeyValueCache
from fastlens.components.norms import final_norm
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, FlagError, ShapeError, TokenError
from fastlens.hooks.point import HookPoint, is_live
from fastlens.model.device_map import Followers, Placement, over_n_devices
from fastlens.model.generation import GenerationMixin
from fastlens.model.pretrained import PretrainedMixin
from fastlens.model.root import TransformerRoot, named_tokenizer
from fastlens.model.streaming import Streaming, refuse_streamed
from fastlens.model.text import TextMixin
from fastlens.model.weights import WeightsMixin
from fastlens.ops.activations import soft_cap
from fastlens.tokens import (
    USE_DEFAULT_VALUE,
    LocallyOverridenDefaults,
    get_attention_mask,
    lm_cross_entropy_loss,
)


class Output(NamedTuple):
    """What ``return_type="both"`` gives: logits and next-token loss."""

    logits: Tensor
    loss: Tensor


class HookedTransformer(PretrainedMixin, TextMixin, GenerationMixin, WeightsMixin, TransformerRoot):
    """A decoder-only transformer whose every activation has a name and can be read or replaced.

    >>> from fastlens import HookedTransformer
    >>> model = HookedTransformer.from_pretrained("toy-induction", verbose=False)
    >>> logits, cache = model.run_with_cache("abcabc")
    >>> cache["pattern", 1].shape[1] == model.cfg.n_heads
    True

    Names, arguments and semantics are TransformerLens 3's. Norms and attention run fused unless a
    hook looks inside; patterns are materialised only in the layers where they are looked at.
    """

    # How the weights come and go, where `from_pretrained` was told to stream them.
    streaming: Streaming | None = None
    # Which part lies where, if they are spread over several devices.
    placement: Placement | None = None

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any] | str,
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: Literal["left", "right"] | None = None,
    ):
        """A model of this config with weights drawn at ``cfg.seed`` (if ``cfg.init_weights``).

        Args:
            cfg: The config, or a dict of its fields.
            tokenizer: A Hugging Face tokenizer; by default the one ``cfg.tokenizer_name`` names.
                Without one the model takes tokens only, and ``cfg.d_vocab`` must be set.
            move_to_device: Move to ``cfg.device``.
            default_padding_side: Which side batches of text are padded on.

        Raises: ConfigError for a config that cannot be built.
        """
        super().__init__()
        if isinstance(cfg, str):
            raise ConfigError(
                f"HookedTransformer({cfg!r}) takes a config. To load a model by name use "
                f"HookedTransformer.from_pretrained({cfg!r})."
            )
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        self.tokenizer = None
        if tokenizer is None and cfg.tokenizer_name is not None:
            tokenizer = named_tokenizer(cfg.tokenizer_name, cfg.trust_remote_code)
        if tokenizer is not None:
            self.set_tokenizer(tokenizer, default_padding_side=default_padding_side)
        if cfg.d_vocab == -1:
            raise ConfigError("d_vocab is not set. Give d_vocab in the config, or a tokenizer.")
        self.embed = Embed(cfg)
        self.hook_embed = HookPoint("batch pos d_model")
        if cfg.positional_embedding_type != "rotary":
            self.pos_embed = PosEmbed(cfg)
            self.hook_pos_embed = HookPoint("batch pos d_model")
        if cfg.use_hook_tokens:
            self.hook_tokens = HookPoint("batch pos")
        layers = [TransformerBlock(cfg, n) for n in range(cfg.n_layers)]
        self.blocks = nn.ModuleList(layers)  # type: ignore[assignment]
        ln_final = final_norm(cfg)
        if ln_final is not None:
            self.ln_final = ln_final  # type: ignore[assignment]
        self.unembed = Unembed(cfg)
        if cfg.init_weights:
            self.init_weights()
        if move_to_device:
            self.move_model_modules_to_device()
        self.dataset = None
        self.setup()

    # Properties as well as submodules: a `typing.Protocol` looks for attributes of the class only.
    @property
    def blocks(self) -> nn.ModuleList:
        """The layers."""
        return self._submodule("blocks")

    @property
    def ln_final(self) -> nn.Module:
        """The norm before the unembedding; models without norms have none."""
        return self._submodule("ln_final")

    @property
    def ends_in_norm(self) -> bool:
        """Whether `ln_final` reads what the last block wrote: unless a subclass runs it otherwise.

        A cache then need not store what `ln_final` normalises.
        """
        placement = self.placement
        if placement is not None and placement.final != placement.layers[-1]:
            # It reads a copy on another device.
            return False
        return type(self).forward is _FORWARD and "forward" not in self.__dict__

    def _submodule(self, name: str) -> Any:
        if name not in self._modules:
            raise AttributeError(f"this model has no {name}.")
        return self._modules[name]

    # -- forward -----------------------------------------------------------------------------

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: Literal["left", "right"] | None = USE_DEFAULT_VALUE,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: Float[Tensor, "batch pos d_model"] | None = None,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input: Text, a list of texts, tokens ``[batch, pos]`` or ``[pos]``; with
                ``start_at_layer``, the residual stream ``[batch, pos, d_model]``.
            return_type: ``"logits"``, ``"loss"`` (next-token cross-entropy, nats), ``"both"``, or
                None (run the blocks and return nothing).
            loss_per_token: Loss per position ``[batch, pos - 1]`` instead of the mean.
            prepend_bos: Whether text gets a BOS token; by default ``cfg.default_prepend_bos``.
            padding_side: Side on which a list of texts is padded; by default the tokenizer's.
            start_at_layer, stop_at_layer: Run ``blocks[start:stop]`` only, negative numbers from
                the end. With ``stop_at_layer`` the residual stream there is returned.
            tokens: With ``start_at_layer``, the tokens the loss is taken against.
            shortformer_pos_embed: With ``start_at_layer``, the positions of a shortformer model.
            attention_mask: 0 for padding. By default made for text and tokens when the tokenizer
                pads left or a KV cache is given; right padding is not masked by itself (causal
                attention never looks right), but counts in the loss unless a mask is given.
            past_kv_cache: Keys and values of earlier tokens; new ones are appended.

        Returns: logits ``[batch, pos, d_vocab_out]``, loss, `Output`, None, or the residual stream.
        """
        if return_type not in (None, "logits", "loss", "both"):
            raise ValueError(
                f"return_type={return_type!r} must be 'logits', 'loss', 'both' or None."
            )
        with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            if start_at_layer is None:
                residual, tokens, shortformer_pos_embed, attention_mask = self.input_to_embed(
                    input, prepend_bos, padding_side, attention_mask, past_kv_cache
                )
            else:
                residual = self._as_residual(input)
        layers = range(self.cfg.n_layers)[start_at_layer or 0 : stop_at_layer]
        ends_early = stop_at_layer is not None or return_type is None
        placement = self.placement
        follow = Followers(shortformer_pos_embed, attention_mask)
        with self._memory_for(residual, len(layers), has_logits=not ends_early):
            for layer in layers:
                if placement is not None:
                    residual = residual.to(placement.layers[layer])
                    shortformer_pos_embed, attention_mask = follow.on(placement.layers[layer])
                residual = self.blocks[layer](
                    residual,
                    past_kv_cache_entry=None if past_kv_cache is None else past_kv_cache[layer],
                    shortformer_pos_embed=shortformer_pos_embed,
                    attention_mask=attention_mask,
                )
            if stop_at_layer is not None:
                return residual
            if self.cfg.normalization_type is not None:
                residual = self.ln_final(self._to_part("ln_final", residual))
            if return_type is None:
                return None
            logits = self.unembed(self._to_part("unembed", residual))
            logits = soft_cap(logits, self.cfg.output_logits_soft_cap)
            if return_type == "logits":
                return logits
            if tokens is None:
                raise TokenError("a loss needs tokens: with start_at_layer, pass tokens=.")
            loss = self.loss_fn(logits, tokens, attention_mask, per_token=loss_per_token)
            return loss if return_type == "loss" else Output(logits, loss)

    def _to_part(self, part: str, x: Tensor) -> Tensor:
        return x if self.placement is None else x.to(self.placement.devices[part])

    def _memory_for(
        self, residual: Tensor, n_layers: int, has_logits: bool
    ) -> contextlib.AbstractContextManager[Any]:
        """Around a run of layers: streamed weights leave room for its activations."""
        if self.streaming is None:
            return contextlib.nullcontext()
        rows = residual.shape[0] * residual.shape[1] if has_logits else 0
        return self.streaming.run(residual, n_layers, rows)

    def _as_residual(self, input: Any) -> Tensor:
        wanted = f"[batch, pos, {self.cfg.d_model}]"
        if not isinstance(input, Tensor) or input.ndim != 3:
            found = f"shape {list(input.shape)}" if isinstance(input, Tensor) else type(input)
            raise ShapeError(f"start_at_layer takes the residual stream {wanted}, found {found}.")
        return input

    def input_to_embed(
        self,
        input: Any,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: Literal["left", "right"] | None = USE_DEFAULT_VALUE,
        attention_mask: Tensor | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The residual stream that enters block 0.

        Returns: residual, tokens, shortformer positions (or None), attention mask over past and new
            tokens (or None where nothing is padded).
        """
        text_mask = None
        if isinstance(input, str | list):
            tokens, text_mask = self._tokenize(input, prepend_bos, padding_side)
        else:
            tokens = cast(Tensor, input)
        if tokens.ndim == 1:
            tokens = tokens[None]
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ShapeError(
                f"input must be text or integer tokens [batch, pos]; found {tokens.dtype} of shape "
                f"{list(tokens.shape)}. For a residual stream pass start_at_layer=."
            )
        # A streamed embedding is not brought for the question where it would be.
        tokens = tokens.to(self.cfg.device if self.streaming else self.W_E.device)
        pos_offset = self.get_pos_offset(past_kv_cache, tokens.shape[0])
        attention_mask = self._mask_of(
            tokens, text_mask, prepend_bos, attention_mask, past_kv_cache
        )
        if self.cfg.use_hook_tokens:
            tokens = self.hook_tokens(tokens)
        embed = self.embed(tokens)
        embed = self.hook_embed(embed if self.streaming is None else self.streaming.traced(embed))
        residual, positions = self.get_residual(
            embed, pos_offset, prepend_bos, attention_mask, tokens
        )
        return residual, tokens, positions, attention_mask

    def _mask_of(
        self,
        tokens: Tensor,
        text_mask: Tensor | None,
        prepend_bos: bool | None,
        attention_mask: Tensor | None,
        past_kv_cache: TransformerLensKeyValueCache | None,
    ) -> Tensor | None:
        pads_left = self.tokenizer is not None and self.tokenizer.padding_side == "left"
        if attention_mask is None and not pads_left and past_kv_cache is None:
            return None
        if attention_mask is None and text_mask is not None:
            attention_mask = text_mask
        elif attention_mask is None:
            if prepend_bos is USE_DEFAULT_VALUE or prepend_bos is None:
                prepend_bos = self.cfg.default_prepend_bos
            # Without a tokenizer nothing is known to be padding.
            attention_mask = get_attention_mask(self.tokenizer, tokens, prepend_bos)
        if attention_mask.shape != tokens.shape:
            raise ShapeError(
                f"attention_mask has shape {list(attention_mask.shape)}, tokens have "
                f"{list(tokens.shape)}: they must be the same."
            )
        if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
            raise ShapeError(
                "attention_mask holds other values than 0 (padding) and 1. A mask that is added to "
                "scores cannot be given here: patch hook_attn_scores instead."
            )
        # Positions are counted with it.
        attention_mask = attention_mask.to(tokens.device, torch.long)
        if past_kv_cache is not None:
            attention_mask = past_kv_cache.append_attention_mask(attention_mask)
        return attention_mask

    def get_pos_offset(
        self, past_kv_cache: TransformerLensKeyValueCache | None, batch_size: int
    ) -> int:
        """How many positions the cache holds (0 without one); checks that it fits the model."""
        if past_kv_cache is None:
            return 0
        batch, length, heads, d_head = past_kv_cache[0].past_keys.shape
        cfg = self.cfg
        kv_heads = cfg.n_heads if cfg.n_key_value_heads is None else cfg.n_key_value_heads
        if cfg.ungroup_grouped_query_attention:
            kv_heads = cfg.n_heads
        if (batch, heads, d_head) != (batch_size, kv_heads, cfg.d_head):
            raise ShapeError(
                f"the KV cache holds batch {batch}, {heads} heads of {d_head}; this forward has "
                f"batch {batch_size}, {kv_heads} heads of {cfg.d_head}. Make one with "
                f"TransformerLensKeyValueCache.init_cache(model.cfg, device, batch_size)."
            )
        return length

    def get_residual(
        self,
        embed: Float[Tensor, "batch pos d_model"],
        pos_offset: int,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        attention_mask: Tensor | None = None,
        tokens: Tensor | None = None,
        return_shortformer_pos_embed: bool = True,
        device: torch.device | str | None = None,
    ) -> Any:
        """Add learned positions to the embedding: (residual, shortformer positions or None).

        Rotary and ALiBi positions act inside attention, so there the embedding passes unchanged.
        """
        kind = self.cfg.positional_embedding_type
        positions = None
        residual = embed
        if kind in ("standard", "shortformer"):
            if tokens is None:
                tokens = torch.ones(embed.shape[:2], dtype=torch.int, device=embed.device)
            mask = None if attention_mask is None else self._to_part("pos_embed", attention_mask)
            pos_embed = self.pos_embed(self._to_part("pos_embed", tokens), pos_offset, mask)
            if self.streaming is not None:
                pos_embed = self.streaming.traced(pos_embed)
            if is_live(self.hook_pos_embed):
                # Rows of W_pos itself: a hook that writes in place must not write to the weights.
                pos_embed = self.hook_pos_embed(pos_embed.clone())
            pos_embed = self._to_part("embed", pos_embed)
            residual, positions = (
                (embed + pos_embed, None) if kind == "standard" else (embed, pos_embed)
            )
        return (residual, positions) if return_shortformer_pos_embed else residual

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Next-token cross-entropy in nats; see `fastlens.tokens.lm_cross_entropy_loss`."""
        if attention_mask is not None:
            attention_mask = attention_mask.to(logits.device)
        return lm_cross_entropy_loss(logits, tokens.to(logits.device), attention_mask, per_token)

    # -- flags and devices -------------------------------------------------------------------

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Give every head its own copy of what it reads. Refused under grouped attention."""
        if self.cfg.n_key_value_heads is not None and use_attn_in:
            raise FlagError(
                "hook_attn_in: keys and values of grouped heads are shared, so they cannot be "
                "split per query head. Use set_use_split_qkv_input(True)."
            )
        self.cfg.use_attn_in = use_attn_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Compute keys and values per query head, so that ``hook_k``, ``hook_v`` show all."""
        self.cfg.ungroup_grouped_query_attention = ungroup_grouped_query_attention

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """All parameters by name, as torch's; refused for a streamed model."""
        refuse_streamed(self, "state_dict()", "Load the model without them.")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Copy parameters in by name, as torch's; refused for a streamed model."""
        refuse_streamed(self, "load_state_dict()", "Load the model without them.")
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        instead = "Say device= and dtype= in from_pretrained."
        refuse_streamed(self, "moving or casting the model", instead)
        super()._apply(fn, recurse)
        if self.placement is not None:
            self.placement = self.placement.after(self)
            if self.placement is None:
                self.cfg.n_devices = 1
        return self

    def move_model_modules_to_device(self) -> None:
        """Move everything to ``cfg.device``, or over ``cfg.n_devices`` devices from there on.

        Those are TransformerLens' equal runs of layers; the final norm and the unembedding go with
        the last layer.
        """
        placement = over_n_devices(self.cfg)
        if placement is None:
            nn.Module.to(self, self.cfg.device)
        else:
            self.spread(placement)

    def spread(self, placement: Placement) -> None:
        """Put every part where a placement says; ``cfg.device`` is then that of the embedding.

        Hook tensors lie on their layer's device, logits and loss on the unembedding's. Results are
        those of one device: only copies are added.
        """
        refuse_streamed(self, "spreading the model over devices", "Load the model without them.")
        placement.put(self)
        self.placement = None if placement.is_single else placement
        self.cfg.device = str(placement.first)


# As it is defined here: a class, too, can have its method replaced.
_FORWARD = HookedTransformer.forward
