"""TransformerLens' `loading_from_pretrained`: configs, weights and names of pretrained models.

On top of `fastlens.weights`: what is computed here is only the shape TransformerLens gives it.
"""

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlens.compat.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
from fastlens.compat.weight_conversions import tensors_of
from fastlens.config import HookedTransformerConfig
from fastlens.errors import SourceError
from fastlens.weights import checkpoints
from fastlens.weights.family import family_of
from fastlens.weights.hub import fetch, has_tokenizer
from fastlens.weights.names import NOT_ON_THE_HUB, packaged_model, repository_of
from fastlens.weights.own_format import as_family_config, is_own
from fastlens.weights.source import check_layers, open_source

logger = logging.getLogger(__name__)

# Loaded with hf_model= only.
NON_HF_HOSTED_MODEL_NAMES = list(NOT_ON_THE_HUB)
# A model's own code is never run, so none needs trust_remote_code.
NEED_REMOTE_CODE_MODELS: tuple[str, ...] = ()
STANFORD_CRFM_CHECKPOINTS, _ = checkpoints.get_checkpoint_labels(
    "stanford-crfm/alias-gpt2-small-x21"
)
PYTHIA_CHECKPOINTS, _ = checkpoints.get_checkpoint_labels("EleutherAI/pythia-70m")
PYTHIA_V0_CHECKPOINTS, _ = checkpoints.get_checkpoint_labels("EleutherAI/pythia-70m-v0")


def make_model_alias_map() -> dict[str, str]:
    """Every alias and official name, in lower case -> the official name."""
    names = {name.lower(): name for name in OFFICIAL_MODEL_NAMES}
    for official, aliases in MODEL_ALIASES.items():
        names |= {alias.lower(): official for alias in aliases}
    return names


def get_official_model_name(model_name: str) -> str:
    """The hub repository of a name or alias; any ``owner/name`` stands for itself.

    Raises: ModelNameError (a ValueError) with near names.
    """
    return packaged_model(model_name) or repository_of(model_name)


def convert_hf_model_config(model_name: str, **kwargs: Any) -> dict[str, Any]:
    """`HookedTransformerConfig` fields of a hub model, alias or local folder.

    Of a hub model config and tokenizer files are fetched, no weights.

    Raises: ConfigError for an architecture that cannot be loaded, or an attribute nobody accounts
        for; SourceError when the hub is needed and out of reach.
    """
    path = Path(model_name).expanduser()
    if (path / "config.json").is_file():
        tokenizer = str(path) if has_tokenizer(path) else None
        found = _fields(path, path.resolve().name, tokenizer)
    elif path.exists() or packaged_model(model_name):
        found = open_source(model_name).config_fields()
    else:
        options = {
            name: kwargs[name] for name in ("revision", "cache_dir", "token") if kwargs.get(name)
        }
        repository = repository_of(model_name)
        found = _fields(fetch(repository, with_weights=False, **options), repository, repository)
    # Sizes that follow from others are filled in.
    filled = HookedTransformerConfig(**{**found, "device": "cpu"})
    return {name: getattr(filled, name) for name in found}


def _fields(folder: Path, model_name: str, tokenizer_name: str | None) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{folder / 'config.json'} cannot be read ({error}). Fetch it again."
        ) from error
    if is_own(config) and not has_tokenizer(folder):
        tokenizer_name = config.get("tokenizer_name")
    config = as_family_config(config, model_name)
    family, architecture = family_of(config)
    return {
        **family.config_fields(config),
        "original_architecture": architecture,
        "model_name": model_name.split("/")[-1],
        "tokenizer_name": tokenizer_name,
    }


def convert_neel_model_config(official_model_name: str, **kwargs: Any) -> dict[str, Any]:
    """`HookedTransformerConfig` fields of a model in TransformerLens' own format.

    Args:
        kwargs: ``revision``, ``cache_dir``, ``token`` for the hub.
    """
    found = convert_hf_model_config(official_model_name, **kwargs)
    names = """d_model n_layers d_mlp d_head n_heads n_ctx d_vocab tokenizer_name act_fn attn_only
        final_rms original_architecture normalization_type positional_embedding_type""".split()
    return {name: found[name] for name in names}


