"""Weight processing: the same function with weights that are easier to read.

Everything here is a pure function of one **group** of TransformerLens-named tensors ("embed",
"blocks.{l}", "unembed"), so it runs while weights are loaded or streamed, one group in memory.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError

logger = logging.getLogger(__name__)

FLAGS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)


def group_of(key: str) -> str:
    """The group a parameter belongs to: "embed", "blocks.{l}" or "unembed" (with ln_final)."""
    if key.startswith("blocks."):
        return ".".join(key.split(".")[:2])
    return "unembed" if key.startswith(("ln_final.", "unembed.")) else "embed"


def has_layer_norm(cfg: HookedTransformerConfig) -> bool:
    """Whether everything that reads the residual stream subtracts its mean first."""
    return cfg.normalization_type in ("LN", "LNPre") and not cfg.final_rms


def possible_flags(cfg: HookedTransformerConfig, **flags: bool) -> dict[str, bool]:
    """The flags, with those switched off (and a warning logged) that would change this model.

    TransformerLens' own exceptions: shortformer positions, post-norm architectures, a logit
    soft-cap, no norm at all. And those it misses: a LayerNorm before a gated or mixture MLP (the
    gate has no bias to take the norm's), attention sinks (pattern rows sum to less than one, so a
    value bias is no constant).

    Raises: ConfigError for refactor_factored_attn_matrices where there is no one QK matrix.
    """
    reasons: dict[str, str] = {}
    if cfg.normalization_type is None:
        reasons["fold_ln"] = "the model has no norms"
    elif "LN" in cfg.normalization_type and cfg.num_experts:
        reasons |= dict.fromkeys(
            ("fold_ln", "center_writing_weights"), "its experts have no biases for a LayerNorm"
        )
    elif "LN" in cfg.normalization_type and cfg.gated_mlp:
        reasons["fold_ln"] = "its gate has no bias that could take the LayerNorm's"
    if cfg.norm_after_sublayer:
        reasons |= dict.fromkeys(
            ("fold_ln", "center_writing_weights"), "its norms stand behind the sublayers"
        )
    if cfg.positional_embedding_type == "shortformer":
        reasons |= dict.fromkeys(
            ("fold_ln", "center_writing_weights", "center_unembed"),
            "shortformer adds positions inside attention",
        )
    if cfg.output_logits_soft_cap > 0:
        reasons["center_unembed"] = "a logit soft-cap sees the constant that centring removes"
    if cfg.use_attention_sinks:
        reasons["fold_value_biases"] = "with attention sinks, pattern rows do not sum to one"
    if cfg.clip_qkv is not None:
        reasons["fold_value_biases"] = "values are clipped with their bias"
    if flags.get("refactor_factored_attn_matrices"):
        _check_refactor(cfg)
    for flag, reason in reasons.items():
        if flags.get(flag):
            logger.warning("%s=True is not possible for this model: %s. It is off.", flag, reason)
    return {flag: on and flag not in reasons for flag, on in flags.items()}


class _Group:
    """One group's tensors by name within the group; float32 or float64 once touched."""

    def __init__(self, name: str, tensors: dict[str, Tensor], may_write: bool = False):
        self.name = name
        self.tensors = tensors if may_write else dict(tensors)
        # Keys of tensors that nobody else holds.
        self.owned = set(tensors) if may_write else set()
        self.prefix = name + "." if name.startswith("blocks.") else ""
        self.stored_as: dict[str, torch.dtype] = {}

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        key = self.prefix + name
        tensor = self.tensors[key]
        self.stored_as.setdefault(key, tensor.dtype)
        if tensor.dtype not in (torch.float32, torch.float64):
            tensor = self.tensors[key] = tensor.float()
            self.owned.add(key)
        return tensor

    def writable(self, name: str) -> Tensor:
        """A tensor that may be changed in place: a copy of it the first time, if need be."""
        tensor, key = self[name], self.prefix + name
        if key not in self.owned:
            tensor = self.tensors[key] = tensor.clone()
            self.owned.add(key)
        return tensor

    def put(self, name: str, value: Tensor, like: str) -> None:
        """Replace a tensor, or add one that is stored in the dtype of ``like``."""
        key = self.prefix + name
        self.stored_as.setdefault(key, self.stored_as[self.prefix + like])
        self.tensors[key] = value
        self.owned.add(key)

    def bias(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A bias, zero where the model has none."""
        if name in self:
            return self[name]
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def finish(self) -> dict[str, Tensor]:
        """All tensors, those that were touched back in the dtype they came in."""
        for key, dtype in self.stored_as.items():
            self.tensors[key] = self.tensors[key].to(dtype)
        return self.tensors


def _attention_readers(group: _Group) -> list[str]:
    """The weights of attention that read the residual stream."""
    if "attn.W_KVA" in group:
        # Latent attention: what stands behind the latents reads those.
        return ["attn.W_QA" if "attn.W_QA" in group else "attn.W_Q", "attn.W_KVA", "attn.W_KR"]
    return ["attn.W_Q", _kv(group, "W_K"), _kv(group, "W_V")]


def _kv(group: _Group, name: str) -> str:
    """``attn._W_K`` where keys and values are grouped, else ``attn.W_K``."""
    return f"attn._{name}" if f"attn._{name}" in group else f"attn.{name}"


def _read_past(
    group: _Group, norm: str, weight: str, bias: str | None, fold_bias: bool, centre: bool
) -> None:
    """Make a weight read what the norm gives before its gain and bias.

    ``centre`` removes the direction of ones from the input side, which the norm's output lacks.
    """
    if bias is not None and fold_bias and f"{norm}.b" in group:
        w = group[weight]
        shift = (w * group[f"{norm}.b"][:, None]).sum(-2)
        group.put(bias, group.bias(bias, tuple(shift.shape), w) + shift, like=weight)
    if f"{norm}.w" in group:
        group.writable(weight).mul_(group[f"{norm}.w"][:, None])
    if centre:
        w = group.writable(weight)
        w.sub_(w.mean(-2, keepdim=True))


def _make_identity(group: _Group, norm: str, fold_bias: bool) -> None:
    if f"{norm}.w" in group:
        group.put(f"{norm}.w", torch.ones_like(group[f"{norm}.w"]), like=f"{norm}.w")
    if fold_bias and f"{norm}.b" in group:
        group.put(f"{norm}.b", torch.zeros_like(group[f"{norm}.b"]), like=f"{norm}.b")


def _fold_norms(group: _Group, cfg: HookedTransformerConfig, fold_bias: bool, centre: bool) -> None:
    """Gain and bias of each norm into the weights that read its output."""
    if group.name == "unembed" and "ln_final.w" in group:
        # A final RMS norm does not subtract the mean, so its reader must keep it.
        _read_past(
            group, "ln_final", "unembed.W_U", "unembed.b_U", fold_bias, centre and not cfg.final_rms
        )
        _make_identity(group, "ln_final", fold_bias)
    if not group.name.startswith("blocks."):
        return
    for name in _attention_readers(group):
        _read_past(group, "ln1", name, name.replace("W_", "b_"), fold_bias, centre)
    if not cfg.attn_only:
        # A parallel block without ln2 feeds both sublayers from ln1.
        norm = "ln1" if cfg.parallel_attn_mlp and "ln2.w" not in group else "ln2"
        if cfg.num_experts and "mlp.W_gate.weight" in group:
            _fold_into_experts(group, cfg.num_experts, norm)
        else:
            _read_past(group, norm, "mlp.W_in", "mlp.b_in", fold_bias, centre)
            if cfg.gated_mlp:
                _read_past(group, norm, "mlp.W_gate", None, fold_bias, centre=False)
            if "mlp.ln.w" in group:
                _read_past(group, "mlp.ln", "mlp.W_out", "mlp.b_out", fold_bias, centre)
                _make_identity(group, "mlp.ln", fold_bias)
        _make_identity(group, "ln2", fold_bias)
    _make_identity(group, "ln1", fold_bias)


def _fold_into_experts(group: _Group, num_experts: int, norm: str) -> None:
    """The gain into the router and every expert; their weights are ``[out, in]``."""
    experts = [f"mlp.experts.{e}" for e in range(num_experts)]
    if "mlp.shared_expert.W_in.weight" in group:
        experts.append("mlp.shared_expert")
    routers = ["mlp.W_gate.weight", "mlp.W_shared_gate.weight"]
    readers = [f"{expert}.{weight}.weight" for expert in experts for weight in ("W_in", "W_gate")]
    for reader in [*(router for router in routers if router in group), *readers]:
        group.writable(reader).mul_(group[f"{norm}.w"])


def _centre_writers(group: _Group, cfg: HookedTransformerConfig) -> None:
    """Zero mean over d_model for all that is added to the residual stream."""
    writers = ["attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out"]
    if group.name == "embed":
        writers = ["embed.W_E"]
        if cfg.positional_embedding_type == "standard":
            writers.append("pos_embed.W_pos")
    elif group.name == "unembed":
        writers = []
    for writer in writers:
        if writer in group:
            _centre_rows(group, writer)


def _centre_rows(group: _Group, name: str) -> None:
    tensor = group.writable(name)
    tensor.sub_(tensor.mean(-1, keepdim=True))


def _centre_unembed(group: _Group, cfg: HookedTransformerConfig | None) -> None:
    """Zero mean over the vocabulary: shifts all logits of a position by one number."""
    if group.name == "unembed":
        if "unembed.W_U" in group:
            w = group.writable("unembed.W_U")
            parts = w.split(VOCABULARY_PART, dim=-1)
            w.sub_(vocabulary_mean(parts, w.shape[-1])[:, None])
        if "unembed.b_U" in group:
            _centre_rows(group, "unembed.b_U")


# Tokens whose numbers are summed at a time.
VOCABULARY_PART = 512


def vocabulary_mean(
    parts: Iterable[Float[Tensor, "d_model some"]], n: int
) -> Float[Tensor, " d_model"]:
    """Mean over ``n`` tokens, given some of them at a time; summed in float64."""
    total = dtype = None
    for part in parts:
        dtype = part.dtype
        here = part.double().sum(-1)
        total = here if total is None else total + here
    assert total is not None and dtype is not None
    return (total / n).to(dtype)


def _fold_value_biases(group: _Group, cfg: HookedTransformerConfig) -> None:
    """``b_O += sum over heads of b_V @ W_O``: pattern rows sum to one, so it is a constant."""
    name = _kv(group, "b_V")
    if name not in group:
        return
    b_v, w_o = group[name], group["attn.W_O"]
    b_v = b_v.repeat_interleave(w_o.shape[0] // b_v.shape[0], dim=0)
    shift = (b_v[:, :, None] * w_o).sum((0, 1))
    b_o = group.bias("attn.b_O", tuple(shift.shape), w_o)
    group.put("attn.b_O", b_o + shift, like="attn.W_O")
    group.put(name, torch.zeros_like(group[name]), like=name)


def _svd_of_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of ``a @ b`` for a tall ``a`` and a wide ``b``, without forming the product."""
    q_a, r_a = torch.linalg.qr(a)
    q_b, r_b = torch.linalg.qr(b.mT)
    u, s, vh = torch.linalg.svd(r_a @ r_b.mT)
    return q_a @ u, s, q_b @ vh.mT


def _refactor_attention(group: _Group, cfg: HookedTransformerConfig) -> None:
    """Even factors: QK split by the root of its singular values, W_O a rotation.

    Biases of Q and K join their weights as one more input row before the factorisation.
    """
    if not group.name.startswith("blocks."):
        return
    stacked = {}
    for name in ("Q", "K"):
        w = group[f"attn.W_{name}"]
        b = group.bias(f"attn.b_{name}", (w.shape[0], w.shape[2]), w)
        stacked[name] = torch.cat([w, b[:, None, :]], 1)
    u, s, v = _svd_of_product(stacked["Q"], stacked["K"].mT)
    for name, side in (("Q", u), ("K", v)):
        even = side * s.sqrt()[:, None, :]
        group.put(f"attn.W_{name}", even[:, :-1], like=f"attn.W_{name}")
        group.put(f"attn.b_{name}", even[:, -1], like=f"attn.W_{name}")
    _fold_value_biases(group, cfg)
    u, s, v = _svd_of_product(group["attn.W_V"], group["attn.W_O"])
    group.put("attn.W_V", u * s[:, None, :], like="attn.W_V")
    group.put("attn.W_O", v.mT, like="attn.W_O")


def _check_refactor(cfg: HookedTransformerConfig) -> None:
    if cfg.positional_embedding_type == "rotary" or cfg.n_key_value_heads is not None:
        raise ConfigError(
            "refactor_factored_attn_matrices=True was asked, but this model has rotary positions "
            "or grouped key-value heads: W_Q and W_K meet only after a rotation or across heads, "
            "so there is no one QK matrix to factor. Leave the flag off."
        )
    if cfg.use_qk_norm or cfg.clip_qkv is not None or cfg.use_attention_sinks:
        raise ConfigError(
            "refactor_factored_attn_matrices=True was asked, but in this model QK-norms, clipping "
            "or attention sinks stand between W_Q and W_K, or W_V and W_O: another basis inside a "
            "head would be another function. Leave the flag off."
        )


@torch.no_grad()
def process_group(
    group_name: str,
    tensors: dict[str, Tensor],
    cfg: HookedTransformerConfig,
    *,
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    fold_value_biases: bool = True,
    refactor_factored_attn_matrices: bool = False,
    consume: bool = False,
) -> dict[str, Tensor]:
    """Process one group as TransformerLens processes the whole state dict.

    Args:
        group_name: "embed", "blocks.{l}" or "unembed".
        tensors: The group's tensors under their full names; biases that are missing are zero.
        fold_ln: Norm gains and biases into the weights that read them. For LayerNorm those weights
            lose their mean over d_model, which the norm's output lacks.
        center_writing_weights: Zero mean over d_model for what is added to the residual stream
            (models whose norms are all LayerNorm).
        center_unembed: Zero mean over the vocabulary; shifts logits, not log-probabilities.
        fold_value_biases: ``b_O += b_V @ W_O``, ``b_V = 0``.
        refactor_factored_attn_matrices: Singular factors for QK and OV (experimental in
            TransformerLens; not for rotary positions or grouped heads).
        consume: Change ``tensors`` and the tensors in it instead of copies, which saves the memory
            of a second group. Only for tensors that nobody else holds.

    Returns: the group, with norms at one and zero where they were folded. Flags that would change
    the model are not caught here; see `possible_flags`.

    Numerics: float64 stays float64; other dtypes are processed in float32 and cast back.
    """
    group = _Group(group_name, tensors, may_write=consume)
    if fold_ln:
        layer_norm = cfg.normalization_type in ("LN", "LNPre")
        _fold_norms(group, cfg, fold_bias=layer_norm, centre=layer_norm)
    centre = center_writing_weights and has_layer_norm(cfg)
    if centre:
        _centre_writers(group, cfg)
    if center_unembed:
        _centre_unembed(group, cfg)
    if fold_value_biases:
        _fold_value_biases(group, cfg)
        if centre and "attn.b_O" in group:
            _centre_rows(group, "attn.b_O")
    if refactor_factored_attn_matrices:
        _check_refactor(cfg)
        _refactor_attention(group, cfg)
    return group.finish()


def split_groups(state_dict: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The groups of a whole state dict, in the order of its keys."""
    groups: dict[str, dict[str, Any]] = {}
    for key, tensor in state_dict.items():
        groups.setdefault(group_of(key), {})[key] = tensor
    yield from groups.items()


def _in_order_of(state_dict: dict[str, Any], groups: Iterable[dict[str, Any]]) -> dict[str, Any]:
    done = {key: tensor for group in groups for key, tensor in group.items()}
    return {key: done[key] for key in [*state_dict, *(k for k in done if k not in state_dict)]}


def process_state_dict(
    state_dict: dict[str, Any], cfg: HookedTransformerConfig, **flags: bool
) -> dict[str, Any]:
    """`process_group` over a whole state dict, flags checked by `possible_flags` first.

    The dict that came in is not changed; buffers such as ``attn.mask`` pass through.
    """
    flags = possible_flags(cfg, **flags)
    return _in_order_of(
        state_dict,
        (process_group(name, group, cfg, **flags) for name, group in split_groups(state_dict)),
    )


@torch.no_grad()
def _step(
    state_dict: dict[str, Any],
    step: Callable[..., None],
    cfg: HookedTransformerConfig | None,
    **options: bool,
) -> dict[str, Any]:
    groups = []
    for name, tensors in split_groups(state_dict):
        group = _Group(name, tensors)
        step(group, cfg, **options)
        groups.append(group.finish())
    return _in_order_of(state_dict, groups)


def fold_layer_norm(
    state_dict: dict[str, Any],
    cfg: HookedTransformerConfig,
    fold_biases: bool = True,
    center_weights: bool = True,
) -> dict[str, Any]:
    """Only the norms of a state dict; for RMS norms pass False twice."""
    return _step(state_dict, _fold_norms, cfg, fold_bias=fold_biases, centre=center_weights)


def center_writing_weights(
    state_dict: dict[str, Any], cfg: HookedTransformerConfig
) -> dict[str, Any]:
    """Only the centring of W_E, W_pos, W_O, b_O, W_out and b_out over d_model."""
    return _step(state_dict, _centre_writers, cfg)


def center_unembed(
    state_dict: dict[str, Any], cfg: HookedTransformerConfig | None = None
) -> dict[str, Any]:
    """Only the centring of W_U and b_U over the vocabulary."""
    return _step(state_dict, _centre_unembed, cfg)


def fold_value_biases(state_dict: dict[str, Any], cfg: HookedTransformerConfig) -> dict[str, Any]:
    """Only ``b_O += b_V @ W_O``."""
    return _step(state_dict, _fold_value_biases, cfg)


def refactor_factored_attn_matrices(
    state_dict: dict[str, Any], cfg: HookedTransformerConfig
) -> dict[str, Any]:
    """Only the singular factors of QK and OV."""
    _check_refactor(cfg)
    return _step(state_dict, _refactor_attention, cfg)
