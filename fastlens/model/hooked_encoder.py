"""`HookedEncoder`: BERT and its kin with TransformerLens 3's names, fused where nobody looks."""

from typing import Any, TypeVar

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.bert_block import BertBlock
from fastlens.components.bert_embed import BertEmbed, of_width
from fastlens.components.bert_mlm_head import BertMLMHead
from fastlens.components.bert_nsp_head import BertNSPHead
from fastlens.components.bert_pooler import BertPooler
from fastlens.components.bert_rtd_head import BertRTDHead
from fastlens.components.bidirectional_attention import BidirectionalAttention
from fastlens.components.block import TransformerBlock
from fastlens.components.embed import Unembed
from fastlens.components.norms import make_norm
from fastlens.config import EncoderConfig, HookedTransformerConfig
from fastlens.errors import ConfigError, ShapeError, TokenError, WeightsError
from fastlens.hooks.point import HookPoint
from fastlens.model.open_model import open_model
from fastlens.model.pretrained import RandomWeightsMixin
from fastlens.model.root import TransformerRoot, named_tokenizer
from fastlens.model.weights import StackedWeights
from fastlens.weights import load
from fastlens.weights.source import Source

T = TypeVar("T", bound="HookedEncoder")
Tokens = Int[Tensor, "batch pos"]
# Shapes are checked by the methods, in sentences.
GivenTokens = Int[Tensor, "..."]
HEADS = ("mlm_head", "nsp_head", "pooler", "rtd_head")
RETURN_TYPES = (None, "logits", "predictions", "replaced")


