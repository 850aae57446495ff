"""Attention: grouped or not, rotary, ALiBi or shortformer positions, windows, and all its hooks."""

from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.attended import Attended, AttentionTap, sum_of, with_heads_looked_at
from fastlens.components.kv_cache import TransformerLensKeyValueCacheEntry
from fastlens.components.layout import (
    from_input_heads,
    from_output_heads,
    input_heads,
    linear,
    neighbour_heads,
    neighbours,
    output_heads,
    rejoin,
    side_by_side,
)
from fastlens.components.position_methods import PositionMethods
from fastlens.components.qk_norm import make_qk_norm
from fastlens.components.rotary_tables import check_same_table, rotary_tables, table_rows
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, ShapeError
from fastlens.factored_matrix import FactoredMatrix
from fastlens.hooks.of_heads import heads_looked_at
from fastlens.hooks.point import HookPoint, is_live
from fastlens.kernels.masks import AttentionRule, alibi_slopes, visibility
from fastlens.ops.activations import soft_cap
from fastlens.ops.attention import attention
from fastlens.ops.attention_sinks import attention_with_sinks, pattern_from
from fastlens.ops.rotary import rotary
from fastlens.tokens import get_offset_position_ids

_ATTEND_METHODS = ("calculate_attention_scores", "calculate_z_scores", "apply_causal_mask")


