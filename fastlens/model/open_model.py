"""What every ``from_pretrained`` does first: its options, the source of the weights, the config."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, did_you_mean
from fastlens.weights.checkpoints import Checkpoint, find_checkpoint
from fastlens.weights.family import FAMILIES, Family
from fastlens.weights.names import known_names
from fastlens.weights.source import Source, check_layers, open_source

logger = logging.getLogger(__name__)

DTYPES = {
    "float64": torch.float64, "fp64": torch.float64, "float32": torch.float32,
    "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip
_SOURCE_OPTIONS = (
    "revision", "cache_dir", "token", "trust_remote_code", "local_files_only",
    "ignore_config_attributes",
)  # fmt: skip
# For transformers' own loading; they change nothing about the weights that are read.
_WITHOUT_EFFECT = ("low_cpu_mem_usage", "attn_implementation", "use_safetensors", "use_fast")
_OPTIONS = (*_SOURCE_OPTIONS, *_WITHOUT_EFFECT, "torch_dtype", "use_auth_token", "verbose")


class OpenedModel(NamedTuple):
    """A model that was found and checked, and whose weights are not read yet.

    Attributes:
        source: Where its weights come from.
        cfg: Its config, with the caller's changes.
        verbose: Whether the caller wants to be told when it is loaded.
    """

    source: Source
    cfg: HookedTransformerConfig
    verbose: bool


def open_model(
    class_name: str,
    model_name: str | Path,
    from_pretrained_kwargs: dict[str, Any],
    *,
    hf_model: Any = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    n_devices: int = 1,
    checkpoint_index: int | None = None,
    checkpoint_value: int | None = None,
    checkpoint_label: int | None = None,
    default_prepend_bos: bool | None = None,
    first_n_layers: int | None = None,
    n_ctx: int | None = None,
) -> OpenedModel:
    """Find a model for a class; arguments are those of `HookedTransformer.from_pretrained`.

    Args:
        class_name: The class that wants to load it; other classes' families are refused.
        from_pretrained_kwargs: Options by name, all of which must be known.

    Raises: ConfigError, ModelNameError, SourceError, WeightsError; see `open_source`.
    """
    options = _checked_options(from_pretrained_kwargs)
    hub = {name: options[name] for name in _SOURCE_OPTIONS if name in options}
    checkpoint = _checkpoint(
        str(model_name), checkpoint_index, checkpoint_value, checkpoint_label, hub
    )
    hub |= {"revision": checkpoint.revision, "weights_file": checkpoint.file}
    dtype = _torch_dtype_of(options.get("torch_dtype") or dtype, device)
    if hf_model is None:
        # Before anything is fetched.
        _check_class(class_name, model_name, _family_of_name(str(model_name)))
    source = open_source(model_name, hf_model=hf_model, **hub)
    _check_class(class_name, model_name, source.family)
    cfg = _config_of_source(
        source, dtype, device, n_devices, default_prepend_bos, first_n_layers, n_ctx
    )
    cfg.trust_remote_code = bool(hub.get("trust_remote_code"))
    for field, value in checkpoint.fields.items():
        setattr(cfg, field, value)
    return OpenedModel(source, cfg, bool(options.get("verbose", True)))


def _family_of_name(name: str) -> Family | None:
    """The family that knows this name or alias, unless it is a folder or file here."""
    repository = known_names().get(name)
    if repository is None or Path(name).exists():
        return None
    return next((family for family in FAMILIES if repository in family.hub_names()), None)


def _check_class(class_name: str, model_name: str | Path, family: Family | None) -> None:
    if family is not None and family.model_class != class_name:
        raise ConfigError(
            f"{class_name} was asked to load {str(model_name)!r}, which is a {family.name} model. "
            f"Use {family.model_class}.from_pretrained."
        )


def _checked_options(options: dict[str, Any]) -> dict[str, Any]:
    for name in ("load_in_8bit", "load_in_4bit"):
        if options.pop(name, False):
            raise ConfigError(
                f"{name}=True was asked, but quantised weights are not computed with. Load the "
                f"model in bfloat16, or from a .gguf file, which is dequantised."
            )
    if options.pop("device_map", None) is not None:
        raise ConfigError(
            "device_map was asked, but only HookedTransformer runs on several devices. Give "
            "device=."
        )
    for name in options:
        if name not in _OPTIONS:
            raise ConfigError(
                f"from_pretrained got {name}={options[name]!r}, which it does not know."
                f"{did_you_mean(name, _OPTIONS)} Weights are read here, not by transformers, so "
                f"its other options have no meaning."
            )
    if "use_auth_token" in options:
        options.setdefault("token", options["use_auth_token"])
    return options


def _checkpoint(
    name: str, index: int | None, value: int | None, label: int | None, hub: dict[str, Any]
) -> Checkpoint:
    """Where the checkpoint is; where none is asked for, the revision alone."""
    if value is not None and label is not None:
        raise ConfigError(
            "checkpoint_value and checkpoint_label are two names of one thing. Give one of them."
        )
    value = label if value is None else value
    revision = hub.get("revision")
    if index is None and value is None:
        return Checkpoint(revision, None, {})
    listing = {key: hub[key] for key in ("revision", "token") if key in hub}
    found = find_checkpoint(name, index, value, **listing)
    if revision not in (None, found.revision):
        raise ConfigError(
            f"revision={revision!r} was asked together with a checkpoint, which is revision "
            f"{found.revision!r}. Give one of them."
        )
    return found


def _torch_dtype_of(dtype: Any, device: Any) -> torch.dtype:
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        if name not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
        dtype = DTYPES[name]
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype={dtype!r} must be a float dtype: {', '.join(DTYPES)}.")
    if dtype == torch.float16 and str(device or "cpu") == "cpu":
        logger.warning("float16 may be slow or unsupported on a CPU; consider bfloat16.")
    return dtype


def _config_of_source(
    source: Source,
    dtype: torch.dtype,
    device: Any,
    n_devices: int,
    default_prepend_bos: bool | None,
    first_n_layers: int | None,
    n_ctx: int | None,
) -> HookedTransformerConfig:
    """The model's config: what the source says, then what the caller asked for."""
    fields = source.config_fields()
    fields |= {"dtype": dtype, "n_devices": n_devices, "init_weights": False}
    if device is not None:
        fields["device"] = device
    if default_prepend_bos is not None:
        fields["default_prepend_bos"] = default_prepend_bos
    if first_n_layers is not None:
        check_layers(first_n_layers, fields["n_layers"])
        fields["n_layers"] = first_n_layers
    if n_ctx is not None:
        if n_ctx > fields["n_ctx"]:
            logger.warning(
                "n_ctx=%d is more than the %d positions this model was trained on.",
                n_ctx,
                fields["n_ctx"],
            )
        fields["n_ctx"] = n_ctx
    return HookedTransformerConfig(**fields)
