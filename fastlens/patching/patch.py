"""`Patch`: one change to one activation, as users write it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastlens.errors import SweepError, did_you_mean
from fastlens.patching.codes import Codes, PlacedCodes, placed
from fastlens.patching.model import PatchableModel
from fastlens.patching.runs import FIELD_OF_AXIS, PlannedPatch, Run, Selection, chosen
from fastlens.patching.sites import SITES, Site, find_site, n_heads, n_neurons
from fastlens.patching.sources import WITHOUT_WIDTH, Activations, Source

Value: TypeAlias = str | int | float | Tensor | Activations
MODES = ("replace", "add", "scale")
NAMED = ("other", "zero", "mean", "resample")
SPLIT_INPUTS = ("q_input", "k_input", "v_input")


@dataclass(frozen=True, eq=False)
class Patch:
    """What one patch changes, and to what. Several in one run act together.

    >>> ablate = [Patch("z", 9, head=[6, 9], source="zero"), Patch("z", 10, head=0, source="zero")]
    >>> steer = Patch("resid_post", 12, source=direction, mode="add")

    Attributes:
        site, layer: The activation; a site is a name as in `sweep`, or the `codes` of an
            autoencoder, which may know their layer. A layer may count from the end.
        pos: Positions (query positions of a pattern); None is all.
        head: Heads, KV heads for ``k`` and ``v``; None is all.
        neuron: Neurons of an MLP site; None is all.
        key_pos: Key positions of a pattern; None is all.
        feature: Features of codes; None is all.
        source: Where the value comes from. ``"other"``: the other prompt, same example, same place.
            ``"zero"``. ``"mean"``: the mean over the other prompt's examples, place by place.
            ``"resample"``: the other prompt of another example, drawn once for the sweep.
            A number. A tensor, broadcast against ``[batch, *what is selected along each axis,
            width]``. A cache: hook name -> activation of prompts of the same shape.
        mode: ``"replace"`` the activation by that value, ``"add"`` it, or ``"scale"`` by it. These
            act on what the run holds there after its earlier patches.
    """

    site: str | Codes
    layer: int | None = None
    pos: Selection = None
    head: Selection = None
    neuron: Selection = None
    key_pos: Selection = None
    source: Value = "other"
    mode: str = "replace"
    feature: Selection = None


class Sources:
    """The sources and codes that a sweep's patches name, each once; the first source is the other
    prompt."""

    def __init__(self, batch: int, n_pos: int, seed: int, *, keeps_graph: bool = False):
        self.batch = batch
        self.n_pos = n_pos
        self.seed = seed
        self.keeps_graph = keeps_graph
        self.list: list[Source] = [Source("other", "the other prompt")]
        self.codes: list[PlacedCodes] = []
        self._known_codes: dict[tuple[int, str, int], int] = {}
        self._known: dict[Any, int] = {"other": 0}
        # Tensors and caches are known by identity, so none of them may go meanwhile.
        self._alive: list[Any] = []

    def number_of(self, value: Any) -> int:
        """The number of a source (a `Value`), which is checked and added if it is new.

        Raises: SweepError for something that is no source.
        """
        key = value if isinstance(value, str | float | int) else ("object", id(value))
        if key not in self._known:
            self.list.append(self._made(value))
            self._alive.append(value)
            self._known[key] = len(self.list) - 1
        return self._known[key]

    def number_of_codes(self, codes: Codes, layer: int, model: PatchableModel) -> int:
        """The number of the autoencoder at a layer, which is tried out if it is new.

        Raises: SweepError if it does not fit the model.
        """
        sae = dict(zip(codes.layers(model.cfg.n_layers), codes.by_layer.values(), strict=True))[
            layer
        ]
        key = id(sae), codes.site, layer
        if key not in self._known_codes:
            self.codes.append(placed(codes, layer, model))
            self._known_codes[key] = len(self.codes) - 1
        return self._known_codes[key]

    def _made(self, value: Any) -> Source:
        if isinstance(value, str):
            return self._named(value)
        if isinstance(value, int | float):
            return Source("number", f"the number {value:g}", number=float(value))
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                raise SweepError(f"a source tensor must hold floats; got {value.dtype}.")
            if bool(value.isnan().any()):
                raise SweepError(f"the source tensor of shape {list(value.shape)} holds NaN.")
            tensor = value if self.keeps_graph else value.detach()
            return Source("tensor", f"a tensor {list(value.shape)}", tensor=tensor)
        if hasattr(value, "__getitem__") and hasattr(value, "keys"):
            return Source("cache", "a cache", cache=value)
        raise SweepError(
            f"source={value!r} is no source. Give one of {', '.join(NAMED)}, a number, a tensor, "
            f"or a cache of activations."
        )

    def _named(self, name: str) -> Source:
        if name not in NAMED:
            raise SweepError(
                f"source={name!r} is none of {', '.join(NAMED)}.{did_you_mean(name, NAMED)}"
            )
        if name == "zero":
            return Source("number", "zero", number=0.0)
        if name == "mean":
            return Source("mean", "the mean over examples")
        if self.batch < 2:
            raise SweepError(
                "source='resample' takes another example's activation, and there is only one "
                "pair of prompts. Give at least two."
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(self.batch, generator=generator)
        # Along one random cycle nobody takes its own.
        permutation = torch.empty_like(order)
        permutation[order] = order.roll(1)
        return Source("resample", f"another example (seed {self.seed})", permutation=permutation)


def planned(patch: Any, model: PatchableModel, sources: Sources) -> PlannedPatch:
    """A `Patch` with its site found, its selections checked and its source numbered.

    Raises: SweepError for a site, layer, entry, source or mode that does not exist or fit.
    """
    if not isinstance(patch, Patch):
        raise SweepError(f"a run is a Patch or a list of them; got {patch!r}.")
    cfg = model.cfg
    layer, codes = patch.layer, patch.site if isinstance(patch.site, Codes) else None
    if layer is None:
        have = [] if codes is None else codes.layers(cfg.n_layers)
        if len(have) != 1:
            raise SweepError(
                f"a Patch of {patch.site if codes is None else codes.name} needs layer=."
            )
        layer = have[0]
    layer = chosen(layer, cfg.n_layers, "layer")[0]
    check_mode(patch.mode)
    fields: dict[str, Any] = {}
    if codes is None:
        site = find_site(patch.site, cfg, model.hook_dict, [layer])  # type: ignore[arg-type]
        sizes = sizes_of(site, cfg, sources.n_pos)
    else:
        site = codes.found_in(model, [layer])
        fields["codes"] = sources.number_of_codes(codes, layer, model)
        sizes = sizes_of(site, cfg, sources.n_pos, sources.codes[fields["codes"]].n_features)
    arguments = {"pos": patch.pos, "head": patch.head, "neuron": patch.neuron}
    arguments |= {"feature": patch.feature}
    for argument, selection in (*arguments.items(), ("key_pos", patch.key_pos)):
        if selection is None:
            continue
        axis = "query_pos" if argument == "pos" and "query_pos" in site.axes else argument
        if axis not in site.axes:
            raise SweepError(
                f"{argument}= was given, but {site.name} is indexed by {', '.join(site.axes)}."
            )
        fields[FIELD_OF_AXIS[axis]] = tuple(chosen(selection, sizes[axis], argument))
    number = sources.number_of(patch.source)
    result = PlannedPatch(site.name, layer, value=number, mode=patch.mode, **fields)
    check_source(sources.list[number], result, sizes, model, sources)
    return result


def check_mode(mode: str) -> None:
    """Raises: SweepError for an unknown mode."""
    if mode not in MODES:
        raise SweepError(f"mode={mode!r} is none of {', '.join(MODES)}.{did_you_mean(mode, MODES)}")


def sizes_of(site: Site, cfg: Any, n_pos: int, n_features: int = 0) -> dict[str, int]:
    """Length of every axis a site, or codes, may have."""
    return {
        **dict.fromkeys(("pos", "query_pos", "key_pos"), n_pos),
        "head": n_heads(site, cfg),
        "neuron": n_neurons(cfg),
        **({"feature": n_features} if n_features else {}),
    }


def check_source(
    source: Source,
    patch: PlannedPatch,
    sizes: Mapping[str, int],
    model: PatchableModel,
    sources: Sources,
) -> None:
    """Raises: SweepError if a tensor does not broadcast over the patch, or a cache lacks it."""
    site = SITES[patch.site]
    is_positive = source.kind == "number" and source.number > 0
    if patch.site == "attn_scores" and patch.mode == "scale" and not is_positive:
        raise SweepError(
            "attn_scores are minus infinity where a key is hidden: they can be scaled by a number "
            "above zero only. Patch the pattern, or add to the scores."
        )
    if source.kind == "tensor":
        assert source.tensor is not None
        shape = [sources.batch]
        for axis, index in zip(patch.axes, patch.indices(), strict=True):
            shape.append(sizes[axis] if index is None else len(index))
        if patch.axes[-1] not in WITHOUT_WIDTH:
            in_heads = site.axes[-1] == "head" and not site.name.endswith(("_in", "_input"))
            in_heads = in_heads and site.name != "result"
            shape.append(_head_width(model.cfg, site.name) if in_heads else model.cfg.d_model)
        try:
            source.tensor.expand(shape)
        except RuntimeError as error:
            raise SweepError(
                f"the source tensor {list(source.tensor.shape)} does not broadcast over what "
                f"{patch.site} of layer {patch.layer} patches: [batch, {', '.join(patch.axes)}"
                f"{'' if len(shape) == 1 + len(patch.axes) else ', width'}] = {shape}."
            ) from error
    elif source.kind == "cache":
        assert source.cache is not None
        if patch.codes is not None:
            raise SweepError(
                "a cache holds activations, no codes. Encode what it holds and give the tensor "
                f"[batch, {', '.join(patch.axes)}], or the part of it that is patched."
            )
        if patch.hook_name not in source.cache.keys():  # noqa: SIM118
            raise SweepError(
                f"the cache holds no {patch.hook_name}. Run model.run_with_cache with a "
                f"names_filter that keeps it.{did_you_mean(patch.hook_name, source.cache.keys())}"
            )
        found = tuple(source.cache[patch.hook_name].shape[: 1 + len(site.axes)])
        wanted = (sources.batch, *(sizes[axis] for axis in site.axes))
        if found != wanted:
            raise SweepError(
                f"{patch.hook_name} in the cache is {list(found)} over batch and "
                f"{', '.join(site.axes)}; the prompts need {list(wanted)}."
            )


def _head_width(cfg: Any, site: str) -> int:
    """Channels of a head at a site; values may be narrower than keys."""
    of_values = site in ("v", "z") and getattr(cfg, "d_value", None)
    return of_values or cfg.d_head


def check_run(run: Run, model: PatchableModel) -> None:
    """Raises: SweepError if patches of one run do not go together."""
    sites = {patch.site for patch in run.patches}
    split = model.cfg.use_split_qkv_input or not sites.isdisjoint(SPLIT_INPUTS)
    if "attn_in" in sites and split:
        raise SweepError(
            "attn_in is not read while queries, keys and values have inputs of their own "
            "(q_input, k_input, v_input; cfg.use_split_qkv_input). Patch those instead."
        )


def explicit_runs(
    runs: Sequence[Any] | Mapping[str, Any], model: PatchableModel, sources: Sources
) -> tuple[list[Run], list[str]]:
    """Runs given one by one, each a `Patch` or a list of them, and their names.

    Raises: SweepError as `planned`, with the run's name.
    """
    named = dict(runs) if isinstance(runs, Mapping) else {str(i): run for i, run in enumerate(runs)}
    if not named:
        raise SweepError("runs= is empty. Give at least one Patch.")
    found = []
    for number, (name, patches) in enumerate(named.items()):
        listed = [patches] if isinstance(patches, Patch) else list(patches)
        if not listed:
            raise SweepError(f"run {name} has no patches.")
        try:
            run = Run((number,), tuple(planned(patch, model, sources) for patch in listed))
            check_run(run, model)
        except SweepError as error:
            raise SweepError(f"run {name}: {error}") from error
        found.append(run)
    return found, [str(name) for name in named]
