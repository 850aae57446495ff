"""The places a sweep can patch: hook names, axes, and which models have them. No torch here."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from fastlens.errors import SweepError, did_you_mean

POS = ("pos",)
PER_HEAD = ("pos", "head")
PER_PAIR = ("head", "query_pos", "key_pos")
PER_NEURON = ("pos", "neuron")
PER_FEATURE = ("pos", "feature")


@dataclass(frozen=True)
class Site:
    """One kind of activation, in every layer that has it.

    Attributes:
        name: What a user calls it.
        hook: Hook name, with ``{layer}``.
        axes: What its activation is indexed by after the batch axis; a last axis that is never
            indexed (d_model, d_head) is left out.
        default_by: The axes of a sweep over it if none are given.
        is_per_kv_head: Its head axis counts KV heads, fewer than query heads under grouping.
        stage: Where in its layer it comes: stages run in this order, sites of one stage side by
            side. See `STAGES`.
        reach: What a patch of it changes within the layer, before any later row: ``"stream"`` (the
            residual stream the layer reads), ``"query"``, ``"key"`` (keys or values), ``"both"``,
            or ``"row"`` (only the rows that are patched).
    """

    name: str
    hook: str
    axes: tuple[str, ...]
    default_by: tuple[str, ...]
    is_per_kv_head: bool = False
    stage: int = 0
    reach: str = "row"

    def hook_name(self, layer: int) -> str:
        """The hook point of one layer."""
        return self.hook.format(layer=layer)


# The stages of a layer in the order of its forward, each with its sites.
STAGES = (
    ("resid_pre",),
    ("attn_in", "q_input", "k_input", "v_input"),
    ("q", "k", "v"),
    ("rot_q", "rot_k"),
    ("attn_scores",),
    ("pattern",),
    ("z",),
    ("result",),
    ("attn_out",),
    ("resid_mid",),
    ("mlp_in",),
    ("mlp_pre",),
    ("mlp_pre_linear",),
    ("mlp_mid",),
    ("mlp_post",),
    ("mlp_out",),
    ("resid_post",),
)
# Sites that are patched entry by entry: a (row, head) is computed by itself, patched, and put back.
BY_ENTRY = frozenset(
    ("attn_in", "q_input", "k_input", "v_input", "attn_scores", "pattern", "result")
)
# Sites that an autoencoder can read: one vector at each position, the heads of z laid end to end.
CODED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
_REACH = {
    "resid_pre": "stream",
    "attn_in": "both",
    **dict.fromkeys(("q", "q_input", "rot_q"), "query"),
    **dict.fromkeys(("k", "v", "k_input", "v_input", "rot_k"), "key"),
}


def _table() -> dict[str, Site]:
    by_pos, by_head = ("layer", "pos"), ("layer", "head")
    rows = [
        ("resid_pre", "hook_resid_pre", POS, by_pos),
        ("resid_mid", "hook_resid_mid", POS, by_pos),
        ("resid_post", "hook_resid_post", POS, by_pos),
        ("attn_out", "hook_attn_out", POS, by_pos),
        ("mlp_out", "hook_mlp_out", POS, by_pos),
        ("mlp_in", "hook_mlp_in", POS, by_pos),
        ("attn_in", "hook_attn_in", PER_HEAD, by_head),
        ("q_input", "hook_q_input", PER_HEAD, by_head),
        ("k_input", "hook_k_input", PER_HEAD, by_head),
        ("v_input", "hook_v_input", PER_HEAD, by_head),
        ("q", "attn.hook_q", PER_HEAD, by_head),
        ("k", "attn.hook_k", PER_HEAD, by_head),
        ("v", "attn.hook_v", PER_HEAD, by_head),
        ("rot_q", "attn.hook_rot_q", PER_HEAD, by_head),
        ("rot_k", "attn.hook_rot_k", PER_HEAD, by_head),
        ("attn_scores", "attn.hook_attn_scores", PER_PAIR, by_head),
        ("pattern", "attn.hook_pattern", PER_PAIR, by_head),
        ("z", "attn.hook_z", PER_HEAD, by_head),
        ("result", "attn.hook_result", PER_HEAD, by_head),
        ("mlp_pre", "mlp.hook_pre", PER_NEURON, by_pos),
        ("mlp_pre_linear", "mlp.hook_pre_linear", PER_NEURON, by_pos),
        ("mlp_mid", "mlp.hook_mid", PER_NEURON, by_pos),
        ("mlp_post", "mlp.hook_post", PER_NEURON, by_pos),
    ]
    stage_of = {name: stage for stage, names in enumerate(STAGES) for name in names}
    return {
        name: Site(
            name,
            f"blocks.{{layer}}.{hook}",
            axes,
            default_by,
            is_per_kv_head=name in ("k_input", "v_input", "k", "v", "rot_k"),
            stage=stage_of[name],
            reach=_REACH.get(name, "row"),
        )
        for name, hook, axes, default_by in rows
    }


SITES = _table()
# Sites that change keys or values of the rows they patch, and so every row that sees those.
CHANGING_KEYS = tuple(name for name, site in SITES.items() if site.reach in ("key", "both"))
ALIASES = {
    "pre": "mlp_pre",
    "pre_linear": "mlp_pre_linear",
    "mid": "mlp_mid",
    "post": "mlp_post",
    "query": "q",
    "key": "k",
    "value": "v",
    "attn": "pattern",
    "attn_pattern": "pattern",
    "attn_logits": "attn_scores",
}


def missing_because(
    site: Site, cfg: Any, hook_names: Collection[str], layers: Sequence[int]
) -> str | None:
    """Why the model has no such site, or None if it has it in all ``layers``."""
    # Some of these hook points are made in every model, but passed only where there is an MLP.
    if cfg.attn_only and site.name.startswith("mlp_"):
        return "the model has attention only, no MLP"
    if site.name == "attn_in" and cfg.n_key_value_heads is not None:
        return "attn_in does not go with grouped KV heads"
    absent = [layer for layer in layers if site.hook_name(layer) not in hook_names]
    if not absent:
        return None
    if site.name == "resid_mid" and cfg.parallel_attn_mlp:
        return "attention and MLP are parallel, so there is no stream between them"
    if getattr(cfg, "num_experts", None) and site.axes == PER_NEURON:
        return "its MLPs are mixtures of experts, each of which sees other tokens"
    if site.name == "resid_mid" and cfg.attn_only:
        return "the model has attention only, no MLP"
    return f"there is no hook point {site.hook_name(absent[0])!r}"


def available_sites(cfg: Any, hook_names: Collection[str]) -> list[str]:
    """Names of the sites that every layer of the model has."""
    layers = range(cfg.n_layers)
    return [s.name for s in SITES.values() if missing_because(s, cfg, hook_names, layers) is None]


def site_list(cfg: Any, hook_names: Collection[str]) -> str:
    """`available_sites` for an error's sentence."""
    return (
        ", ".join(available_sites(cfg, hook_names)) or "no sites: it has no hook points in blocks"
    )


