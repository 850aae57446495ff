"""Filling a model's parameters, group by group, in the memory they already have."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastlens.components.norms import LayerNorm, RMSNorm, make_norm
from fastlens.config import HookedTransformerConfig
from fastlens.errors import WeightsError
from fastlens.weights.family import absent_parts
from fastlens.weights.fold import process_group, split_groups
from fastlens.weights.source import Source

logger = logging.getLogger(__name__)

# Made from the config, never learnt.
BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos", "alibi")
HALF = (torch.float16, torch.bfloat16)


def is_buffer(key: str) -> bool:
    """Whether a state dict entry is a table that the model makes itself."""
    return key.rsplit(".", 1)[-1] in BUFFERS


def is_norm(key: str) -> bool:
    """Whether a state dict entry is the gain or bias of a norm."""
    return key.rsplit(".", 1)[-1] in ("w", "b")


def is_bias(key: str) -> bool:
    """Whether a state dict entry is a bias of attention, MLP or unembedding."""
    return key.rsplit(".", 1)[-1].startswith(("b_", "_b_"))


def unread(cfg: HookedTransformerConfig) -> tuple[str, ...]:
    """Parameters that TransformerLens has and no forward reads: positions beside ALiBi's."""
    return ("pos_embed.W_pos",) if cfg.positional_embedding_type == "alibi" else ()


def load_source(model: nn.Module, source: Source, flags: Mapping[str, bool]) -> set[str]:
    """Read, process and store a source's weights; ``flags`` are `possible_flags`' answer.

    Returns: the optional parts (`Family.optional`) that the source has no weights for; they are
        filled with NaN.
    Cost: beside the model's own memory, one group and one matrix.
    Raises: WeightsError that lists all tensors that do not fit.
    """
    cfg: HookedTransformerConfig = model.cfg  # type: ignore[assignment]
    parameters = dict(model.named_parameters())
    if source.unchecked_shapes is not None:
        check_fit(parameters, source.unchecked_shapes, cfg)
    # 16-bit weights that will be processed are rounded once, at the end.
    processed = any(flags.values())
    dtype = torch.float32 if cfg.dtype in HALF and processed else cfg.dtype
    filled: set[str] = set()
    for name, group in source.groups(cfg, dtype, into=parameters):
        if processed:
            group = process_group(name, group, cfg, consume=source.gives_copies, **flags)
        filled |= store(parameters, group)
        del group
    optional = () if source.family is None else source.family.optional
    absent = absent_parts(optional, filled)
    for key, parameter in parameters.items():
        if key.split(".")[0] in absent:
            torch.nn.init.constant_(parameter, torch.nan)
            filled.add(key)
    fill_rest(parameters, filled, unread(cfg))
    return absent


