"""Models of any architecture, by transformers' own classes: what `HookedModule` can open."""

from pathlib import Path
from typing import Any

import torch.nn as nn

from fastlens.errors import ConfigError, did_you_mean
from fastlens.weights.family import FAMILIES
from fastlens.weights.hub import hub_errors
from fastlens.weights.names import known_names

LACKS = (
    "TransformerLens' names, weight processing, methods for text, and patching.sweep (patch with "
    "run_with_patches)"
)


def transformers_model(
    model_name: str | Path, model_class: str | None, options: dict[str, Any]
) -> tuple[nn.Module, str]:
    """A model as transformers loads it, in eval mode, and a line on what hooks on it lack.

    Args:
        model_class: A class of transformers, by name; by default the one the checkpoint names, or
            else the plain model of its type.
        options: For that class' ``from_pretrained``.

    Raises: see `HookedModule.from_pretrained`.
    """
    import transformers

    name = str(model_name)
    is_folder = Path(name).expanduser().is_dir()
    place = str(Path(name).expanduser()) if is_folder else known_names().get(name, name)
    with hub_errors(place, f"{place!r}"):
        config = _config_of(place, options)
        architectures = list(getattr(config, "architectures", None) or [])
        found = model_class or next((a for a in architectures if hasattr(transformers, a)), None)
        if found is None:
            found = "AutoModelForCausalLM" if options.get("trust_remote_code") else "AutoModel"
        loader = getattr(transformers, found, None)
        if loader is None or not hasattr(loader, "from_pretrained"):
            near = did_you_mean(found, dir(transformers))
            raise ConfigError(f"model_class={found!r} was asked, which transformers has not.{near}")
        model = loader.from_pretrained(place, **options)
    return model.eval(), described(name, type(model).__name__)


def described(name: str, architecture: str) -> str:
    """What hooks on a model of transformers are, in one line."""
    line = (
        f"Loaded pretrained model {name} into HookedModule, as transformers' {architecture}: "
        f"hooks, caches and patches at its own modules' names; without {LACKS}."
    )
    family = next((one for one in FAMILIES if architecture in one.architectures), None)
    if family is not None:
        line += f" {family.model_class}.from_pretrained has all of them for this architecture."
    return line


def _config_of(place: str, options: dict[str, Any]) -> Any:
    """transformers' config; an architecture it does not know is no fault of the network."""
    from transformers import AutoConfig

    names = ("revision", "cache_dir", "token", "trust_remote_code", "local_files_only")
    asked = {name: options[name] for name in names if name in options}
    try:
        return AutoConfig.from_pretrained(place, **asked)
    except ValueError as error:
        if isinstance(error, OSError) or "ecognize" not in str(error):
            raise
        raise ConfigError(
            f"{place!r} was asked, whose architecture this version of transformers does not know. "
            f"If its code is in the repository and you trust it, pass trust_remote_code=True. Any "
            f"model in memory opens as HookedModule(model)."
        ) from error
