"""`Placement`: a model's layers over several devices, and the maps that say which goes where."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn as nn
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.devices import block_device, device_of
from fastlens.errors import ConfigError, did_you_mean
from fastlens.memory import bytes_of, free_bytes, said_bytes

Device: TypeAlias = int | str | torch.device
DeviceMap: TypeAlias = Device | Mapping[str, Device]
# Devices (0, "cpu") and amounts.
MaxMemory: TypeAlias = Mapping[Any, int | str]

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
# Of the memory that is free, where no max_memory says how much weights may take.
SHARE_FOR_WEIGHTS = 0.9
# What transformers' models call the parts: the modules they are in, and their own names.
_CONTAINERS = (
    "model", "transformer", "gpt_neox", "model.decoder", "model.language_model",
    "language_model.model", "backbone",
)  # fmt: skip
_THEIR_NAMES = {
    "embed": ("wte", "embed_tokens", "embed_in", "word_embeddings"),
    "pos_embed": ("wpe", "embed_positions"),
    "blocks": ("h", "layers", "blocks"),
    "ln_final": ("ln_f", "norm", "final_layer_norm", "final_layernorm"),
}
_THEIR_UNEMBEDS = ("lm_head", "embed_out")
# Modules of theirs that hold tables or nothing, or that are part of our `embed`.
_WITHOUT_PART = ("rotary_emb", "drop", "emb_dropout", "embed_dropout", "word_embeddings_layernorm")


@dataclass(frozen=True)
class Placement:
    """Where each part of a model lies.

    Attributes:
        devices: By part: ``embed``, ``pos_embed``, ``blocks.0``, ..., ``ln_final``, ``unembed``.
            Parts that the model does not have are not there.
        layers: Those of the blocks.
    """

    devices: Mapping[str, torch.device]
    layers: Sequence[torch.device] = field(init=False)

    def __post_init__(self) -> None:
        n_layers = sum(part.startswith("blocks.") for part in self.devices)
        layers = tuple(self.devices[f"blocks.{n}"] for n in range(n_layers))
        object.__setattr__(self, "layers", layers)

    @property
    def first(self) -> torch.device:
        """Where tokens go and the residual stream begins: ``cfg.device``."""
        return self.devices["embed"]

    @property
    def final(self) -> torch.device:
        """Where the last norm is read; models without one: where the unembedding is."""
        return self.devices.get("ln_final", self.devices["unembed"])

    @property
    def is_single(self) -> bool:
        """Whether all parts lie on one device."""
        return len(set(self.devices.values())) == 1

    def put(self, model: nn.Module) -> None:
        """Move every part to its device; a parameter on ``meta`` gets memory there, unfilled."""
        for part, device in self.devices.items():
            _put(model.get_submodule(part), device)

    def after(self, model: nn.Module) -> "Placement | None":
        """Where the parts lie now, after the model was moved; None if that is one device."""
        if len({parameter.device for parameter in model.parameters()}) == 1:
            return None
        found = dict(self.devices)
        for part in found:
            # Norms whose gain is folded away hold nothing.
            first = next(model.get_submodule(part).parameters(), None)
            found[part] = found[part] if first is None else first.device
        return Placement(found)


class Followers:
    """Tensors that every layer reads (mask, positions), copied once to each device they are on."""

    def __init__(self, *tensors: Tensor | None):
        self._tensors = tensors
        self._copies: dict[torch.device, tuple[Tensor | None, ...]] = {}

    def on(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """The tensors there."""
        if device not in self._copies:
            moved = tuple(None if x is None else x.to(device) for x in self._tensors)
            self._copies[device] = moved
        return self._copies[device]


def parts_of(cfg: HookedTransformerConfig) -> list[str]:
    """The parts that a map places, in the order in which they run."""
    parts = ["embed"]
    if cfg.positional_embedding_type != "rotary":
        parts.append("pos_embed")
    parts += [f"blocks.{n}" for n in range(cfg.n_layers)]
    return [*parts, *(["ln_final"] if cfg.normalization_type else []), "unembed"]


def over_n_devices(cfg: HookedTransformerConfig) -> Placement | None:
    """TransformerLens' ``n_devices``: layers in equal runs over that many devices from the first.

    The first also has the embeddings; the last layer's has the final norm and the unembedding. None
    where that is one device: for ``n_devices=1``, and on the CPU.
    """
    if cfg.n_devices == 1 or torch.device(cfg.device or "cpu").type == "cpu":
        return None
    layers = [block_device(n, cfg.n_layers, cfg.n_devices, cfg.device) for n in range(cfg.n_layers)]
    first = device_of(cfg.device or "cpu")
    devices = dict.fromkeys(parts_of(cfg), first)
    devices |= {f"blocks.{n}": device for n, device in enumerate(layers)}
    for part in ("ln_final", "unembed"):
        if part in devices:
            devices[part] = layers[-1] if layers else first
    placement = Placement(devices)
    return None if placement.is_single else placement


def check_map_arguments(
    device_map: Any, max_memory: Any, device: Any, n_devices: int, offload: Any, moves: bool
) -> None:
    """Refuse arguments of ``from_pretrained`` that contradict each other.

    Raises: ConfigError.
    """
    if n_devices > 1 and (offload is not None or max_memory is not None):
        raise ConfigError(
            f"n_devices={n_devices} keeps all layers on devices, and offload= or max_memory= "
            f"stream them through one. Give one or the other."
        )
    if isinstance(max_memory, Mapping) and not isinstance(device_map, str):
        why = "device_map says where each part goes" if device_map else "there is no device_map"
        raise ConfigError(
            f"max_memory={dict(max_memory)!r} is an amount for each device, which device_map="
            f"'auto' spreads layers by, but {why}. Give device_map='auto', or one amount "
            f"(max_memory='2GiB'), which streams the weights."
        )
    if device_map is None:
        return
    if max_memory is not None and not isinstance(max_memory, Mapping):
        raise ConfigError(
            f"max_memory={max_memory!r} streams the weights through one device, and device_map "
            f"keeps them on several. With a map, say the memory of each: max_memory={{0: '10GiB'}}."
        )
    others = {"device": device, "offload": offload}
    others |= {"n_devices": n_devices if n_devices != 1 else None}
    for name, value in others.items():
        if value is not None:
            raise ConfigError(
                f"{name}={value!r} and device_map both say where weights go. Give one of them."
            )
    if not moves:
        raise ConfigError(
            "move_to_device=False leaves the model on the CPU, and device_map moves it. Give one."
        )


def placement_of(
    device_map: DeviceMap,
    cfg: HookedTransformerConfig,
    sizes: Mapping[str, int],
    max_memory: MaxMemory | None = None,
) -> Placement:
    """The placement that a map asks for, in accelerate's convention.

    Args:
        device_map: Module names, ours or transformers', and the device of everything below; ``""``
            is the whole model. Or one of `AUTOMATIC`.
        sizes: Bytes of each part.
        max_memory: For the automatic maps: bytes that weights may take on each device.

    Raises: ConfigError for names that are unknown, cover a part twice or leave one out, devices
        that are not there, and a model that does not fit.
    """
    if isinstance(device_map, str) and device_map in AUTOMATIC:
        return Placement(_spread(device_map, sizes, _capacities(max_memory)))
    if not isinstance(device_map, Mapping):
        # accelerate's short form: one device for everything.
        if isinstance(device_map, str):
            _check_name(device_map)
        device_map = {"": _device("", device_map)}
    return Placement(_named(device_map, cfg))


# -- maps by name ----------------------------------------------------------------------------------


def _check_name(name: str) -> None:
    if name == "disk":
        return
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device_map={name!r} must be a dict of module names and devices, a device, or one of "
            f"{AUTOMATIC}.{did_you_mean(name, AUTOMATIC)}"
        ) from error


def _named(device_map: Mapping[str, Device], cfg: HookedTransformerConfig) -> dict[str, Any]:
    names = {part: _names_of(part) for part in parts_of(cfg)}
    said: dict[str, str] = {}
    for key, place in device_map.items():
        device = _device(key, place)
        covered = [part for part in names if _covers(key, names[part])]
        if not covered and not _is_without_part(key, cfg):
            _refuse_key(key, names, device)
        for part in covered:
            if part in said:
                raise ConfigError(
                    f"device_map says twice where {part} goes: by {said[part]!r} and by {key!r}. "
                    f"Leave one out."
                )
            said[part] = key
    is_learned = cfg.positional_embedding_type in ("standard", "shortformer")
    if not is_learned and "pos_embed" in names and "embed" in said:
        # Positions that are not learned have no weights that transformers' names could say.
        said.setdefault("pos_embed", said["embed"])
    missing = [part for part in names if part not in said]
    if missing:
        raise ConfigError(
            f"device_map leaves out {', '.join(missing)}. Every part must have a device; "
            f"'' stands for all of them."
        )
    return {part: _device(said[part], device_map[said[part]]) for part in names}


def _names_of(part: str) -> list[str]:
    """Our name of a part, and those transformers' models may have for it."""
    kind, _, layer = part.partition(".")
    if kind == "unembed":
        return [part, *_THEIR_UNEMBEDS]
    theirs = [f"{name}.{layer}" if layer else name for name in _THEIR_NAMES[kind]]
    return [part, *(f"{container}.{name}" for container in _CONTAINERS for name in theirs)]