@torch.no_grad()
def store(parameters: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> set[str]:
    """Copy tensors into the parameters of that name, emptying the dict; returns the names filled.

    Buffers and norms that were folded away have no parameter and are dropped.
    Raises: WeightsError for a norm without a parameter that would change the model.
    """
    filled = set()
    for key in list(tensors):
        tensor = tensors.pop(key)
        if key in parameters:
            if not _is_same_memory(parameters[key], tensor):
                parameters[key].copy_(tensor)
            filled.add(key)
        else:
            _refuse_gain(key, tensor)
    return filled


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype


def _refuse_gain(key: str, tensor: Tensor) -> None:
    """A norm that has no parameter must be the identity."""
    if is_norm(key) and not bool((tensor == float(key.endswith(".w"))).all()):
        raise WeightsError(
            f"the weights have {key}, which is not folded, but this model's norms have no gain "
            f"(cfg.normalization_type ends in 'Pre'). Load with fold_ln=True."
        )


@torch.no_grad()
def fill_rest(
    parameters: Mapping[str, Tensor], filled: Iterable[str], unread: Iterable[str] = ()
) -> None:
    """Biases that a checkpoint does not have are zero, those of LayerNorms too (MPT, Cohere).

    Raises: WeightsError for anything else that is left.

    Args:
        unread: Other parameters that may be zero, as nothing reads them.
    """
    filled, unread = set(filled), set(unread)
    missing = [
        key
        for key in parameters
        if key not in filled | unread and not is_bias(key) and not (is_norm(key) and key[-1] == "b")
    ]
    if missing:
        raise WeightsError(f"no weights were given for {', '.join(missing)}.")
    for key, parameter in parameters.items():
        if key not in filled:
            parameter.zero_()


def check_fit(
    parameters: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    cfg: HookedTransformerConfig,
) -> None:
    """Compare shapes with a model's parameters; all problems in one WeightsError."""
    problems = []
    for key, shape in shapes.items():
        if key not in parameters:
            if not is_buffer(key) and not _left_out(key, cfg):
                problems.append(f"unknown: {key} {list(shape)}")
        elif tuple(parameters[key].shape) != tuple(shape):
            problems.append(
                f"wrong shape: {key} is {list(shape)}, expected {list(parameters[key].shape)}"
            )
    for key in parameters:
        if key not in shapes and not is_bias(key):
            problems.append(f"missing: {key}")
    if problems:
        raise WeightsError(
            f"the tensors do not fit the config ({len(problems)} problems):\n  "
            + "\n  ".join(problems[:30])
            + "\nCheck that config and weights belong together."
        )


def _left_out(key: str, cfg: HookedTransformerConfig) -> bool:
    """A norm about to be folded away, or a layer beyond ``first_n_layers``."""
    parts = key.split(".")
    if parts[0] == "blocks" and int(parts[1]) >= cfg.n_layers:
        return True
    return is_norm(key) and str(cfg.normalization_type).endswith("Pre")


# -- state dicts -----------------------------------------------------------------------------------


def load_state_dict(
    model: nn.Module, state_dict: dict[str, Any], flags: Mapping[str, bool]
) -> None:
    """Process a complete state dict and store it, emptying the dict as TransformerLens does."""
    cfg: HookedTransformerConfig = model.cfg  # type: ignore[assignment]
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    check_fit({key: place for key, place in places.items() if not is_buffer(key)}, shapes, cfg)
    if not flags.get("fold_ln"):
        for key, tensor in state_dict.items():
            if key not in places:
                _refuse_gain(key, tensor)
    groups = list(split_groups(state_dict))
    state_dict.clear()
    while groups:
        name, group = groups.pop(0)
        processed = process_group(name, group, cfg, **flags)
        del group
        # A legacy square mask has no place any more.
        same = {k: v for k, v in processed.items() if k not in places or places[k].shape == v.shape}
        processed.clear()
        store(places, same)


def fill_missing_keys(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Add the model's own biases, norms and buffers where a state dict lacks them, as TL does.

    Raises: WeightsError for missing weight matrices: a made-up one is a dead layer.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    matrices = [key for key in missing if "W_" in key]
    if matrices:
        raise WeightsError(
            f"the state dict has no {', '.join(matrices[:20])}, which the model expects. Grouped "
            f"key-value heads are called _W_K and _W_V. Nothing was loaded."
        )
    norms = [key for key in missing if is_norm(key)]
    if norms:
        logger.warning("norms not in the state dict keep gain 1 and bias 0: %s", ", ".join(norms))
    for key in missing:
        state_dict[key] = own[key]
    return state_dict


def fold_norms_away(model: nn.Module) -> None:
    """Replace the norms before attention, MLP and unembedding by their forms without gain.

    What is not read by a weight (post-norms, QK norms, the embedding's norm) stays.
    """
    cfg: HookedTransformerConfig = model.cfg  # type: ignore[assignment]
    if cfg.normalization_type not in ("LN", "RMS"):
        return
    cfg.normalization_type += "Pre"
    owners: list[tuple[nn.Module, str]] = [(model, "ln_final")]
    for block in model.blocks:  # type: ignore[union-attr]
        owners += [(block, "ln1"), (block, "ln2"), (getattr(block, "mlp", block), "ln")]
    for owner, name in owners:
        norm = getattr(owner, name, None)
        if isinstance(norm, LayerNorm | RMSNorm):
            kind = "LNPre" if isinstance(norm, LayerNorm) else "RMSPre"
            setattr(owner, name, make_norm(cfg, kind, norm.length))
