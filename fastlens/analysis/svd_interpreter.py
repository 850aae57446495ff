"""`SVDInterpreter`: what the singular vectors of a layer's matrices write to the vocabulary."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlens.components.norms import norm_before
from fastlens.errors import FastlensError, did_you_mean
from fastlens.factored_matrix import FactoredMatrix

OUTPUT_EMBEDDING = "unembed.W_U"
VECTOR_TYPES = ["OV", "w_in", "w_out"]


class SVDError(FastlensError, AssertionError, ValueError, IndexError):
    """Singular vectors that a model has not."""


class SVDInterpreter:
    """Singular vectors in the residual stream, read through the unembedding.

    >>> logits = SVDInterpreter(model).get_singular_vectors("OV", layer_index=22, head_index=10)
    >>> logits[:, 0, 0].topk(10)  # the tokens that the head's first direction promotes

    The method is Millidge & Black's "The Singular Value Decompositions of Transformer Weight
    Matrices are Highly Interpretable" (2022), with TransformerLens' names.

    Args:
        model: A hooked model with an unembedding. Its weights are read at each call.
    """

    def __init__(self, model: Any):
        self.model = model
        self.cfg = model.cfg

    @property
    def params(self) -> dict[str, Tensor]:
        """The model's parameters by name."""
        return dict(self.model.named_parameters())

    def get_singular_vectors(
        self,
        vector_type: str,
        layer_index: int,
        num_vectors: int = 10,
        head_index: int | None = None,
    ) -> Float[Tensor, "d_vocab 1 vector"]:
        """Logits of the first right singular vectors of a matrix, by falling singular value.

        Args:
            vector_type: ``"OV"``: what a head writes, of ``W_V @ W_O``. ``"w_in"``: what the MLP
                reads, of ``W_in`` transposed, times the gain of ``ln2`` where that is not folded.
                ``"w_out"``: what the MLP writes. What is written is taken before a norm behind the
                sublayer, if there is one (OLMo-2, Gemma-2).
            layer_index: Counted from 0.
            num_vectors: How many; no more than the matrix has singular values.
            head_index: Needed for ``"OV"``. Under grouped attention, a query head.

        Numerics: in float32 at least. The sign of a singular vector means nothing, and may differ
        between devices; where singular values are equal, so may the vectors.

        Raises: SVDError (an AssertionError, ValueError and IndexError).
        """
        if vector_type not in VECTOR_TYPES:
            raise SVDError(
                f"vector_type={vector_type!r} must be one of {VECTOR_TYPES}."
                f"{did_you_mean(str(vector_type), VECTOR_TYPES)}"
            )
        if not 0 <= layer_index < self.cfg.n_layers:
            raise SVDError(f"layer_index={layer_index} must be 0 to {self.cfg.n_layers - 1}.")
        block = self.model.blocks[layer_index]
        if vector_type == "OV":
            directions = self._of_head(block, head_index)
        else:
            directions = self._of_mlp(block, vector_type)
        if not 1 <= num_vectors <= len(directions):
            raise SVDError(
                f"num_vectors={num_vectors} must be 1 to {len(directions)}: the {vector_type} "
                f"matrix has {len(directions)} singular values."
            )
        W_U = self.model.unembed.W_U
        logits = directions[:num_vectors].to(W_U.device) @ _wide(W_U)
        return logits.T.unsqueeze(1)

    def _of_head(self, block: Any, head_index: int | None) -> Float[Tensor, "rank d_model"]:
        if head_index is None:
            raise SVDError("'OV' needs head_index; only 'w_in' and 'w_out' are of the whole layer.")
        if not 0 <= head_index < self.cfg.n_heads:
            raise SVDError(f"head_index={head_index} must be 0 to {self.cfg.n_heads - 1}.")
        W_V, W_O = block.attn.W_V[head_index], block.attn.W_O[head_index]
        return FactoredMatrix(_wide(W_V), _wide(W_O)).V.mT

    def _of_mlp(self, block: Any, vector_type: str) -> Float[Tensor, "rank d_model"]:
        mlp: Any = getattr(block, "mlp", None)
        if not hasattr(mlp, "W_in") or not hasattr(mlp, "W_out"):
            raise SVDError(
                f"{vector_type!r} is of an MLP with W_in and W_out; this model's blocks have none."
            )
        if vector_type == "w_out":
            matrix = _wide(mlp.W_out)
        else:
            matrix = _wide(mlp.W_in).mT
            norm = norm_before(self.cfg, "ln2")
            gain = None if norm is None else getattr(getattr(block, norm, None), "w", None)
            matrix = matrix if gain is None else matrix * gain
        return torch.linalg.svd(matrix, full_matrices=False).Vh


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