def find_site(name: str, cfg: Any, hook_names: Collection[str], layers: Sequence[int]) -> Site:
    """The site of that name (``post`` is ``mlp_post``; ``hook_`` in front is allowed).

    Raises: SweepError for an unknown name, with near ones, or one this model lacks, with why.
    """
    plain = name.removeprefix("hook_")
    site = SITES.get(ALIASES.get(plain, plain))
    if site is None:
        raise SweepError(
            f"no site {name!r}.{did_you_mean(plain, [*SITES, *ALIASES])} "
            f"This model has {site_list(cfg, hook_names)}."
        )
    reason = missing_because(site, cfg, hook_names, layers)
    if reason is not None:
        raise SweepError(
            f"this model has no {site.name}: {reason}. It has {site_list(cfg, hook_names)}."
        )
    return site


def sweep_axes(site: Site, by: Sequence[str] | None) -> tuple[str, ...]:
    """``by`` checked against the site, or the site's default.

    Raises: SweepError if ``by`` has an axis that the site lacks, one twice, or no ``layer``.
    """
    if by is None:
        return site.default_by
    by = (by,) if isinstance(by, str) else tuple(by)
    legal = ("layer", *site.axes)
    for axis in by:
        if axis not in legal:
            raise SweepError(
                f"{site.name} cannot be swept by {axis!r}: it is indexed by {', '.join(legal)}."
                f"{did_you_mean(axis, legal)}"
            )
    if len(set(by)) != len(by) or "layer" not in by:
        raise SweepError(
            f"by={by} must name 'layer' and then any of {', '.join(site.axes)}, each once."
        )
    return by


def n_heads(site: Site, cfg: Any) -> int:
    """Length of the site's head axis: KV heads for k and v under grouped attention."""
    if site.is_per_kv_head and not cfg.ungroup_grouped_query_attention:
        return cfg.n_key_value_heads or cfg.n_heads
    return cfg.n_heads


def n_neurons(cfg: Any) -> int:
    """Neurons of a layer that has such sites: beside mixtures of experts, of a dense one."""
    dense = getattr(cfg, "d_mlp_dense", None) if getattr(cfg, "num_experts", None) else None
    return dense or cfg.d_mlp or 0
