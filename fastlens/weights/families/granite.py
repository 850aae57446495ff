"""Granite 3: Llama with four multipliers, which are multiplied into the weights."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastlens.errors import ConfigError
from fastlens.weights.families import llama


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    scale = config.get("attention_multiplier", 1.0)
    if scale <= 0 or config.get("logits_scaling", 1.0) == 0:
        raise ConfigError(
            f"attention_multiplier={scale} and logits_scaling="
            f"{config.get('logits_scaling', 1.0)} must be positive."
        )
    return {**llama.heads_and_rotary(config), "attn_scale": 1.0 / scale}


def _stated(attribute: str) -> Callable[[dict[str, Any]], float]:
    return lambda config: config.get(attribute, 1.0)


_WRITTEN = ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")
_MULTIPLIERS = """embedding_multiplier residual_multiplier attention_multiplier
logits_scaling""".split()
_SIZES = "2b-base 2b-instruct 8b-base 8b-instruct".split()

FAMILY = replace(
    llama.FAMILY,
    name="granite",
    architectures=("GraniteForCausalLM",),
    config_class="GraniteConfig",
    derive=_derive,
    factors={
        "embed.W_E": _stated("embedding_multiplier"),
        **{f"blocks.{{l}}.{name}": _stated("residual_multiplier") for name in _WRITTEN},
        "unembed.W_U": lambda config: 1.0 / config.get("logits_scaling", 1.0),
    },
    reads=llama.FAMILY.reads | set(_MULTIPLIERS),
    only={},
    ignored=frozenset({"attention_dropout"}),
    aliases={},
    repositories=tuple(
        f"ibm-granite/granite-{version}-{size}"
        for version in ("3.0", "3.1", "3.3")
        for size in _SIZES
    ),
    default_prepend_bos=False,
    gguf={},
)