class AbstractAttention(PositionMethods, nn.Module):
    """What grouped and ungrouped attention share. Use `Attention` or `GroupedQueryAttention`.

    Queries, keys and values come from one product over side-by-side weights when no gradient is
    recorded. Scores and pattern are materialised only while a hook on ``hook_attn_scores`` or
    ``hook_pattern`` looks at them (or a subclass replaced a step); otherwise attention is fused.
    """

    ROTARY_INITIAL_CACHE_SIZE = 2048
    AXES = {
        "hook_k": "batch pos kv_head d_head",
        "hook_q": "batch pos head d_head",
        "hook_v": "batch pos kv_head d_head",
        "hook_z": "batch pos head d_head",
        "hook_attn_scores": "batch head query_pos key_pos",
        "hook_pattern": "batch head query_pos key_pos",
        "hook_result": "batch pos head d_model",
        "hook_attn_input": "batch pos d_model",
        "hook_rot_k": "batch pos kv_head d_head",
        "hook_rot_q": "batch pos head d_head",
    }
    # What a run shows this layer's queries and keys to, for its cache.
    tap: AttentionTap | None = None
    # One score a head beside every row's, where the config has attention sinks.
    sinks: nn.Parameter | None
    # The leaves that hold keys and values; grouped attention names them with an underscore.
    KEY_VALUE_NAMES = ("W_K", "W_V", "b_K", "b_V")

    rotary_sin: Tensor
    rotary_cos: Tensor
    hook_k: HookPoint
    hook_q: HookPoint
    hook_v: HookPoint
    hook_z: HookPoint
    hook_attn_scores: HookPoint
    hook_pattern: HookPoint
    hook_result: HookPoint
    hook_rot_k: HookPoint
    hook_rot_q: HookPoint

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any],
        attn_type: str = "global",
        layer_id: int | None = None,
    ):
        super().__init__()
        self.cfg = cfg = HookedTransformerConfig.unwrap(cfg)
        if attn_type not in ("global", "local"):
            raise ConfigError(f"attn_type={attn_type!r} must be 'global' or 'local'.")
        if attn_type == "local" and cfg.window_size is None:
            raise ConfigError("local attention needs window_size.")
        self.attn_type = attn_type
        self.layer_id = layer_id
        self._add_weights()
        self.q_norm = make_qk_norm(cfg, cfg.n_heads)
        self.k_norm = make_qk_norm(cfg, self.n_kv_heads)
        self.attn_scale = cfg.attn_scale if cfg.use_attn_scale else 1.0
        if cfg.scale_attn_by_inverse_layer_idx:
            if layer_id is None:
                raise ConfigError("scale_attn_by_inverse_layer_idx needs layer_id.")
            self.attn_scale *= layer_id + 1
        # TransformerLens' buffers, kept for state dicts; masks are made per forward.
        self.register_buffer("mask", torch.empty((0, 0), dtype=torch.bool))
        self.register_buffer("IGNORE", torch.tensor(-torch.inf))
        names = ["k", "q", "v", "z", "attn_scores", "pattern", "result"]
        if cfg.positional_embedding_type == "shortformer":
            names.append("attn_input")
        if cfg.positional_embedding_type == "rotary":
            names += ["rot_k", "rot_q"]
        for name in names:
            setattr(self, f"hook_{name}", HookPoint(self.AXES[f"hook_{name}"]))
        if cfg.positional_embedding_type == "rotary":
            sin, cos = self._tables(min(cfg.n_ctx, self.ROTARY_INITIAL_CACHE_SIZE), cfg.dtype)
            self.register_buffer("rotary_sin", sin)
            self.register_buffer("rotary_cos", cos)

    def _add_weights(self) -> None:
        """Register the leaves in TransformerLens' order: Q, O, sinks, then keys and values."""
        cfg = self.cfg
        kv_heads = self.n_kv_heads
        heads = (cfg.n_heads, kv_heads, kv_heads)
        rows = [n * cfg.d_head for n in heads]
        weights = side_by_side(rows, cfg.d_model, cfg.dtype)
        w_q, w_k, w_v = (
            nn.Parameter(input_heads(part, n)) for part, n in zip(weights, heads, strict=True)
        )
        biases = torch.zeros(sum(heads), cfg.d_head, dtype=cfg.dtype).split(heads)
        b_q, b_k, b_v = (nn.Parameter(bias) for bias in biases)
        w_o = torch.empty(cfg.d_model, rows[0], dtype=cfg.dtype)
        self.W_Q = w_q
        self.W_O = nn.Parameter(output_heads(w_o, cfg.n_heads))
        self.b_Q = b_q
        self.b_O = nn.Parameter(torch.zeros(cfg.d_model, dtype=cfg.dtype))
        self.sinks = None
        if cfg.use_attention_sinks:
            self.sinks = nn.Parameter(torch.zeros(cfg.n_heads, dtype=cfg.dtype))
        for name, leaf in zip(self.KEY_VALUE_NAMES, (w_k, w_v, b_k, b_v), strict=True):
            self.register_parameter(name, leaf)

    @property
    def n_kv_heads(self) -> int:
        """Heads that hold keys and values: fewer than ``n_heads`` under grouped attention."""
        return self.cfg.n_heads

    def key_value_leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_K, W_V, b_K, b_V as the products read them."""
        w_k, w_v, b_k, b_v = (getattr(self, name) for name in self.KEY_VALUE_NAMES)
        return w_k, w_v, b_k, b_v

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` per head: what a head writes when it attends to a token.

        A norm behind attention, if there is one (OLMo-2, Gemma-2), comes after that.
        """
        return FactoredMatrix(self.W_V, self.W_O)  # type: ignore[arg-type]

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` per head: which token a head looks for, rows query, columns key.

        Without what stands between the two: QK-norms, clipping, rotary positions.
        """
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))  # type: ignore[operator]

    # -- forward -----------------------------------------------------------------------------

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch kv_pos *kv_head d_model"],
        value_input: Float[Tensor, "batch kv_pos *kv_head d_model"],
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
        additive_attention_mask: Float[Tensor, "batch 1 1 all_pos"] | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        position_bias: Float[Tensor, "1 head pos all_pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the layer adds to the residual stream.

        Args:
            query_input, key_input, value_input: Normalised residual stream, one for all heads or
                one per head (``use_split_qkv_input``, ``use_attn_in``).
            past_kv_cache_entry: Earlier keys and values; the new ones are appended to it.
            additive_attention_mask, position_bias: Added to the scores.
            attention_mask: 0 for padding, over past and new tokens.
        """
        q, k, v = self.calculate_qkv_matrices(query_input, key_input, value_input)
        offset = 0
        if past_kv_cache_entry is not None:
            offset = past_kv_cache_entry.past_keys.size(1)
            k, v = past_kv_cache_entry.append(k, v)
        if self.cfg.positional_embedding_type == "rotary":
            q, k = self._rotated(q, k, offset, attention_mask)
        added = [bias for bias in (position_bias, additive_attention_mask) if bias is not None]
        return self._output(self._attended(q, k, v, offset, attention_mask, added))

    def _attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offset: int,
        attention_mask: Tensor | None,
        added: list[Tensor],
    ) -> Tensor:
        """Values mixed by attention: fused but for the heads whose scores or pattern are seen."""
        heads = self._heads_looked_at()
        if heads is not None:
            key_mask = None if attention_mask is None else attention_mask.bool()
            bias, rule = sum_of(added, q.shape[1]), self.rule
            z = self._fused(q, k, v, rule, offset, key_mask, bias)
            attended = Attended(q, k, rule, offset, key_mask, bias, self.sinks)
            if self.tap is not None:
                self.tap.fused(attended.detached())
            if heads:
                points = self.hook_attn_scores, self.hook_pattern
                z = with_heads_looked_at(z, v, attended, heads, points)
            return self.hook_z(z)
        scores = self.calculate_attention_scores(q, k)
        scores = self.hook_attn_scores(self._biased(scores, offset, attention_mask, added))
        sinks = None if self.sinks is None else self.sinks[:, None]
        pattern = self.hook_pattern(pattern_from(scores, sinks))
        if self.tap is not None:
            self.tap.materialised(scores.detach(), pattern.detach())
        return self.calculate_z_scores(v, pattern.to(device=v.device, dtype=v.dtype))

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        """Values mixed by softmax, beside this layer's sinks if it has any."""
        if self.sinks is None:
            return attention(q, k, v, *rest)
        return attention_with_sinks(q, k, v, self.sinks, *rest)

    @property
    def rule(self) -> AttentionRule:
        """Scale, mask and bias of this layer's scores, for the fused op."""
        cfg = self.cfg
        return AttentionRule(
            scale=float(self.attn_scale),
            causal=cfg.attention_dir == "causal",
            window=cfg.window_size if self.attn_type == "local" else None,
            soft_cap=cfg.attn_scores_soft_cap,
            alibi=cfg.positional_embedding_type == "alibi",
        )

    @property
    def is_fused(self) -> bool:
        """Whether nobody looks at scores or pattern, and their steps are our own."""
        return self._heads_looked_at() == ()

    def _heads_looked_at(self) -> tuple[int, ...] | None:
        """The heads whose scores or pattern hooks see; None for all, or if a step is not ours."""
        in_scores = heads_looked_at(self.hook_attn_scores)
        in_pattern = heads_looked_at(self.hook_pattern)
        if in_scores is None or in_pattern is None:
            return None
        cls, own = type(self), AbstractAttention
        ours = (
            cls.calculate_attention_scores is own.calculate_attention_scores
            and cls.calculate_z_scores is own.calculate_z_scores
            and cls.apply_causal_mask is own.apply_causal_mask
            and not any(name in self.__dict__ for name in _ATTEND_METHODS)
        )
        return tuple(sorted({*in_scores, *in_pattern})) if ours else None

    def calculate_qkv_matrices(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch kv_pos *kv_head d_model"],
        value_input: Float[Tensor, "batch kv_pos *kv_head d_model"],
    ) -> tuple[
        Float[Tensor, "batch pos head d_head"],
        Float[Tensor, "batch kv_pos kv_head d_head"],
        Float[Tensor, "batch kv_pos kv_head d_head"],
    ]:
        """Queries, keys and values after their hooks and QK-norm, before rotary."""
        joint = None
        shared = query_input is key_input and key_input is value_input
        if shared and not self._looks_at_qkv():
            joint = self._joint_product(query_input)
        if joint is None:
            w_k, w_v, b_k, b_v = self.key_value_leaves()
            q = self.hook_q(_per_head(query_input, self.W_Q, self.b_Q))
            k = self.hook_k(_per_head(key_input, w_k, b_k))
            v = self.hook_v(_per_head(value_input, w_v, b_v))
        else:
            q, k, v = joint
        if self.q_norm is not None and self.k_norm is not None and not self.norms_behind_rotary:
            q, k = self.q_norm.of_heads(q), self.k_norm.of_heads(k)
        if self.cfg.clip_qkv is not None:
            q, k, v = (x.clamp(-self.cfg.clip_qkv, self.cfg.clip_qkv) for x in (q, k, v))
        return q, k, v

    def _looks_at_qkv(self) -> bool:
        # Views of one joint tensor must not reach a cache: each would keep all three alive.
        if self.tap is not None:
            return True
        return is_live(self.hook_q) or is_live(self.hook_k) or is_live(self.hook_v)

    def _joint_product(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """q, k, v from one product if the weights are neighbours in memory, else None."""
        if x.ndim != 3 or torch.is_grad_enabled():
            return None
        w_k, w_v, b_k, b_v = self.key_value_leaves()
        weights = (self.W_Q, w_k, w_v)
        weight = neighbours([w.transpose(1, 2) for w in weights])  # [all heads, d_head, d_model]
        bias = None if weight is None else neighbours([self.b_Q, b_k, b_v])
        if weight is None or bias is None:
            return None
        qkv = linear(x, weight.flatten(0, 1), bias.flatten())
        return qkv.unflatten(-1, bias.shape).split([w.shape[0] for w in weights], dim=2)

    def calculate_attention_scores(
        self,
        q: Float[Tensor, "batch query_pos head d_head"],
        k: Float[Tensor, "batch key_pos kv_head d_head"],
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        """``q . k / scale``, soft-capped; without mask or bias."""
        scores = _grouped(q.transpose(1, 2), k.permute(0, 2, 3, 1)) / self.attn_scale
        return soft_cap(scores, self.cfg.attn_scores_soft_cap)

    def _biased(
        self, scores: Tensor, offset: int, attention_mask: Tensor | None, added: list[Tensor]
    ) -> Tensor:
        """Scores with ALiBi or a given bias, then masked."""
        n_queries, n_keys = scores.shape[-2:]
        if self.cfg.positional_embedding_type == "alibi":
            queries = torch.arange(offset, offset + n_queries, device=scores.device)
            keys = torch.arange(n_keys, device=scores.device)
            distance = (keys[None, :] - queries[:, None]).clamp(max=0)
            slopes = alibi_slopes(self.cfg.n_heads, scores.device, scores.dtype)
            scores = scores + slopes[:, None, None] * distance
        for bias in added:
            scores = scores + bias
        return self.apply_causal_mask(scores, offset, attention_mask)

    def apply_causal_mask(
        self,
        attn_scores: Float[Tensor, "batch head pos all_pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
    ) -> Float[Tensor, "batch head pos all_pos"]:
        """Minus infinity where a key is later, outside the window, or padding."""
        n_queries, n_keys = attn_scores.shape[-2:]
        device = attn_scores.device
        queries = torch.arange(past_kv_pos_offset, past_kv_pos_offset + n_queries, device=device)
        key_mask = None if attention_mask is None else attention_mask.bool().to(device)
        visible = visibility(self.rule, queries, torch.arange(n_keys, device=device), key_mask)
        return attn_scores if visible is None else attn_scores.masked_fill(~visible, -torch.inf)

    def calculate_z_scores(
        self,
        v: Float[Tensor, "batch key_pos kv_head d_head"],
        pattern: Float[Tensor, "batch head query_pos key_pos"],
    ) -> Float[Tensor, "batch query_pos head d_head"]:
        """Values mixed by the pattern, after ``hook_z``."""
        return self.hook_z(_grouped(pattern, v.transpose(1, 2)).transpose(1, 2))

    def _output(self, z: Tensor) -> Tensor:
        """Head outputs projected and summed; per head first where ``use_attn_result``."""
        if not self.cfg.use_attn_result:
            return linear(z.flatten(2), from_output_heads(self.W_O), self.b_O)
        result = torch.einsum("bphd,hdm->bphm", z.to(self.W_O.dtype), self.W_O)
        return self.hook_result(result).sum(2) + self.b_O

    # -- rotary ------------------------------------------------------------------------------

    def _tables(self, n_ctx: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sin, cos = rotary_tables(self.cfg, n_ctx, dtype, is_local=self.attn_type == "local")
        # A turn by nothing: its queries and keys pass the same hooks as those of other layers.
        return (sin, cos) if self.rotates else (torch.zeros_like(sin), torch.ones_like(cos))

    @property
    def rotates(self) -> bool:
        """Whether this layer turns queries and keys by their positions."""
        layers = self.cfg.rotary_layers
        if self.cfg.positional_embedding_type != "rotary" or layers is None:
            return self.cfg.positional_embedding_type == "rotary"
        return bool(layers[self.layer_id or 0])

    def grow_tables(self, n_ctx: int) -> None:
        """Make the rotary tables reach ``n_ctx`` positions.

        Raises: ShapeError beyond the training length of a model that attends otherwise there.
        """
        length = self.cfg.train_seq_length or self.cfg.n_ctx
        if n_ctx > length and (self.cfg.use_logn_attn or self.cfg.use_dynamic_ntk_rope):
            raise ShapeError(
                f"a text of {n_ctx} tokens was given to a model trained on {length}, beyond which "
                f"it scales queries and rotary angles by the length of the text (log-n attention, "
                f"dynamic NTK). That is not computed here: give at most {length} tokens."
            )
        if n_ctx > self.rotary_cos.shape[0]:
            sin, cos = self._tables(max(n_ctx, 2 * self.rotary_cos.shape[0]), self.rotary_cos.dtype)
            self.rotary_sin = sin.to(self.rotary_sin.device)
            self.rotary_cos = cos.to(self.rotary_cos.device)

    @property
    def norms_behind_rotary(self) -> bool:
        """Whether QK-norm comes after the rotation, and before its hooks (HunYuan)."""
        return self.cfg.qk_norm_kind == "behind_rotary"

    def _rotated(
        self, q: Tensor, k: Tensor, offset: int, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by their positions, after their hooks."""
        if self.norms_behind_rotary and self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm.of_heads(self.apply_rotary(q, offset, attention_mask))
            k = self.k_norm.of_heads(self.apply_rotary(k, 0, attention_mask))
            return self.hook_rot_q(q), self.hook_rot_k(k)
        both = None
        looked_at = is_live(self.hook_rot_q) or is_live(self.hook_rot_k)
        if offset == 0 and not looked_at:
            both = neighbour_heads(q, k)
        ours = type(self).apply_rotary is AbstractAttention.apply_rotary
        if both is not None and ours and "apply_rotary" not in self.__dict__:
            q, k = self.apply_rotary(both, 0, attention_mask).split([q.shape[2], k.shape[2]], 2)
            return q, k
        if looked_at and not self.rotates:
            # Hooks that write in place must write neither to a KV cache nor to what is captured.
            q, k = q.clone(), k.clone()
        q = self.hook_rot_q(self.apply_rotary(q, offset, attention_mask))
        # Keys are kept unrotated, so all of them are turned, from position 0.
        return q, self.hook_rot_k(self.apply_rotary(k, 0, attention_mask))

    def apply_rotary(
        self,
        x: Float[Tensor, "batch pos head d_head"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries or keys turned by their positions, which left padding shifts per example."""
        if not self.rotates:
            return x
        end = past_kv_pos_offset + x.size(1)
        has_one_table = self.cfg.longrope_short_factor is None
        if attention_mask is None and has_one_table:
            self.grow_tables(end)
            rows = slice(past_kv_pos_offset, end)
            cos, sin = self.rotary_cos[None, rows], self.rotary_sin[None, rows]
        else:
            if attention_mask is None:
                positions = torch.arange(past_kv_pos_offset, end, device=x.device)[None]
                lengths = torch.tensor([end], device=x.device)
            else:
                positions = get_offset_position_ids(past_kv_pos_offset, attention_mask)
                lengths = attention_mask.sum(1)
            if past_kv_pos_offset and not has_one_table:
                check_same_table(self.cfg, past_kv_pos_offset, attention_mask, lengths)
            places = table_rows(self.cfg, positions, lengths)
            self.grow_tables(end if has_one_table else int(places.max()) + 1)
            cos, sin = self.rotary_cos[places], self.rotary_sin[places]
        if cos.dtype != x.dtype:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        return rotary(x, cos, sin, self.cfg.rotary_adjacent_pairs)

    # -- moving and loading ------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickled before there were sinks. A class attribute would hide the parameter.
        kept = {} if "sinks" in state["_parameters"] else {"sinks": None}
        super().__setstate__({**kept, **state})

    def _apply(self, fn: Any, recurse: bool = True) -> "AbstractAttention":
        before = self.W_O.dtype, self.W_O.device
        super()._apply(fn, recurse)
        after = self.W_O.dtype, self.W_O.device
        if after != before and after[1].type != "meta":
            # `.to()` copies leaf by leaf: bring Q, K and V together again.
            w_k, w_v, b_k, b_v = self.KEY_VALUE_NAMES
            for names in (("W_Q", w_k, w_v), ("b_Q", b_k, b_v)):
                found = [self._parameters.get(name) for name in names]
                leaves = [leaf for leaf in found if leaf is not None]
                if len(leaves) == len(names):  # else one is parametrized
                    rejoin(leaves, [_storage_shape(leaf) for leaf in leaves])
        if after[0] != before[0] and self.cfg.positional_embedding_type == "rotary":
            # Tables of the new precision, not rounded ones of the old.
            sin, cos = self._tables(self.rotary_cos.shape[0], after[0])
            self.rotary_sin, self.rotary_cos = sin.to(after[1]), cos.to(after[1])
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Old checkpoints hold an n_ctx x n_ctx mask, or tables of another length: keep ours.
        state_dict = dict(state_dict)
        for name in ("mask", "rotary_sin", "rotary_cos"):
            saved, ours = state_dict.get(prefix + name), self._buffers.get(name)
            if saved is not None and ours is not None and saved.shape != ours.shape:
                state_dict[prefix + name] = ours
        super()._load_from_state_dict(state_dict, prefix, *args)


class Attention(AbstractAttention):
    """Multi-head attention: every head has its own keys and values."""


class GroupedQueryAttention(AbstractAttention):
    """Attention whose query heads share KV heads (Ainslie et al. 2305.13245).

    The leaves are ``_W_K, _W_V, _b_K, _b_V`` with one entry per KV head; ``W_K`` and the others
    show them repeated for every query head. Query head h reads KV head
    ``h // (n_heads / n_kv_heads)``.
    """

    KEY_VALUE_NAMES = ("_W_K", "_W_V", "_b_K", "_b_V")

    @property
    def n_kv_heads(self) -> int:
        """``cfg.n_key_value_heads``."""
        assert self.cfg.n_key_value_heads is not None
        return self.cfg.n_key_value_heads

    @property
    def repeat_kv_heads(self) -> int:
        """Query heads per KV head."""
        return self.cfg.n_heads // self.n_kv_heads

    def key_value_leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_K, W_V, b_K, b_V with one entry per KV head, or per query head while ungrouped."""
        if self.cfg.ungroup_grouped_query_attention:
            return self.W_K, self.W_V, self.b_K, self.b_V
        return super().key_value_leaves()

    def _repeated(self, name: str) -> Tensor:
        return self._parameters[name].repeat_interleave(self.repeat_kv_heads, dim=0)  # type: ignore[union-attr]

    @property
    def W_K(self) -> Float[Tensor, "head d_model d_head"]:
        """Key weights, repeated per query head (a copy)."""
        return self._repeated("_W_K")

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        """Value weights, repeated per query head (a copy)."""
        return self._repeated("_W_V")

    @property
    def b_K(self) -> Float[Tensor, "head d_head"]:
        """Key biases, repeated per query head (a copy)."""
        return self._repeated("_b_K")

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        """Value biases, repeated per query head (a copy)."""
        return self._repeated("_b_V")

    def __setattr__(self, name: str, value: Any) -> None:
        # TransformerLens lets W_K be assigned: it replaces the grouped leaf.
        super().__setattr__(f"_{name}" if f"_{name}" in self.KEY_VALUE_NAMES else name, value)


def _storage_shape(leaf: Tensor) -> tuple[int, int]:
    """(rows, columns) of a head-split weight or bias as its product reads it."""
    if leaf.ndim == 2:
        return leaf.shape[0], leaf.shape[1]
    return leaf.shape[0] * leaf.shape[2], leaf.shape[1]


def _per_head(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """``x @ w[h] + b[h]`` per head; ``x`` is shared by the heads or has one entry for each."""
    if x.ndim == 4:
        return torch.einsum("bphm,hmd->bphd", x, w) + b
    return linear(x, from_input_heads(w), b.reshape(-1)).unflatten(-1, (w.shape[0], w.shape[2]))


def _grouped(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` over heads, where ``right`` may have fewer heads, each read by a group."""
    batch, heads = left.shape[:2]
    groups = right.shape[1]
    if heads == groups:
        return left @ right
    left = left.unflatten(1, (groups, heads // groups))
    return (left @ right[:, :, None]).flatten(1, 2)
