"""``transformer_lens.tools.analysis.attribution_patching``: patching to first order (Nanda 2023).

Two forwards and one backward estimate what patching every head and MLP would do;
`fastlens.patching.sweep` does it exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from fastlens.errors import ShapeError

MetricFn = Callable[[Tensor], Tensor]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
NodeKind = Literal["embed", "attn_head_out", "mlp_out"]
Granularity = Literal["node", "edge"]


@dataclass
class GradientCache:
    """Activations of one run and the metric's gradient at them, by hook name.

    Attributes:
        gradients: None where none was asked for, or the metric does not depend on the activation.
        metric: The metric's value.
    """

    activations: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    metric: Tensor


@dataclass(frozen=True)
class Node:
    """What one component writes at one position: the embedding, a head, or an MLP.

    Raises: ValueError if ``layer`` and ``head`` do not go with the kind.
    """

    kind: NodeKind
    position: int
    layer: int | None = None
    head: int | None = None

    def __post_init__(self) -> None:
        needed = {"embed": (False, False), "attn_head_out": (True, True), "mlp_out": (True, False)}
        if self.kind not in needed:
            raise ValueError(f"unknown node kind {self.kind!r}; there are {', '.join(needed)}.")
        if needed[self.kind] != (self.layer is not None, self.head is not None):
            raise ValueError(
                f"a node of kind {self.kind} needs (layer, head) given as {needed[self.kind]}; "
                f"got layer={self.layer}, head={self.head}."
            )

    @property
    def hook_name(self) -> str:
        """Where it is read; of a head, its part of ``hook_z``."""
        if self.kind == "embed":
            return "hook_embed"
        place = "attn.hook_z" if self.kind == "attn_head_out" else "hook_mlp_out"
        return f"blocks.{self.layer}.{place}"


@dataclass(frozen=True)
class EdgeAttributionConfig:
    """Which attribution is made. As in TransformerLens 3.9, nodes in one step are all there is.

    Raises: NotImplementedError for edges or more steps; ValueError for fewer than one.
    """

    granularity: Granularity = "node"
    ig_steps: int = 1

    def __post_init__(self) -> None:
        if self.ig_steps < 1:
            raise ValueError(f"ig_steps={self.ig_steps} must be at least 1.")
        if self.granularity == "edge" or self.ig_steps > 1:
            raise NotImplementedError(
                f"granularity={self.granularity!r} with ig_steps={self.ig_steps}: only nodes in "
                f"one step are scored, as in TransformerLens 3.9. For edges see "
                f"fastlens.analysis.path_patching."
            )


@dataclass
class AttributionResult:
    """Scores by node: the first-order effect of patching it from corrupted to clean."""

    node_scores: dict[Node, float]
    edge_scores: dict[tuple[Node, Node], float] = field(default_factory=dict)

    def top_nodes(self, k: int = 10) -> list[tuple[Node, float]]:
        """The ``k`` nodes of largest absolute score."""
        ranked = sorted(self.node_scores.items(), key=lambda item: -abs(item[1]))
        return ranked[:k]

    def top_edges(self, k: int = 10) -> list[tuple[Node, Node, float]]:
        """Raises: NotImplementedError; edges are not scored in TransformerLens 3.9 either."""
        raise NotImplementedError("edges are not scored: use top_nodes().")


def enumerate_nodes(model: Any, cache: GradientCache) -> list[Node]:
    """All nodes: embeddings, then by layer and position the heads and the MLP.

    An attention-only model has no MLP nodes (TransformerLens refuses such models).

    Raises: ValueError if an activation that is needed is not cached.
    """
    names = _node_places(model)
    missing = [name for name in names if name not in cache.activations]
    if missing:
        raise ValueError(
            f"nodes are read at {', '.join(missing)}, which the cache does not hold: let them "
            f"through names_filter, or give none."
        )
    n_pos = cache.activations["hook_embed"].shape[1]
    nodes = [Node("embed", position) for position in range(n_pos)]
    for layer in range(model.cfg.n_layers):
        heads = range(cache.activations[f"blocks.{layer}.attn.hook_z"].shape[2])
        for position in range(n_pos):
            nodes += [Node("attn_head_out", position, layer, head) for head in heads]
            if f"blocks.{layer}.hook_mlp_out" in names:
                nodes.append(Node("mlp_out", position, layer))
    return nodes


def _node_places(model: Any) -> list[str]:
    places = ["hook_embed"]
    for layer in range(model.cfg.n_layers):
        places.append(f"blocks.{layer}.attn.hook_z")
        if not model.cfg.attn_only:
            places.append(f"blocks.{layer}.hook_mlp_out")
    return places


def cache_activation_and_gradient(
    model: Any,
    tokens: Int[Tensor, "*batch pos"],
    metric_fn: MetricFn,
    names_filter: NamesFilter = None,
    compute_gradient: bool = True,
) -> GradientCache:
    """Activations, and the gradient of a scalar metric of the logits at each of them.

    No parameter's ``.grad`` is touched, and parameters need not require gradients.

    Args:
        names_filter: A hook name, several, or a predicate; by default those that nodes are read at.
        compute_gradient: False makes one forward without gradients.

    Raises: ValueError if gradients are off, nothing matches the filter, or the metric is no scalar.
    """
    if compute_gradient and not torch.is_grad_enabled():
        raise ValueError("a gradient was asked for while gradients are off (torch.no_grad()).")
    wanted = _node_places(model) if names_filter is None else names_filter
    wanted = {wanted} if isinstance(wanted, str) else wanted
    matches: Any = wanted if callable(wanted) else set(wanted).__contains__
    names = [name for name in model.hook_dict if matches(name)]
    if not names:
        raise ValueError(f"names_filter={names_filter!r} matches no hook point of the model.")
    live: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> Tensor | None:
        is_leaf = compute_gradient and not activation.requires_grad
        live[hook.name] = activation.detach().requires_grad_() if is_leaf else activation
        return live[hook.name] if is_leaf else None

    with torch.set_grad_enabled(compute_gradient), model.hooks([(name, keep) for name in names]):
        metric = metric_fn(model(tokens))
    if metric.ndim != 0:
        raise ValueError(f"metric_fn must return a scalar tensor; got shape {list(metric.shape)}.")
    gradients: dict[str, Tensor | None] = dict.fromkeys(live)
    if compute_gradient and live:
        found = torch.autograd.grad(metric, list(live.values()), allow_unused=True)
        gradients = dict(zip(live, found, strict=True))
    activations = {name: activation.detach() for name, activation in live.items()}
    return GradientCache(activations, gradients, metric.detach())


def attribution_patch(
    model: Any,
    clean: Int[Tensor, "..."],
    corrupt: Int[Tensor, "..."],
    metric_fn: MetricFn,
    config: EdgeAttributionConfig = EdgeAttributionConfig(),
) -> AttributionResult:
    """Every node's effect on the metric to first order: ``(clean - corrupted) . gradient``, the
    gradient of the corrupted run; the mean over pairs.

    Args:
        metric_fn: Of the logits ``[1, pos, d_vocab]`` of one prompt; a scalar.
        config: There is only one; see `EdgeAttributionConfig`.

    Cost: for each pair two forwards and one backward.

    Raises: ShapeError (a ValueError) unless the prompts are pairs of equal length.
    """
    if clean.ndim != 2 or clean.shape != corrupt.shape:
        raise ShapeError(
            f"clean and corrupt must be tokens [batch, pos] of one shape; got {list(clean.shape)} "
            f"and {list(corrupt.shape)}."
        )
    if not len(clean):
        return AttributionResult({})
    totals: dict[str, Tensor] = {}
    cache: GradientCache | None = None
    for a, b in zip(clean.split(1), corrupt.split(1), strict=True):
        target = cache_activation_and_gradient(model, a, metric_fn, compute_gradient=False)
        cache = cache_activation_and_gradient(model, b, metric_fn)
        for name, gradient in cache.gradients.items():
            if gradient is None:
                raise ValueError(f"the metric does not depend on {name!r}: it has no gradient.")
            change = (target.activations[name] - cache.activations[name]) * gradient
            totals[name] = totals.get(name, 0.0) + change[0].sum(-1)
    assert cache is not None
    means = {name: (total / len(clean)).tolist() for name, total in totals.items()}
    scores: dict[Node, float] = {}
    for node in enumerate_nodes(model, cache):
        at = means[node.hook_name][node.position]
        scores[node] = at if node.head is None else at[node.head]
    return AttributionResult(scores)