def _covers(key: str, names: Iterable[str]) -> bool:
    return any(key in ("", name) or name.startswith(f"{key}.") for name in names)


def _is_without_part(key: str, cfg: HookedTransformerConfig) -> bool:
    if key.rpartition(".")[2] in _WITHOUT_PART:
        return True
    # Layers beyond `first_n_layers`, and parts that this model does without.
    layer = re.fullmatch(r"(.*\.)?(blocks|layers|h)\.(\d+)", key)
    if layer is not None:
        return False
    absent = {"pos_embed", "ln_final"} - set(parts_of(cfg))
    return any(key in _names_of(part) for part in absent)


def _refuse_key(key: str, names: Mapping[str, list[str]], device: torch.device) -> None:
    inside = [part for part, known in names.items() if any(key.startswith(f"{n}.") for n in known)]
    if inside:
        raise ConfigError(
            f"device_map[{key!r}] divides {inside[0]}, which stays whole. Say {inside[0]!r}: "
            f"{str(device)!r}."
        )
    known = [name for part in names.values() for name in part]
    layers = sum(part.startswith("blocks.") for part in names)
    raise ConfigError(
        f"device_map[{key!r}]: this model of {layers} layers has no such part."
        f"{did_you_mean(key, known)} Its parts are {', '.join(names)}."
    )


