"""SantaCoder's first release: GPT-2 whose heads share a key and a value (code of its own).

``bigcode/gpt_bigcode-santacoder`` is the same model as transformers has it.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.families import gpt2
from fastlens.weights.family import Key
from fastlens.weights.views import bias_heads


def _queries(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    """``[d_model, (head d_head)]``: Conv1D is stored ``[in, out]``."""
    return tensor.view(cfg.d_model, cfg.n_heads, cfg.d_head).transpose(0, 1)


def _shared(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, Tensor]:
    """``[d_model, (k v) d_head]``, or a bias; every head gets a copy, as in TransformerLens."""
    k, v = (part.expand(cfg.n_heads, *part.shape).clone() for part in tensor.chunk(2, -1))
    return k, v


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("attention_head_type", "multihead")
    if kind != "multiquery":
        raise ConfigError(
            f"attention_head_type={kind!r} was found; of GPT2LMHeadCustomModel fastlens reads "
            f"'multiquery', SantaCoder's."
        )
    return {"d_head": config.get("n_embd", 768) // config.get("n_head", 12)}


A, T = gpt2.A, gpt2.T

FAMILY = replace(
    gpt2.FAMILY,
    name="santacoder",
    architectures=("GPT2LMHeadCustomModel",),
    derive=_derive,
    reads=frozenset({"attention_head_type"}),
    keys={
        **{name: key for name, key in gpt2.KEYS.items() if "c_attn" not in name},
        A + "q_attn.weight": Key("d_model heads", T + "W_Q", _queries),
        A + "q_attn.bias": Key("heads", T + "b_Q", bias_heads),
        A + "kv_attn.weight": Key("d_model d_head+d_head", (T + "W_K", T + "W_V"), _shared),
        A + "kv_attn.bias": Key("d_head+d_head", (T + "b_K", T + "b_V"), _shared),
    },
    aliases={"santacoder": "bigcode/santacoder"},
    repositories=(),
    checkpoints=None,
    gguf={},
)
