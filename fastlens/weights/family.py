"""`Family`: how one architecture's config and tensors become ours, written as a table.

A family accounts for **everything** in a checkpoint. What it does not know it refuses, in one error
that lists it all, because an ignored attribute or tensor is a model that is silently wrong.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlens.config import EncoderConfig, HookedTransformerConfig
from fastlens.errors import ConfigError, WeightsError
from fastlens.registry import Registry
from fastlens.weights.gguf_file import GgufReader
from fastlens.weights.tensor_files import Shape
from fastlens.weights.views import as_it_is, transposed

View = Callable[[Tensor, HookedTransformerConfig], Tensor | tuple[Tensor, ...]]

# Say nothing about the function a model computes in eval mode.
HARMLESS = frozenset(
    """
    _name_or_path _num_labels architectures attn_implementation auto_map bad_words_ids
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    custom_pipelines decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label
    initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id
    length_penalty max_length min_length model_max_length model_type n_ctx name_or_path
    no_repeat_ngram_size num_beam_groups
    num_beams num_labels num_return_sequences output_attentions output_hidden_states output_past
    output_scores pad_token_id prefix problem_type remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed
    unsloth_version use_cache
    """.split()
)
# Old releases of transformers wrote these into every file. At other values they change a model.
_OFF: dict[str, Any] = {
    "add_cross_attention": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "use_bfloat16": False,
}
# Parts of ours whose tensors stand outside the base model, so without its prefix.
_HEADS = ("unembed", "mlm_head", "nsp_head", "rtd_head")
MAX_LISTED = 30


@dataclass(frozen=True)
class Key:
    """One tensor of a checkpoint: its axes there, and the parameters it becomes.

    ``axes`` names sizes of the config (``d_model d_mlp d_vocab n_ctx``) and of the heads: ``heads``
    and ``kv_heads`` are ``n * d_head``, ``qkv`` is three times ``heads``; ``two`` is 2; encoders
    have ``d_embed``, ``token_types`` and ``positions`` (rows of their position table), mixtures
    ``experts`` and ``d_shared``. A size may be a sum of names and numbers:
    ``heads+kv_heads+kv_heads``, ``n_ctx+2``. ``into`` may be several names, or none (read, checked
    by ``view`` and dropped); ``{l}`` is the layer, ``{e}`` the expert (every expert in turn, if the
    tensor's own name does not say which), ``{kv}`` an underscore where key-value heads are grouped.
    ``when`` names a config attribute, or is a function of the config, without which the tensor does
    not exist. ``factor`` multiplies what is read; `Family.plan` sets it from `Family.factors`.
    Layers before ``from_layer`` lack it. A ``spare`` one may stand in checkpoints without using it.
    """

    axes: str
    into: str | tuple[str, ...]
    view: View = as_it_is
    when: str | Callable[[dict[str, Any]], bool] | None = None
    factor: float = 1.0
    from_layer: int = 0
    in_layer: Callable[[dict[str, Any], int], bool] | None = None
    spare: bool = False

    def targets(self, place: "Place", cfg: HookedTransformerConfig) -> tuple[str, ...]:
        """The parameter names for one place."""
        names = (self.into,) if isinstance(self.into, str) else self.into
        experts: Iterable[int | None] = (place.expert,)
        if place.expert is None and any("{e}" in name for name in names):
            experts = range(cfg.num_experts or 0)
        kv = "" if cfg.n_key_value_heads is None else "_"
        return tuple(name.format(l=place.layer, e=e, kv=kv) for e in experts for name in names)


class Place(NamedTuple):
    """A tensor's name in the table, and its layer and expert where the name has them."""

    pattern: str
    layer: int | None = None
    expert: int | None = None


# Group -> (tensor name in the checkpoint, its key, our names).
Plan = dict[str, list[tuple[str, Key, tuple[str, ...]]]]


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp names this family.

    ``config``: metadata key after the architecture's name -> Hugging Face attribute.
    ``derive``: attributes that follow from several keys or from tensors; ``reads`` lists the keys,
    and prefixes of keys that end in a dot.
    ``names``: tensor name without ``.weight``/``.bias`` -> Hugging Face's, or None to drop it.
    ``undo``: Hugging Face name -> what undoes llama.cpp's reordering, called with the tensor and
    the config dict.
    """

    config: Mapping[str, str]
    names: Mapping[str, str | None]
    undo: Mapping[str, Callable[[Tensor, dict[str, Any]], Tensor]] = field(default_factory=dict)
    derive: Callable[[GgufReader], dict[str, Any]] | None = None
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture.

    ``config``: Hugging Face attribute -> (our field, Hugging Face's default).
    ``fixed``: fields every model of the family has.
    ``derive``: fields that follow from several attributes; ``reads`` lists those attributes.
    ``only``: attributes -> the one value that is computed here.
    ``switches``: attributes that `Key.when` names -> Hugging Face's default.
    ``ties_by_default``: whether W_U is W_E transposed where the config does not say.
    ``ignored``: attributes that do not change what the model computes.
    ``config_class``: transformers' class; asked for its default only when a checkpoint has an
    attribute that is in none of these tables.
    ``prefix``: the base model's name in tensor names, which old checkpoints lack.
    ``keys``: tensor name without prefix -> `Key`, or None for a known buffer that is dropped.
    ``aliases``: TransformerLens' names -> hub repositories.
    ``factors``: parameter (``{l}`` for the layer) -> what its tensor is multiplied with, as a
    function of the config: multipliers of the embedding, of what layers write, of the logits.
    ``computed``: parameter (``{l}`` for the layer) -> the function of our config and a dtype
    that makes it, where a checkpoint does not hold it (sinusoidal positions, gains of one).
    ``layers_behind``: attributes that count layers which stand behind the model's in a checkpoint,
    to predict further tokens; their tensors are dropped.
    ``checkpoints``: repository -> (revision pattern, steps), or None if it has no checkpoints.
    ``model_class``: the class of ours that loads it.
    ``nested``: attribute whose dict is the language model's config, in models that see images too;
    the attributes around it are accounted for like those in it.
    ``optional``: parts of our model that a checkpoint may lack as a whole (task heads), each as
    the first words of its parameters' names.
    """

    name: str
    architectures: tuple[str, ...]
    config_class: str
    prefix: str
    config: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]
    keys: Mapping[str, Key | None]
    derive: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    ties_by_default: bool = False
    only: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, bool] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    repositories: tuple[str, ...] = ()
    default_prepend_bos: bool = True
    gguf: Mapping[str, Gguf] = field(default_factory=dict)
    factors: Mapping[str, Callable[[dict[str, Any]], float]] = field(default_factory=dict)
    computed: Mapping[str, Callable[[HookedTransformerConfig, torch.dtype], Tensor]] = field(
        default_factory=dict
    )
    layers_behind: tuple[str, ...] = ()
    checkpoints: Callable[[str], tuple[str, Sequence[int]] | None] | None = None
    model_class: str = "HookedTransformer"
    nested: str | None = None
    optional: tuple[tuple[str, ...], ...] = ()

    def hub_names(self) -> set[str]:
        """Every repository the family knows by name."""
        return {*self.repositories, *self.aliases.values()}

    # -- config --------------------------------------------------------------------------------

    def config_fields(self, config: dict[str, Any]) -> dict[str, Any]:
        """Our config fields for a Hugging Face config dict.

        Raises: ConfigError that lists every attribute the family does not account for.
        """
        config = self._flat(config)
        self._refuse_unknown(config)
        fields = {
            ours: config.get(theirs, default) for theirs, (ours, default) in self.config.items()
        }
        fields |= self.fixed
        fields["default_prepend_bos"] = self.default_prepend_bos
        if self.derive is not None:
            fields |= self.derive(config)
        return fields

    def _flat(self, config: dict[str, Any]) -> dict[str, Any]:
        """The language model's attributes among those around them, which alone tie embeddings."""
        if self.nested is None or self.nested not in config:
            return config
        around = {name: value for name, value in config.items() if name != self.nested}
        tied = config.get("tie_word_embeddings", self.ties_by_default)
        inside = config[self.nested] or {}
        return {**around, **inside, "tie_word_embeddings": tied}

    def _refuse_unknown(self, config: dict[str, Any]) -> None:
        only = {**_OFF, **self.only}
        known = {"tie_word_embeddings", *HARMLESS, *self.ignored, *self.reads}
        known |= {*self.config, *self.switches}
        unknown = {
            name: value
            for name, value in config.items()
            if name not in known
            and value is not None
            and not name.startswith("_")
            and (name not in only or value != only[name])
        }
        if unknown.get("quantization_config"):
            method = dict(unknown["quantization_config"]).get("quant_method", "unknown method")
            raise ConfigError(
                f"the weights are stored quantised ({method}), which is not read here. Load them "
                f"dequantised with transformers and pass hf_model=, or use a .gguf file."
            )
        if not unknown:
            return
        defaults = _default_config(self.config_class)
        refused = [
            f"{name}={value!r}"
            for name, value in sorted(unknown.items())
            if name not in defaults or defaults[name] != value
        ]
        if refused:
            raise ConfigError(
                f"the {self.name} family does not account for these config attributes: "
                f"{', '.join(refused)}. They may change what the model computes, so it is not "
                f"loaded. If you know that they do not, pass ignore_config_attributes=[...]."
            )

    # -- tensors -------------------------------------------------------------------------------

    def plan(self, shapes: Mapping[str, Shape], config: dict[str, Any]) -> Plan:
        """What to read for each group, in loading order; nothing is read yet.

        Raises: WeightsError that lists every unknown, missing and mis-shaped tensor.
        """
        config = self._flat(config)
        cfg = HookedTransformerConfig(**self.config_fields(config), device="cpu")
        sizes = _sizes(cfg)
        wanted = dict.fromkeys(self._wanted(config, cfg))
        problems: list[str] = []
        plan: Plan = {}
        covered: set[str] = set()
        behind = range(cfg.n_layers, cfg.n_layers + self._layers_behind(config))
        for name, shape in shapes.items():
            place = self._place(name)
            key = self.keys.get(place.pattern)
            if place.pattern in self.keys and key is None:
                continue
            if place.layer in behind:
                continue
            if key is not None and key.spare and place not in wanted:
                continue
            if key is None or place not in wanted:
                problems.append(f"unknown: {name} {list(shape)}")
                continue
            expected = tuple(_size(axis, sizes) for axis in key.axes.split())
            if tuple(shape) != expected:
                problems.append(f"wrong shape: {name} is {list(shape)}, expected {list(expected)}")
            targets = key.targets(place, cfg)
            covered.update(targets)
            self._enter(plan, name, self._with_factor(key, config), place.layer, targets)
        wholly_absent = absent_parts(self.optional, covered)
        if (
            "unembed.W_U" not in covered
            and "unembed" not in wholly_absent
            and config.get("tie_word_embeddings", self.ties_by_default)
        ):
            self._tie(plan, config)
            covered.add("unembed.W_U")
        problems += self._missing(wanted, covered, cfg, wholly_absent)
        if problems:
            raise WeightsError(_listing(self.name, problems))
        order = ["unembed", "embed", *(f"blocks.{layer}" for layer in range(cfg.n_layers))]
        return {group: self._first_names(plan[group]) for group in order if group in plan}

    def _layers_behind(self, config: dict[str, Any]) -> int:
        """Layers that stand in the checkpoint and not in the model."""
        return max((config.get(name) or 0 for name in self.layers_behind), default=0)

    def _place(self, name: str) -> Place:
        """A tensor's name without prefix and with ``{l}`` and ``{e}`` for its layer and expert."""
        name = name.removeprefix(self.prefix)
        if name in self.keys:
            return Place(name)
        found = re.match(r"^(\D*\.)(\d+)(\..*)$", name)
        if found is None:
            return Place(name)
        rest, expert = found[3], re.match(r"^(\D*\.experts\.)(\d+)(\..*)$", found[3])
        if expert is not None:
            rest = f"{expert[1]}{{e}}{expert[3]}"
        number = None if expert is None else int(expert[2])
        return Place(f"{found[1]}{{l}}{rest}", int(found[2]), number)

    def _wanted(self, config: dict[str, Any], cfg: HookedTransformerConfig) -> Iterator[Place]:
        for pattern, key in self.keys.items():
            if key is None:
                continue
            if isinstance(key.when, str):
                exists = config.get(key.when, self.switches[key.when])
            else:
                exists = key.when is None or key.when(config)
            if not exists:
                continue
            layers: Iterable[int | None] = (None,)
            experts: Iterable[int | None] = (None,)
            if "{l}" in pattern:
                layers = range(key.from_layer, cfg.n_layers)
                if key.in_layer is not None:
                    layers = [layer for layer in layers if key.in_layer(config, layer)]
            if "{e}" in pattern:
                experts = range(cfg.num_experts or 0)
            yield from (Place(pattern, layer, expert) for layer in layers for expert in experts)

    def _missing(
        self,
        wanted: Iterable[Place],
        covered: set[str],
        cfg: HookedTransformerConfig,
        absent: Collection[str],
    ) -> list[str]:
        missing = {}
        for place in wanted:
            key = self.keys[place.pattern]
            assert key is not None
            for target in key.targets(place, cfg):
                part = target.split(".")[0]
                if target not in covered and part not in absent:
                    prefix = "" if part in _HEADS else self.prefix
                    # Two names may give one parameter; the first is today's.
                    name = place.pattern.format(l=place.layer, e=place.expert)
                    missing.setdefault(target, prefix + name)
        return [f"missing: {name}" for name in dict.fromkeys(missing.values())]

    @staticmethod
    def _enter(
        plan: Plan,
        name: str,
        key: Key,
        layer: int | None,
        targets: tuple[str, ...],
    ) -> None:
        if layer is not None:
            group = f"blocks.{layer}"
        else:
            group = "unembed" if targets[0].startswith(("ln_final", "unembed")) else "embed"
        plan.setdefault(group, []).append((name, key, targets))

    def _first_names(
        self, entries: list[tuple[str, Key, tuple[str, ...]]]
    ) -> list[tuple[str, Key, tuple[str, ...]]]:
        """Of several names of one parameter, the one that stands first in ``keys``."""
        patterns = list(self.keys)
        first: dict[tuple[str, ...], int] = {}
        places = []
        for name, _, targets in entries:
            pattern = self._place(name).pattern
            place = patterns.index(pattern) if pattern in self.keys else len(patterns)
            places.append(place)
            first[targets] = min(place, first.get(targets, place))
        return [
            entry
            for entry, place in zip(entries, places, strict=True)
            if not entry[2] or place == first[entry[2]]
        ]

    def _with_factor(self, key: Key, config: dict[str, Any]) -> Key:
        """The key as this config multiplies it."""
        into = (key.into,) if isinstance(key.into, str) else key.into
        found = [self.factors[name](config) for name in into if name in self.factors]
        return replace(key, factor=float(found[0])) if found else key

    def _tie(self, plan: Plan, config: dict[str, Any]) -> None:
        for name, _, targets in plan.get("embed", []):
            if targets in (("embed.W_E",), ("embed.embed.W_E",)):
                tied = Key("d_vocab d_model", "unembed.W_U", transposed)
                tied = self._with_factor(tied, config)
                plan.setdefault("unembed", []).append((name, tied, ("unembed.W_U",)))


