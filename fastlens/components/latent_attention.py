"""Multi-head latent attention: queries, keys and values that come through narrow latents."""

from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.attention import AbstractAttention
from fastlens.components.layout import (
    from_input_heads,
    input_heads,
    linear,
    linear_parameter,
    output_heads,
)
from fastlens.components.norms import RMSNorm
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.hooks.point import HookPoint

# DeepSeek's code gives these norms this number, whatever the config says of the others.
LATENT_EPS = 1e-6
_ELSEWHERE = ("W_Q", "W_K", "W_V", "b_Q", "b_K", "b_V", "QK", "OV")


class LatentAttention(AbstractAttention):
    """Attention whose keys and values are made of one small latent (DeepSeek-V2, 2405.04434).

    The latents are ``c_Q = RMSNorm(x @ W_QA + b_QA)`` and ``c_KV = RMSNorm(x @ W_KVA + b_KVA)``.
    Of each head, queries are ``c_Q @ W_QB``, values ``c_KV @ W_VB``, and keys ``c_KV @ W_KB``
    behind the channels that are rotated, ``x @ W_KR + b_KR``, which all heads share. Without
    ``cfg.d_q_latent`` queries are ``x @ W_Q``. The rotated channels come first in queries and
    keys, as everywhere here. Values may be narrower (``cfg.d_value``) than keys.

    There is no ``W_K`` or ``W_V`` on the residual stream: the norms stand between.
    """

    AXES = {
        **AbstractAttention.AXES,
        "hook_v": "batch pos head d_value",
        "hook_z": "batch pos head d_value",
        "hook_q_latent": "batch pos ... d_q_latent",
        "hook_kv_latent": "batch pos ... d_kv_latent",
    }

    hook_q_latent: HookPoint
    hook_kv_latent: HookPoint

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any],
        attn_type: str = "global",
        layer_id: int | None = None,
    ):
        cfg = HookedTransformerConfig.unwrap(cfg)
        _check(cfg)
        super().__init__(cfg, attn_type, layer_id)
        if cfg.d_q_latent is not None:
            self.hook_q_latent = HookPoint(self.AXES["hook_q_latent"])
        self.hook_kv_latent = HookPoint(self.AXES["hook_kv_latent"])

    def _add_weights(self) -> None:
        cfg = self.cfg
        heads, d_kv, d_value = cfg.n_heads, cfg.d_kv_latent, cfg.d_value or cfg.d_head
        assert d_kv is not None and cfg.rotary_dim is not None

        def of_heads(d_in: int, d_out: int) -> nn.Parameter:
            storage = torch.empty(heads * d_out, d_in, dtype=cfg.dtype)
            return nn.Parameter(input_heads(storage, heads))

        def bias(size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, dtype=cfg.dtype))

        if cfg.d_q_latent is None:
            self.W_Q = of_heads(cfg.d_model, cfg.d_head)
        else:
            self.W_QA = linear_parameter(cfg.d_model, cfg.d_q_latent, cfg.dtype)
            self.b_QA = bias(cfg.d_q_latent)
            self.q_a_norm = _latent_norm(cfg, cfg.d_q_latent)
            self.W_QB = of_heads(cfg.d_q_latent, cfg.d_head)
        self.W_KVA = linear_parameter(cfg.d_model, d_kv, cfg.dtype)
        self.b_KVA = bias(d_kv)
        self.kv_a_norm = _latent_norm(cfg, d_kv)
        self.W_KB = of_heads(d_kv, cfg.d_head - cfg.rotary_dim)
        self.W_VB = of_heads(d_kv, d_value)
        self.W_KR = linear_parameter(cfg.d_model, cfg.rotary_dim, cfg.dtype)
        self.b_KR = bias(cfg.rotary_dim)
        w_o = torch.empty(cfg.d_model, heads * d_value, dtype=cfg.dtype)
        self.W_O = nn.Parameter(output_heads(w_o, heads))
        self.b_O = bias(cfg.d_model)
        self.sinks = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _ELSEWHERE:
                raise AttributeError(
                    f"{name}: this model's queries, keys and values come through latents, with a "
                    f"norm between (LatentAttention), so there is no such matrix on the residual "
                    f"stream. Its weights are W_QA, W_QB, W_KVA, W_KB, W_VB and W_KR."
                ) from None
            raise

    def key_value_leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Refused: no matrix leads from the stream to keys or values."""
        raise ConfigError(
            "weights from the residual stream to keys and values were asked for. This model's pass "
            "a latent and its norm (LatentAttention), so there are none."
        )

    # -- queries, keys and values ------------------------------------------------------------

    def calculate_qkv_matrices(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch kv_pos *head d_model"],
        value_input: Float[Tensor, "batch kv_pos *head d_model"],
    ) -> tuple[
        Float[Tensor, "batch pos head d_head"],
        Float[Tensor, "batch kv_pos head d_head"],
        Float[Tensor, "batch kv_pos head d_value"],
    ]:
        """Queries, keys and values after their hooks, before rotary."""
        per_head = query_input.ndim == 4
        q = self.hook_q(self._queries(query_input, per_head))
        latent = self._kv_latent(key_input)
        k = self.hook_k(self._keys(key_input, latent, key_input.ndim == 4))
        if value_input is not key_input:
            latent = self._kv_latent(value_input)
        return q, k, self.hook_v(_of_heads(latent, self.W_VB, value_input.ndim == 4))

    def _queries(self, x: Tensor, per_head: bool, is_hooked: bool = True) -> Tensor:
        if self.cfg.d_q_latent is None:
            return _of_heads(x, self.W_Q, per_head)
        latent = linear(x, self.W_QA.t(), self.b_QA)
        if is_hooked:
            latent = self.hook_q_latent(self.q_a_norm(latent))
        else:
            latent = self.q_a_norm.unhooked(latent)
        return _of_heads(latent, self.W_QB, per_head)

    def _kv_latent(self, x: Tensor, is_hooked: bool = True) -> Tensor:
        latent = linear(x, self.W_KVA.t(), self.b_KVA)
        if is_hooked:
            return self.hook_kv_latent(self.kv_a_norm(latent))
        return self.kv_a_norm.unhooked(latent)

    def _keys(self, x: Tensor, latent: Tensor, per_head: bool) -> Tensor:
        shared = linear(x, self.W_KR.t(), self.b_KR)
        if not per_head:
            shared = shared[..., None, :].expand(*shared.shape[:-1], self.cfg.n_heads, -1)
        return torch.cat([shared, _of_heads(latent, self.W_KB, per_head)], -1)

    # -- over packed rows, without hooks -----------------------------------------------------

    def of_rows(
        self, x: Float[Tensor, "row d_model"], names: str
    ) -> tuple[Float[Tensor, "row head _"], ...]:
        """Queries, keys and values of rows before rotary; ``names`` is ``"qkv"``, ``"kv"``, ..."""
        latent = None if names == "q" else self._kv_latent(x, is_hooked=False)
        found = []
        for name in names:
            if name == "q":
                found.append(self._queries(x, False, is_hooked=False))
            elif name == "k":
                assert latent is not None
                found.append(self._keys(x, latent, False))
            else:
                assert latent is not None
                found.append(_of_heads(latent, self.W_VB, False))
        return tuple(found)

    def of_row_heads(
        self, x: Float[Tensor, "entry d_model"], name: str, heads: Int[Tensor, " entry"]
    ) -> Float[Tensor, "entry _"]:
        """Each entry's query, key or value of its own head."""
        at = torch.arange(len(heads), device=heads.device)
        return self.of_rows(x, name)[0][at, heads]