def get_pretrained_model_config(
    model_name: str,
    hf_cfg: dict[str, Any] | None = None,
    checkpoint_index: int | None = None,
    checkpoint_value: int | None = None,
    fold_ln: bool = False,
    device: str | torch.device | None = None,
    n_devices: int = 1,
    default_prepend_bos: bool | None = None,
    dtype: torch.dtype = torch.float32,
    first_n_layers: int | None = None,
    n_ctx: int | None = None,
    **kwargs: Any,
) -> HookedTransformerConfig:
    """The config `HookedTransformer.from_pretrained` would build; no weights are read.

    Args:
        hf_cfg: A loaded transformers model's config as a dict; its vocabulary size is used.
        checkpoint_index, checkpoint_value: See `HookedTransformer.from_pretrained`.
        fold_ln: Norms come without gain and bias, which are to be folded.
    """
    # The weights are to be loaded.
    settings: dict[str, Any] = {"init_weights": False}
    if checkpoint_index is not None or checkpoint_value is not None:
        found = checkpoints.find_checkpoint(model_name, checkpoint_index, checkpoint_value)
        settings |= found.fields
        kwargs["revision"] = found.revision
    found = {**convert_hf_model_config(model_name, **kwargs), **settings}
    if fold_ln and found["normalization_type"] in ("LN", "RMS"):
        found["normalization_type"] += "Pre"
    if hf_cfg is not None and "vocab_size" in hf_cfg:
        found["d_vocab"] = hf_cfg["vocab_size"]
    if first_n_layers is not None:
        check_layers(first_n_layers, found["n_layers"])
        found["n_layers"] = first_n_layers
    if n_ctx is not None:
        if n_ctx > found["n_ctx"]:
            logger.warning(
                "n_ctx=%d is longer than the %d positions the model was made for.",
                n_ctx,
                found["n_ctx"],
            )
        found["n_ctx"] = n_ctx
    if default_prepend_bos is not None:
        found["default_prepend_bos"] = default_prepend_bos
    return HookedTransformerConfig(
        **{**found, "device": device, "n_devices": n_devices, "dtype": dtype}
    )


def get_num_params_of_pretrained(model_name: str) -> int:
    """``cfg.n_params``: the weights of attention and MLPs, without embeddings, biases, norms."""
    count = get_pretrained_model_config(model_name).n_params
    assert count is not None
    return count


def get_checkpoint_labels(model_name: str, **kwargs: Any) -> tuple[list[int], str]:
    """The steps or tokens a model was saved at, and which they count: "step" or "token".

    Raises: ModelNameError (a ValueError) if no list of them is known.
    """
    hub = {name: kwargs[name] for name in ("revision", "token") if name in kwargs}
    return checkpoints.get_checkpoint_labels(model_name, **hub)


def get_pretrained_state_dict(
    official_model_name: str,
    cfg: HookedTransformerConfig,
    hf_model: Any = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """A model's weights under TransformerLens' names, not processed; missing biases are zero.

    Args:
        hf_model: A transformers model to take them from; nothing is fetched then.
        kwargs: ``revision``, ``cache_dir``, ``token`` for the hub. A checkpoint is found by
            ``cfg.checkpoint_value``.
    """
    if hf_model is None and cfg.checkpoint_value is not None:
        found = checkpoints.find_checkpoint(official_model_name, None, cfg.checkpoint_value)
        kwargs |= {"revision": found.revision, "weights_file": found.file}
    return tensors_of(open_source(official_model_name, hf_model=hf_model, **kwargs), cfg, dtype)


@dataclass
class Config:
    """The sizes of a model, without the rest of its config."""

    d_model: int = 768
    debug: bool = True
    layer_norm_eps: float = 1e-5
    d_vocab: int = 50257
    init_range: float = 0.02
    n_ctx: int = 1024
    d_head: int = 64
    d_mlp: int = 3072
    n_heads: int = 12
    n_layers: int = 12


def get_basic_config(model_name: str, **kwargs: Any) -> Config:
    """The sizes of a pretrained model; fields its config has not keep their defaults."""
    cfg = get_pretrained_model_config(model_name, **kwargs)
    names = [field.name for field in fields(Config)]
    return Config(**{name: getattr(cfg, name) for name in names if hasattr(cfg, name)})