FAMILIES: Registry[Family] = Registry("fastlens.weights.families", "FAMILY")


def family_of(config: dict[str, Any]) -> tuple[Family, str]:
    """The family of a Hugging Face config dict, and the architecture's name.

    Raises: ConfigError that names the architectures that can be loaded.
    """
    stated = config.get("architectures") or []
    known = {name: family for family in FAMILIES for name in family.architectures}
    for architecture in stated:
        if architecture in known:
            return known[architecture], architecture
    for family in FAMILIES:
        # A config without architectures is what its model_type's causal language model would be.
        if not stated and config.get("model_type") == family.name:
            return family, family.architectures[0]
    found = ", ".join(stated) or f"none, model_type={config.get('model_type')!r}"
    raise ConfigError(
        f"the config's architecture is {found}. fastlens can load {', '.join(sorted(known))}. "
        f"Any other that transformers can load opens with hooks, caches and patching, but without "
        f"TransformerLens' names: model = HookedModule.from_pretrained(name_or_folder), or "
        f"HookedModule(hf_model). A new family is one file in fastlens/weights/families."
    )


def _sizes(cfg: HookedTransformerConfig) -> dict[str, int]:
    heads = cfg.n_heads * cfg.d_head
    encoder = cfg.encoder or EncoderConfig()
    return {
        "d_model": cfg.d_model,
        "d_mlp": cfg.d_mlp or 0,
        "d_vocab": cfg.d_vocab,
        "n_ctx": cfg.n_ctx,
        "heads": heads,
        "kv_heads": (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head,
        "qkv": 3 * heads,
        "two": 2,
        "d_embed": encoder.d_embed or cfg.d_model,
        "token_types": encoder.n_token_types,
        "frequencies": (cfg.rotary_dim or cfg.d_head) // 2,
        "positions": cfg.n_ctx + (0 if encoder.padding_id is None else encoder.padding_id + 1),
        "n_heads": cfg.n_heads,
        "n_kv_heads": cfg.n_key_value_heads or cfg.n_heads,
        "d_mlp_dense": cfg.d_mlp_dense or 0,
        "values": cfg.n_heads * (cfg.d_value or cfg.d_head),
        "nope": cfg.n_heads * (cfg.d_head - (cfg.rotary_dim or 0)),
        "rotary": cfg.rotary_dim or 0,
        "d_q_latent": cfg.d_q_latent or 0,
        "d_kv_latent": cfg.d_kv_latent or 0,
        "d_head": cfg.d_head,
        "buckets": cfg.relative_attention_num_buckets or 0,
        "experts": cfg.num_experts or 0,
        "d_shared": cfg.d_shared_expert or 0,
    }


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    """``heads+kv_heads`` or ``n_ctx+2`` as a number."""
    return sum(int(part) if part.isdecimal() else sizes[part] for part in axis.split("+"))


def absent_parts(optional: Iterable[tuple[str, ...]], parameters: Iterable[str]) -> set[str]:
    """The first words of the optional parts that none of these parameters belongs to."""
    here = {name.split(".")[0] for name in parameters}
    return {word for part in optional if here.isdisjoint(part) for word in part}


def _listing(name: str, problems: list[str]) -> str:
    lines = problems[:MAX_LISTED]
    if len(problems) > MAX_LISTED:
        lines.append(f"and {len(problems) - MAX_LISTED} more")
    return (
        f"the tensors do not fit the {name} family and this config ({len(problems)} problems):\n  "
        + "\n  ".join(lines)
        + "\nCheck that config and weights belong together, and that no file is missing."
    )


@functools.cache
def _default_config(config_class: str) -> dict[str, Any]:
    import transformers

    return getattr(transformers, config_class)().to_dict()