class HookedEncoder(RandomWeightsMixin, StackedWeights, TransformerRoot):
    """An encoder whose every activation has a name and can be read or replaced.

    >>> model = HookedEncoder.from_pretrained("bert-base-cased")
    >>> model("The capital of France is [MASK].", return_type="predictions")
    'Paris'

    Names, arguments and semantics are TransformerLens 3's; ``logits, cache =
    model.run_with_cache(text)`` and hooks work as for `HookedTransformer`. Weights are the
    checkpoint's own: a norm behind a sum cannot be folded. For the same reason the cache's
    decompositions give what components wrote, which does not sum to the stream.

    ``cfg.encoder`` says how a model differs from BERT: RoBERTa, DistilBERT, ELECTRA and ALBERT have
    BERT's blocks; ModernBERT and ESM-2 have `TransformerBlock`, with norms before attention and
    MLP, and ``ln_final``.

    Attributes:
        absent_parts: Heads that the checkpoint had no weights for. They hold NaN, and asking for
            their output is an error. Load or fill them and take their names out of the set.
    """

    AXES = {"hook_full_embed": "batch pos d_model"}

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any] | str,
        tokenizer: Any = None,
        move_to_device: bool = True,
        **kwargs: Any,
    ):
        """An encoder of this config with random weights (if ``cfg.init_weights``).

        Args:
            cfg: The config, or a dict of its fields. BERT has ``attention_dir="bidirectional"``,
                which is not the default.
            tokenizer: A Hugging Face tokenizer; by default the one ``cfg.tokenizer_name`` names.
            move_to_device: Move to ``cfg.device``.
            kwargs: Not looked at, as in TransformerLens.

        Raises: ConfigError for a config that cannot be built.
        """
        super().__init__()
        if isinstance(cfg, str):
            raise ConfigError(
                f"HookedEncoder({cfg!r}) takes a config. To load a model by name use "
                f"HookedEncoder.from_pretrained({cfg!r})."
            )
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        if cfg.n_devices != 1:
            raise ConfigError(f"n_devices={cfg.n_devices}, but a HookedEncoder runs on one device.")
        encoder = self.encoder
        _check_encoder(cfg, encoder)
        if tokenizer is None and cfg.tokenizer_name is not None:
            tokenizer = named_tokenizer(cfg.tokenizer_name, cfg.trust_remote_code)
        self.tokenizer: Any = tokenizer
        if cfg.d_vocab == -1:
            if tokenizer is None:
                raise ConfigError("d_vocab is not set. Give d_vocab in the config, or a tokenizer.")
            cfg.d_vocab = max(tokenizer.get_vocab().values()) + 1
        if cfg.d_vocab_out == -1:
            cfg.d_vocab_out = cfg.d_vocab
        self.absent_parts: set[str] = set()
        self.embed = BertEmbed(cfg)
        self.blocks = nn.ModuleList([_block(cfg, encoder, n) for n in range(cfg.n_layers)])
        self._share_layers()
        if encoder.pre_norm:
            self.ln_final = make_norm(cfg, cfg.normalization_type)
        if "mlm_head" in encoder.heads:
            self.mlm_head = BertMLMHead(cfg)
            self.unembed = of_width(Unembed, cfg)
        if "nsp_head" in encoder.heads:
            self.nsp_head = BertNSPHead(cfg)
        if "pooler" in encoder.heads:
            self.pooler = BertPooler(cfg)
        if "rtd_head" in encoder.heads:
            self.rtd_head = BertRTDHead(cfg)
        self.hook_full_embed = HookPoint(self.AXES["hook_full_embed"])
        if cfg.init_weights:
            self.init_weights()
        if move_to_device:
            nn.Module.to(self, cfg.device)
        self.setup()

    @property
    def encoder(self) -> EncoderConfig:
        """How this encoder differs from BERT."""
        return self.cfg.encoder or EncoderConfig()

    # -- text --------------------------------------------------------------------------------

    def to_tokens(
        self,
        input: str | list[str],
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> tuple[Tokens, Tokens, Tokens]:
        """Tokens, token types and attention mask (0 for padding) of a text or a list of texts.

        Special tokens are the tokenizer's (``[CLS] ... [SEP]``). Each text of a list is a row of
        its own; a pair in one row is `BertNextSentencePrediction.to_tokens`.

        Args:
            move_to_device: To ``cfg.device``; else they stay on the CPU.
            truncate: Cut texts to ``cfg.n_ctx`` tokens.

        Raises: TokenError if the model has no tokenizer.
        """
        return self._encode((input,), move_to_device, truncate)

    def _encode(
        self, texts: tuple[Any, ...], move_to_device: bool, truncate: bool
    ) -> tuple[Tokens, Tokens, Tokens]:
        if self.tokenizer is None:
            raise TokenError(
                "text input needs a tokenizer, and this model has none. Give it one: "
                "model.tokenizer = tokenizer, or tokenizer= when it is built; or pass tokens."
            )
        found = self.tokenizer(
            *texts,
            return_tensors="pt",
            padding=True,
            truncation=truncate,
            max_length=self.cfg.n_ctx if truncate else None,
            return_token_type_ids=True,
            return_attention_mask=True,
        )
        parts = (found["input_ids"], found["token_type_ids"], found["attention_mask"])
        tokens, types, mask = (
            part.to(self.cfg.device) if move_to_device else part for part in parts
        )
        return tokens, types, mask

    # -- forward -----------------------------------------------------------------------------

    def encoder_output(
        self,
        tokens: GivenTokens,
        token_type_ids: GivenTokens | None = None,
        one_zero_attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The last block's normalised stream: what every head reads.

        Args:
            token_type_ids: 0 for tokens of a first text, 1 for those of a second; all 0 if None.
            one_zero_attention_mask: 0 for padding, which nobody attends to. None attends to all
                tokens, padding included.

        Raises: ShapeError if the three do not have one shape ``[batch, pos]``; TokenError for a
            second text where the model has no token type for it.
        """
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
            found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else tokens
            raise ShapeError(f"tokens must be integers [batch, pos]; found {found!r}.")
        device = self.W_E.device
        named = {
            "token_type_ids": token_type_ids,
            "one_zero_attention_mask": one_zero_attention_mask,
        }
        for name, given in named.items():
            if given is not None and given.shape != tokens.shape:
                raise ShapeError(
                    f"{name} has shape {list(given.shape)}, tokens have {list(tokens.shape)}: they "
                    f"must be the same."
                )
        if token_type_ids is not None:
            token_type_ids = token_type_ids.to(device)
            if self.encoder.n_token_types < 2 and bool(token_type_ids.any()):
                raise TokenError(
                    "token_type_ids names a second text, but this model knows one type of token. "
                    "Leave token_type_ids out."
                )
        if one_zero_attention_mask is not None:
            one_zero_attention_mask = (one_zero_attention_mask != 0).to(device, torch.long)
        embedded = self.embed(tokens.to(device), token_type_ids, one_zero_attention_mask)
        resid = self.hook_full_embed(embedded)
        for block in self.blocks:
            resid = block(resid, attention_mask=one_zero_attention_mask)
        return self.ln_final(resid) if self.encoder.pre_norm else resid

    def forward(
        self,
        input: str | list[str] | GivenTokens,
        return_type: str | None = "logits",
        token_type_ids: GivenTokens | None = None,
        one_zero_attention_mask: Tensor | None = None,
    ) -> Any:
        """Masked language modelling: logits of every token, or what ``[MASK]`` stands for.

        Args:
            input: Text, a list of texts, or tokens ``[batch, pos]``.
            return_type: ``"logits"``, ``"predictions"``, None (run and return nothing), or
                ``"replaced"`` for an ELECTRA discriminator.
            token_type_ids, one_zero_attention_mask: See `encoder_output`; for text, by default
                what the tokenizer says.

        Returns: logits ``[batch, pos, d_vocab]``; for ``"replaced"`` one logit a token,
            ``[batch, pos]``, that another model put it there. Predictions: the likeliest token of
            the mask as text; of several masks, in the order of the batch,
            ``["Prediction 0: ...", ...]``; of none, an empty text. Each is decoded by itself
            (TransformerLens decodes all at once and splits at spaces, which joins pieces of words).

        Raises: TokenError for text or predictions without a tokenizer; WeightsError for a
            checkpoint without this head.
        """
        if return_type not in RETURN_TYPES:
            raise ValueError(f"return_type={return_type!r} must be one of {RETURN_TYPES}.")
        if isinstance(input, str | list):
            tokens, types, mask = self.to_tokens(input)
            token_type_ids = types if token_type_ids is None else token_type_ids
            if one_zero_attention_mask is None:
                one_zero_attention_mask = mask
        else:
            tokens = input
        if return_type == "replaced":
            self.check_present("rtd_head")
        elif return_type is not None:
            self.check_present("mlm_head", "unembed")
        resid = self.encoder_output(tokens, token_type_ids, one_zero_attention_mask)
        if return_type == "replaced" or (return_type is None and self._has("rtd_head")):
            replaced = self.rtd_head(resid)
            return None if return_type is None else replaced
        if not self._has("mlm_head", "unembed"):
            return None
        # As in TransformerLens the head runs whatever is returned: its places may be looked at.
        logits = self.unembed(self.mlm_head(resid))
        if return_type == "predictions":
            return self._predictions(logits, tokens)
        return None if return_type is None else logits

    def _has(self, *parts: str) -> bool:
        return all(part in self._modules and part not in self.absent_parts for part in parts)

    def check_present(self, *parts: str) -> None:
        """Refuse to run parts that the checkpoint had no weights for.

        Raises: WeightsError that names them.
        """
        unknown = [part for part in parts if part not in self._modules]
        if unknown:
            raise WeightsError(
                f"the output of {', '.join(parts)} was asked for, but {self.cfg.model_name!r} is "
                f"of a kind that has no {', '.join(unknown)}. It has "
                f"{', '.join(self.encoder.heads)}."
            )
        absent = [part for part in parts if part in self.absent_parts]
        if absent:
            raise WeightsError(
                f"the output of {', '.join(parts)} was asked for, but the checkpoint had no "
                f"weights for {', '.join(absent)} (its class has no such head). Use "
                f"encoder_output(), return_type=None or a checkpoint with that head; or fill the "
                f"weights and take the names out of model.absent_parts."
            )

    def _predictions(self, logits: Tensor, tokens: Tensor) -> str | list[str]:
        tokenizer = self.tokenizer
        mask = getattr(tokenizer, "mask_token_id", None)
        if tokenizer is None or mask is None:
            raise TokenError(
                "return_type='predictions' needs a tokenizer with a mask token, and this model has "
                "none. Use return_type='logits'."
            )
        masked = logits[tokens.to(logits.device) == mask]
        decoded = [tokenizer.decode([token]) for token in masked.argmax(-1).tolist()]
        if len(decoded) > 1:
            return [f"Prediction {i}: {text}" for i, text in enumerate(decoded)]
        return decoded[0] if decoded else ""

    # -- loading -----------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[T],
        model_name: str,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        hf_model: Any = None,
        device: str | torch.device | None = None,
        tokenizer: Any = None,
        move_to_device: bool = True,
        dtype: str | torch.dtype = torch.float32,
        **from_pretrained_kwargs: Any,
    ) -> T:
        """Load an encoder. Its weights are not processed.

        Args:
            model_name: A hub repository or TransformerLens alias, or a folder in Hugging Face's
                layout; see `open_source`.
            checkpoint_index, checkpoint_value: For families with training checkpoints; BERT's are
                not known.
            hf_model: A transformers model in memory: ``BertForPreTraining``, ``BertForMaskedLM``,
                ``BertForNextSentencePrediction``, ``BertModel`` or those of another family. No
                network call.
            device: Where the model goes; by default CUDA if there is any.
            tokenizer: By default the one that comes with the weights.
            move_to_device: False leaves the model on the CPU.
            dtype: Of the parameters.
            from_pretrained_kwargs: As for `HookedTransformer.from_pretrained`.

        Heads that the checkpoint does not have are named in ``absent_parts``.

        Raises: ModelNameError, SourceError, ConfigError, WeightsError; see `open_source`.
        """
        source, cfg, verbose = open_model(
            "HookedEncoder",
            model_name,
            from_pretrained_kwargs,
            hf_model=hf_model,
            dtype=dtype,
            device=device,
            checkpoint_index=checkpoint_index,
            checkpoint_value=checkpoint_value,
        )
        tokenizer = tokenizer if tokenizer is not None else source.tokenizer()
        model = cls(cfg, tokenizer, move_to_device=False)
        absent = load.load_source(model, source, {})
        model.absent_parts = {part for part in absent if part in model._modules}
        if cfg.positional_embedding_type == "rotary":
            model._set_frequencies(source)
        if move_to_device:
            nn.Module.to(model, cfg.device)
        if verbose:
            # As TransformerLens does.
            print(f"Loaded pretrained model {model_name} into HookedEncoder")  # noqa: T201
        return model

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch's. Heads that were absent are here once all their weights were given."""
        self._check_shared(state_dict)
        result = super().load_state_dict(state_dict, strict, assign)
        self._share_layers()
        for part in list(self.absent_parts):
            names = [key for key in self.state_dict() if key.startswith(f"{part}.")]
            if all(name in state_dict for name in names):
                self.absent_parts.discard(part)
        return result

    def _check_shared(self, state_dict: Any) -> None:
        """Raises WeightsError for layers of their own where all layers have one set of weights."""
        if not self.encoder.shared_layers:
            return
        for key in self.blocks[0].state_dict():
            names = [f"blocks.{n}.{key}" for n in range(self.cfg.n_layers)]
            given = [state_dict[name] for name in names if name in state_dict]
            if any(not torch.equal(other, given[0]) for other in given[1:]):
                raise WeightsError(
                    f"blocks.*.{key} differs between layers, but all layers of this model share "
                    f"one set of weights. Give each layer the same, or only those of blocks.0."
                )

    def _set_frequencies(self, source: Source) -> None:
        """Rotary frequencies that the checkpoint states, unrounded, for every layer."""
        without = [name for name, _ in self.named_parameters()]
        found = source.group("embed", self.cfg, torch.float32, without=without)
        if "rotary.frequencies" in found:
            for block in self.blocks:
                block.attn.set_frequencies(found["rotary.frequencies"])  # type: ignore[union-attr]

    # -- weights -----------------------------------------------------------------------------

    def _share_layers(self) -> None:
        """Make every block's parameters those of the first, where they are shared."""
        if not self.encoder.shared_layers:
            return
        first = dict(self.blocks[0].named_parameters())
        for block in self.blocks[1:]:
            for name, parameter in first.items():
                owner, _, leaf = name.rpartition(".")
                block.get_submodule(owner)._parameters[leaf] = parameter

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        # A move to another kind of memory makes parameters anew, one for each block.
        self._share_layers()
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("ln_final", "accumulated_bias", "tokens_to_residual_directions"):
                raise AttributeError(
                    f"{name}: this HookedEncoder has none. It has a layer before the unembedding, "
                    f"or normalises the residual stream after every sublayer, so its logits are no "
                    f"sum of what its components wrote."
                ) from None
            if name in ("W_pos", "W_E_pos") or (name in HEADS and "cfg" in self.__dict__):
                raise AttributeError(
                    f"{name}: this kind of encoder has none. See cfg.encoder."
                ) from None
            raise

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding. The parameter itself."""
        return self.embed.embed.W_E

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """Position embedding. The parameter itself. Rotary encoders have none."""
        return self.embed.pos_embed.W_pos

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_plus_n_ctx d_model"]:
        """W_E above W_pos: an overcomplete basis of what is summed before the embedding's norm."""
        return torch.cat([self.W_E, self.W_pos])

    def all_head_labels(self) -> list[str]:
        """``L0H0, L0H1, ...`` in layer order."""
        return [f"L{n}H{h}" for n in range(self.cfg.n_layers) for h in range(self.cfg.n_heads)]


def _check_encoder(cfg: HookedTransformerConfig, encoder: EncoderConfig) -> None:
    """Raises ConfigError for what no encoder here computes."""
    positions = cfg.positional_embedding_type
    if positions not in ("standard", "rotary") or (positions == "rotary" and not encoder.pre_norm):
        raise ConfigError(
            f"positional_embedding_type={positions!r}, but BERT adds learned positions: "
            f"'standard'. Pre-norm encoders (cfg.encoder.pre_norm) may have 'rotary'."
        )
    unknown = [head for head in encoder.heads if head not in HEADS]
    if unknown:
        raise ConfigError(f"cfg.encoder.heads has {unknown}, which must be among {HEADS}.")
    if cfg.longrope_short_factor is not None:
        raise ConfigError(
            "longrope_short_factor was given, but an encoder counts positions over padding, so "
            "that it cannot tell a long text from a padded one. Leave it None."
        )
    if cfg.use_local_attn and positions != "rotary":
        raise ConfigError("use_local_attn=True, but only rotary encoders have windows.")


def _block(cfg: HookedTransformerConfig, encoder: EncoderConfig, layer: int) -> nn.Module:
    """One layer of the encoder."""
    if not encoder.pre_norm:
        return BertBlock(cfg)
    block = TransformerBlock(cfg, layer)
    if cfg.positional_embedding_type == "rotary":
        kind = cfg.attn_types[layer] if cfg.use_local_attn and cfg.attn_types else "global"
        block.attn = BidirectionalAttention(cfg, kind, layer)
    if layer == 0 and not encoder.first_norm:
        block.ln1 = make_norm(cfg, None)
    return block