def _check(cfg: HookedTransformerConfig) -> None:
    """Refuse what no model with latents has."""
    wrong = {
        "n_key_value_heads": cfg.n_key_value_heads is not None,
        "positional_embedding_type": cfg.positional_embedding_type != "rotary",
        "use_qk_norm": cfg.use_qk_norm,
        "clip_qkv": cfg.clip_qkv is not None,
        "use_attention_sinks": cfg.use_attention_sinks,
        "rotary_dim": (cfg.rotary_dim or 0) >= cfg.d_head,
        "d_value": (cfg.d_value or 0) > cfg.d_head,
    }
    found = [f"{name}={getattr(cfg, name)!r}" for name, is_wrong in wrong.items() if is_wrong]
    if found:
        raise ConfigError(
            f"latent attention (d_kv_latent={cfg.d_kv_latent}) was asked with {', '.join(found)}. "
            f"It has rotary positions on some channels of each head, values no wider than keys, "
            f"and neither grouped heads nor QK-norm, clipping or sinks."
        )


def _latent_norm(cfg: HookedTransformerConfig, length: int) -> RMSNorm:
    norm = RMSNorm(cfg, length)
    norm.eps = LATENT_EPS
    norm.hook_normalized.axes = "batch pos ... d_latent"
    return norm


def _of_heads(x: Tensor, w: Tensor, per_head: bool) -> Tensor:
    """``x @ w[h]``, ``x`` shared by the heads or with one entry for each."""
    if per_head:
        return torch.einsum("...hm,hmd->...hd", x, w)
    return linear(x, from_input_heads(w)).unflatten(-1, (w.shape[0], w.shape[2]))
