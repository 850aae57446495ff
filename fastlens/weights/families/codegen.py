"""CodeGen 1 (350M to 16B): GPT-J, with queries, values and keys fused in four slices."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.families import gptj
from fastlens.weights.family import Key

# Rows of the fused weight lie as they did on the four chips that trained it.
SLICES = 4


def _qkv(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, Tensor, Tensor]:
    """``[(slice, q v k, head of the slice, d_head), d_model]``."""
    parts = tensor.view(SLICES, 3, cfg.n_heads // SLICES, cfg.d_head, cfg.d_model)
    q, v, k = (part.flatten(0, 1).transpose(1, 2) for part in parts.unbind(1))
    return q, k, v


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    heads = config.get("n_head", 16)
    if heads % SLICES:
        raise ConfigError(
            f"n_head={heads} was found; CodeGen's weights lie in {SLICES} slices, so it must be a "
            f"multiple of {SLICES}."
        )
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        raise ConfigError(
            "this config brings code of its own (auto_map), as CodeGen 2 does, whose fused weights "
            "lie in another order. fastlens reads CodeGen 1, as transformers computes it. If this "
            "is one, pass ignore_config_attributes=['auto_map']."
        )
    return gptj.head_size(config)


_APART = [f"{gptj.A}{x}_proj.weight" for x in "qkv"]

FAMILY = replace(
    gptj.FAMILY,
    name="codegen",
    architectures=("CodeGenForCausalLM",),
    config_class="CodeGenConfig",
    derive=_derive,
    keys={
        **{name: key for name, key in gptj.KEYS.items() if name not in _APART},
        gptj.A + "qkv_proj.weight": Key(
            "qkv d_model", tuple(f"{gptj.T}attn.W_{x}" for x in "QKV"), _qkv
        ),
    },
    aliases={},
    repositories=tuple(
        f"Salesforce/codegen-{size}-{kind}"
        for size in ("350M", "2B", "6B", "16B")
        for kind in ("nl", "multi", "mono")
    ),
)