def _device(key: str, place: Any) -> torch.device:
    where = f"device_map[{key!r}]={place!r}"
    if isinstance(place, str) and place.lower() == "disk":
        raise ConfigError(
            f"{where}: a map keeps weights in memory. offload='disk' reads every layer from its "
            f"file when it runs; give that instead of device_map."
        )
    try:
        device = device_of(place)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{where} is no device. Give 0, 'cuda:1' or 'cpu'.") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"{where}, but {count} CUDA devices exist.")
    return device


# -- automatic maps --------------------------------------------------------------------------------


def _capacities(max_memory: MaxMemory | None) -> dict[torch.device, int]:
    """Bytes that weights may take, GPUs in order and then the CPU."""
    if max_memory is None:
        gpus = [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
        if not torch.cuda.is_available():
            gpus = []
        places = [*gpus, torch.device("cpu")]
        return {place: int(free_bytes(place) * SHARE_FOR_WEIGHTS) for place in places}
    found = {}
    for key, amount in max_memory.items():
        if key == "disk":
            raise ConfigError(
                "max_memory['disk']: a map keeps weights in memory. Use offload='disk' instead of "
                "device_map to read them from their files."
            )
        found[_device(f"max_memory {key!r}", key)] = 0 if amount == 0 else bytes_of(amount)
    return dict(sorted(found.items(), key=lambda item: (item[0].type == "cpu", item[0].index or 0)))


def _spread(
    how: str, sizes: Mapping[str, int], capacities: Mapping[torch.device, int]
) -> dict[str, torch.device]:
    gpus = {place: room for place, room in capacities.items() if place.type != "cpu"}
    rest = {place: room for place, room in capacities.items() if place.type == "cpu"}
    if how != "sequential" and gpus:
        low = next(iter(gpus)) if how == "balanced_low_0" and len(gpus) > 1 else None
        found = _balanced(sizes, gpus, low)
        if found is not None:
            return found
    found = _filled(sizes, [*gpus.items(), *rest.items()])
    if found is None:
        room = ", ".join(f"{place}: {said_bytes(n)}" for place, n in capacities.items())
        raise ConfigError(
            f"the weights take {said_bytes(sum(sizes.values()))}, its largest part "
            f"{said_bytes(max(sizes.values()))}, and do not fit ({room}). Give more in max_memory, "
            f"a smaller dtype, or offload='disk' instead of device_map."
        )
    return found


def _balanced(
    sizes: Mapping[str, int], gpus: Mapping[torch.device, int], low: torch.device | None
) -> dict[str, torch.device] | None:
    """The spread whose fullest device (but for ``low``, which takes what is left) is emptiest."""
    bounds = [0] if low is None else [0, *itertools.accumulate(sizes.values())]
    for first in bounds:
        small, large = max(sizes.values()), sum(sizes.values())
        best = None
        while small <= large:
            most = (small + large) // 2
            rooms = [
                (place, min(room, first if place == low else most)) for place, room in gpus.items()
            ]
            found = _filled(sizes, rooms)
            if found is None:
                small = most + 1
            else:
                best, large = found, most - 1
        if best is not None:
            return best
    return None


def _filled(
    sizes: Mapping[str, int], rooms: Sequence[tuple[torch.device, int]]
) -> dict[str, torch.device] | None:
    """Parts in order, each device filled before the next; None if they do not fit."""
    waiting = list(rooms)
    found = {}
    for part, size in sizes.items():
        while waiting and waiting[0][1] < size:
            waiting.pop(0)
        if not waiting:
            return None
        place, room = waiting[0]
        waiting[0] = place, room - size
        found[part] = place
    return found


def part_sizes(model: nn.Module, cfg: HookedTransformerConfig) -> dict[str, int]:
    """Bytes of each part's parameters and tables."""
    found = {}
    for part in parts_of(cfg):
        module = model.get_submodule(part)
        tensors = [*module.parameters(), *module.buffers()]
        found[part] = sum(t.numel() * t.element_size() for t in tensors)
    return found


def _put(module: nn.Module, device: torch.device) -> None:
    def there(x: Tensor) -> Tensor:
        return torch.empty_like(x, device=device) if x.is_meta else x.to(device)

    if not any(p.is_meta for p in module.parameters()):
        module.to(device)
        return
    with torch.no_grad():
        module._apply(there)
    # `parameters_on_meta` makes them without.
    module.requires_grad_(True)
