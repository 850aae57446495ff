"""Mixtures of experts whose router knows groups of experts, and chooses by other numbers."""

from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.moe import MoE, See
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError


class GroupedRouterMoE(MoE):
    """A `MoE` with DeepSeek's router (2405.04434, 2412.19437).

    ``cfg.router_scores`` are "softmax" over all experts, or each expert's own "sigmoid", to which
    ``b_choice`` is added for the choice alone. With ``cfg.expert_groups``, experts are chosen from
    the best ``cfg.groups_per_token`` groups; a group counts as much as its best expert (softmax)
    or its best two (sigmoid). The chosen scores, made to sum to one if ``cfg.norm_topk_prob``,
    times ``cfg.expert_weight_scale`` are the weights.

    ``hook_expert_weights`` sees the scores of all experts, and edits of them change the choice.
    """

    def __init__(self, cfg: HookedTransformerConfig | dict[str, Any]):
        super().__init__(cfg)
        cfg, self.b_choice = self.cfg, None
        groups, chosen = cfg.expert_groups or 1, cfg.groups_per_token or 1
        fits = self.num_experts % groups == 0 and 0 < chosen <= groups
        if not fits or self.experts_per_token > chosen * (self.num_experts // groups):
            raise ConfigError(
                f"expert_groups={groups} and groups_per_token={chosen} were asked of "
                f"{self.num_experts} experts, of which a token takes {self.experts_per_token}. "
                f"Groups divide the experts evenly, and those of a token hold what it takes."
            )
        if cfg.router_scores == "sigmoid":
            self.b_choice = nn.Parameter(torch.zeros(self.num_experts, dtype=cfg.dtype))

    def routed(
        self,
        logits: Float[Tensor, "row expert"],
        see_weights: See | None = None,
        see_indices: See | None = None,
    ) -> tuple[Float[Tensor, "row choice"], Int[Tensor, "row choice"]]:
        """See `MoE.routed`."""
        scores = self._scores(logits)
        scores = scores if see_weights is None else see_weights(scores)
        indices = self._choosable(scores).topk(self.experts_per_token, -1).indices
        indices = indices if see_indices is None else see_indices(indices)
        weights = scores.gather(1, indices)
        if self.cfg.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.cfg.expert_weight_scale, indices

    def margins(self, logits: Float[Tensor, "row expert"]) -> Float[Tensor, " row"]:
        """See `MoE.margins`; here of scores, and of groups' scores where there are groups."""
        scores, k = self._scores(logits), self.experts_per_token
        best = self._choosable(scores).topk(min(k + 1, self.num_experts), -1).values
        nearest = best[:, k - 1] - best[:, k] if best.shape[1] > k else best[:, 0] + torch.inf
        chosen = self.cfg.groups_per_token or 1
        if chosen < (self.cfg.expert_groups or 1):
            of_groups = self._group_scores(self._biased(scores)).topk(chosen + 1, -1).values
            nearest = torch.minimum(nearest, of_groups[:, chosen - 1] - of_groups[:, chosen])
        return nearest

    def _scores(self, logits: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self.cfg.router_scores == "sigmoid":
            return logits.to(wide).sigmoid()
        return logits.softmax(-1, dtype=wide)

    def _biased(self, scores: Tensor) -> Tensor:
        return scores if self.b_choice is None else scores + self.b_choice

    def _group_scores(self, biased: Tensor) -> Tensor:
        groups = biased.unflatten(-1, (self.cfg.expert_groups or 1, -1))
        best = min(2, groups.shape[-1]) if self.b_choice is not None else 1
        return groups.topk(best, -1).values.sum(-1)

    def _choosable(self, scores: Tensor) -> Tensor:
        """What experts are chosen by: minus infinity outside the best groups."""
        biased, n_groups = self._biased(scores), self.cfg.expert_groups or 1
        if n_groups == 1:
            return biased
        kept = self._group_scores(biased).topk(self.cfg.groups_per_token or 1, -1).indices
        mask = torch.ones_like(biased[:, :n_groups], dtype=torch.bool).scatter(1, kept, False)
        mask = mask.repeat_interleave(self.num_experts // n_groups, -1)
        return biased.masked_fill(mask, -torch.inf)
