"""All weights as properties: single matrices as they are, per-layer ones stacked afresh."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.factored_matrix import FactoredMatrix


class StackedWeights:
    """Weights of any model with `embed`, `unembed` and layers of attention and MLP.

    Stacked properties are copies: edit the layers' leaves. Grouped attention shows keys and values
    repeated for every query head. Layers over several devices are stacked on ``cfg.device``.
    """

    cfg: HookedTransformerConfig

    def _layers(self) -> Iterable[Any]:
        """The layers that are stacked, in order."""
        return self.blocks  # type: ignore[attr-defined]

    def _stacked(self, part: str, name: str) -> Tensor:
        if part == "mlp" and self.cfg.attn_only:
            raise ConfigError(f"{name} was asked for, but this model is attn_only: it has no MLPs.")
        if part == "mlp" and self.cfg.num_experts:
            raise ConfigError(
                f"{name} was asked for, but this model has mixtures of experts: there is not one "
                f"{name} a layer. Read model.blocks[layer].mlp.experts[expert]."
            )
        try:
            found = [getattr(getattr(layer, part), name) for layer in self._layers()]
        except AttributeError as error:
            if self.cfg.d_kv_latent is None:
                raise
            # Said by a layer; a property's AttributeError would be lost.
            raise ConfigError(str(error)) from None
        return torch.stack([self._gathered(weight) for weight in found])

    def _gathered(self, weight: Tensor) -> Tensor:
        """On ``cfg.device``, where layers lie on several devices."""
        spread = getattr(self, "placement", None) is not None
        return weight.to(self.cfg.device) if spread else weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab_out"]:
        """Unembedding: final residual stream to logits. The parameter itself."""
        return self.unembed.W_U  # type: ignore[attr-defined]

    @property
    def b_U(self) -> Float[Tensor, " d_vocab_out"]:
        """Bias of the logits. The parameter itself."""
        return self.unembed.b_U  # type: ignore[attr-defined]

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding. The parameter itself."""
        return self.embed.W_E  # type: ignore[attr-defined]

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights of all layers."""
        return self._stacked("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Key weights of all layers."""
        return self._stacked("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Value weights of all layers."""
        return self._stacked("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Attention output weights of all layers."""
        return self._stacked("attn", "W_O")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """MLP input weights of all layers."""
        return self._stacked("mlp", "W_in")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """MLP gate weights of all layers; None if the MLPs are not gated."""
        return self._stacked("mlp", "W_gate") if self.cfg.gated_mlp else None

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """MLP output weights of all layers."""
        return self._stacked("mlp", "W_out")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases of all layers."""
        return self._stacked("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer head d_head"]:
        """Key biases of all layers."""
        return self._stacked("attn", "b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        """Value biases of all layers."""
        return self._stacked("attn", "b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Attention output biases of all layers."""
        return self._stacked("attn", "b_O")

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        """MLP input biases of all layers."""
        return self._stacked("mlp", "b_in")

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        """MLP output biases of all layers."""
        return self._stacked("mlp", "b_out")

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` of every head: [layer, head, d_model, d_model], factored.

        Without what stands between the two: QK-norms, clipping, rotary positions.
        """
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` of every head: [layer, head, d_model, d_model], factored.

        A norm behind attention, if there is one (OLMo-2, Gemma-2), comes after that.
        """
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def n_params_total(self) -> int:
        """All parameters, embeddings, biases and norms included (``cfg.n_params`` counts fewer)."""
        return sum(p.numel() for p in self.parameters())  # type: ignore[attr-defined]


class WeightsMixin(StackedWeights):
    """Weight access of `HookedTransformer`: what only a model with ``blocks`` has."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name in ("pos_embed", "W_pos", "W_E_pos"):
                raise AttributeError(
                    f"{name}: this model has {self.cfg.positional_embedding_type} positions, which "
                    f"are not learned, so it has no position embedding."
                ) from None
            raise

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """Position embedding; only models with learned positions have one. The parameter itself."""
        return self.pos_embed.W_pos  # type: ignore[attr-defined]

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_plus_n_ctx d_model"]:
        """W_E above W_pos: an overcomplete basis of what enters the first block."""
        return torch.cat([self.W_E, self._gathered(self.W_pos)])

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the output biases of all layers before ``layer``, before a norm behind a sublayer.

        Args:
            layer: 0 (no layers) to n_layers (all of them).
            mlp_input: Also count ``b_O`` of ``layer`` itself, up to the input of its MLP.
            include_mlp_biases: False counts attention's ``b_O`` only.
        """
        n_layers = self.cfg.n_layers
        if not 0 <= layer <= n_layers or (mlp_input and layer == n_layers):
            raise IndexError(f"layer={layer} is out of range for {n_layers} layers.")
        blocks = self.blocks  # type: ignore[attr-defined]
        like = self._gathered(blocks[0].attn.b_O.detach())
        total = torch.zeros_like(like)
        for block in blocks[:layer]:
            total = total + self._gathered(block.attn.b_O)
            if include_mlp_biases and not self.cfg.attn_only:
                # What a mixture of experts adds depends on the token, its biases too.
                b_out = getattr(block.mlp, "b_out", None)
                total = total if b_out is None else total + self._gathered(b_out)
        return total + self._gathered(blocks[layer].attn.b_O) if mlp_input else total

    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head layer head"]:
        """How much each head's output feeds each later head (Elhage et al. 2021).

        ``|W_OV[1] W_x[2]| / (|W_OV[1]| |W_x[2]|)`` in Frobenius norms, x the QK (mode Q), its
        transpose (K) or the OV circuit (V). Zero where the second head is not in a later layer.
        """
        rights = {"Q": lambda: self.QK, "K": lambda: self.QK.T, "V": lambda: self.OV}
        if mode not in rights:
            raise ValueError(f"mode={mode!r} must be 'Q', 'K' or 'V'.")
        left, right = self.OV, rights[mode]()
        # Same norms as the factored matrices, but d_head x d_head a pair of heads.
        sender, receiver = left.collapse_l(), right.collapse_r()
        product_norm = torch.stack(
            [(s[:, None, None] @ receiver).norm(dim=(-2, -1)) for s in sender]
        )
        scores = product_norm / left.norm()[:, :, None, None] / right.norm()[None, None]
        layers = torch.arange(self.cfg.n_layers, device=scores.device)
        later = layers[:, None, None, None] < layers[None, None, :, None]
        return torch.where(later, scores, torch.zeros_like(scores))

    def all_head_labels(self) -> list[str]:
        """``L0H0, L0H1, ...`` in layer order."""
        return [f"L{n}H{h}" for n in range(self.cfg.n_layers) for h in range(self.cfg.n_heads)]
