"""`ProcessWeights`: TransformerLens' weight processing as static methods over whole state dicts.

The arithmetic is `fastlens.weights.fold`'s, which works on one group of tensors at a time.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, WeightsError
from fastlens.weights import fold

StateDict = dict[str, Any]
Weight = Float[Tensor, "head d_model d_head"]
Bias = Float[Tensor, "head d_head"]
Norm = Float[Tensor, " d_model"]


def _no_adapter(adapter: Any) -> None:
    if adapter is not None:
        raise ConfigError(
            f"adapter={type(adapter).__name__} was given, but adapters translate names for "
            f"TransformerBridge, which fastlens has not. Leave it out: the state dict has "
            f"TransformerLens' names."
        )


def _need(state_dict: StateDict, key: str) -> None:
    if key not in state_dict:
        raise WeightsError(
            f"the state dict has no {key}. It has {', '.join(list(state_dict)[:5])}, ... "
            f"Give a whole state dict with TransformerLens' names."
        )


class ProcessWeights:
    """TransformerLens' processing steps. ``adapter`` must be None everywhere.

    Numerics: float64 stays float64 (TransformerLens rounds it to float32); other dtypes are
    processed in float32 and come back in the dtype they had.
    """

    # -- one tensor ----------------------------------------------------------------------------

    @staticmethod
    def fold_layer_norm_bias_single(w_tensor: Weight, b_tensor: Bias, ln_bias: Norm) -> Bias:
        """The bias that takes a norm's bias over: ``b + ln_bias @ W``."""
        return b_tensor + (w_tensor * ln_bias[None, :, None]).sum(-2)

    @staticmethod
    def fold_layer_norm_weight_single(w_tensor: Weight, ln_weight: Norm) -> Weight:
        """The weight that takes a norm's gain over."""
        return w_tensor * ln_weight[None, :, None]

    @staticmethod
    def center_weight_single(w_tensor: Weight) -> Weight:
        """A reading weight without its mean over d_model, which a LayerNorm's output lacks."""
        return w_tensor - w_tensor.mean(-2, keepdim=True)

    # -- queries, keys and values --------------------------------------------------------------

    @staticmethod
    def fold_layer_norm_biases(
        wq_tensor: Weight,
        wk_tensor: Float[Tensor, "kv_head d_model d_head"],
        wv_tensor: Float[Tensor, "kv_head d_model d_head"],
        bq_tensor: Bias | None,
        bk_tensor: Float[Tensor, "kv_head d_head"] | None,
        bv_tensor: Float[Tensor, "kv_head d_head"] | None,
        ln_bias: Norm,
    ) -> tuple[Bias, Float[Tensor, "kv_head d_head"], Float[Tensor, "kv_head d_head"]]:
        """The biases of queries, keys and values with a norm's bias in them; None is zero."""
        fold_one = ProcessWeights.fold_layer_norm_bias_single
        pairs = ((wq_tensor, bq_tensor), (wk_tensor, bk_tensor), (wv_tensor, bv_tensor))
        q, k, v = (
            fold_one(w, w.new_zeros(w.shape[0], w.shape[2]) if b is None else b, ln_bias)
            for w, b in pairs
        )
        return q, k, v

    @staticmethod
    def fold_layer_norm_weights(
        wq_tensor: Weight,
        wk_tensor: Float[Tensor, "kv_head d_model d_head"],
        wv_tensor: Float[Tensor, "kv_head d_model d_head"],
        ln_weight: Norm,
    ) -> tuple[
        Weight, Float[Tensor, "kv_head d_model d_head"], Float[Tensor, "kv_head d_model d_head"]
    ]:
        """The weights of queries, keys and values with a norm's gain in them."""
        fold_one = ProcessWeights.fold_layer_norm_weight_single
        q, k, v = (fold_one(w, ln_weight) for w in (wq_tensor, wk_tensor, wv_tensor))
        return q, k, v

    @staticmethod
    def center_attention_weights(
        wq_tensor: Weight,
        wk_tensor: Float[Tensor, "kv_head d_model d_head"],
        wv_tensor: Float[Tensor, "kv_head d_model d_head"],
    ) -> tuple[
        Weight, Float[Tensor, "kv_head d_model d_head"], Float[Tensor, "kv_head d_model d_head"]
    ]:
        """`center_weight_single` of queries, keys and values."""
        centre = ProcessWeights.center_weight_single
        return centre(wq_tensor), centre(wk_tensor), centre(wv_tensor)

    @staticmethod
    def extract_attention_tensors_for_folding(
        state_dict: StateDict, cfg: HookedTransformerConfig, layer: int, adapter: Any
    ) -> dict[str, Any]:
        """One layer's ``wq wk wv bq bk bv ln1_b ln1_w`` (None where absent), and their ``keys``."""
        _no_adapter(adapter)
        attn, keys, found = f"blocks.{layer}.attn.", {}, {}
        for kind in "Wb":
            for part in "QKV":
                key = f"{attn}{kind}_{part}"
                # Grouped key-value heads have an underscore in front.
                keys[f"{kind}_{part}"] = key if key in state_dict else f"{attn}_{kind}_{part}"
                found[f"{kind}{part}".lower()] = state_dict.get(keys[f"{kind}_{part}"])
        for name in ("b", "w"):
            keys[f"ln1_{name}"] = f"blocks.{layer}.ln1.{name}"
            found[f"ln1_{name}"] = state_dict.get(f"blocks.{layer}.ln1.{name}")
        return {**found, "keys": keys}

    # -- whole state dicts ---------------------------------------------------------------------

    @staticmethod
    def fold_layer_norm(
        state_dict: StateDict,
        cfg: HookedTransformerConfig,
        fold_biases: bool = True,
        center_weights: bool = True,
        adapter: Any = None,
    ) -> StateDict:
        """Gains and biases of norms in the weights that read them. For RMS norms say False twice.

        The dict that comes in is not changed. Norms behind the sublayers are read by no weights:
        they stay as they are.
        """
        _no_adapter(adapter)
        if cfg.norm_after_sublayer:
            return dict(state_dict)
        return fold.fold_layer_norm(state_dict, cfg, fold_biases, center_weights)

    @staticmethod
    def center_writing_weights(
        state_dict: StateDict, cfg: HookedTransformerConfig, adapter: Any = None
    ) -> StateDict:
        """Zero mean over d_model for all that is added to the residual stream.

        As in TransformerLens, the entries of the dict itself are replaced. Where norms stand behind
        the sublayers nothing is centred.
        """
        _no_adapter(adapter)
        _need(state_dict, "embed.W_E")
        if not cfg.norm_after_sublayer:
            state_dict.update(fold.center_writing_weights(state_dict, cfg))
        return state_dict

    @staticmethod
    def center_unembed(
        state_dict: StateDict, cfg: HookedTransformerConfig | None = None, adapter: Any = None
    ) -> StateDict:
        """Zero mean over the vocabulary: shifts logits, not log-probabilities."""
        _no_adapter(adapter)
        _need(state_dict, "unembed.W_U")
        return fold.center_unembed(state_dict, cfg)

    @staticmethod
    def fold_value_biases(
        state_dict: StateDict, cfg: HookedTransformerConfig, adapter: Any = None
    ) -> StateDict:
        """``b_O += b_V @ W_O``, ``b_V = 0``; not with attention sinks, where it varies."""
        _no_adapter(adapter)
        if cfg.use_attention_sinks:
            return dict(state_dict)
        return fold.fold_value_biases(state_dict, cfg)

    @staticmethod
    def refactor_factored_attn_matrices(
        state_dict: StateDict, cfg: HookedTransformerConfig, adapter: Any = None
    ) -> StateDict:
        """Singular factors for QK and OV; see `fastlens.weights.fold.process_group`."""
        _no_adapter(adapter)
        return fold.refactor_factored_attn_matrices(state_dict, cfg)

    @staticmethod
    def process_weights(
        state_dict: StateDict,
        cfg: HookedTransformerConfig,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
        adapter: Any = None,
    ) -> StateDict:
        """All steps in TransformerLens' order; a step that would change the model is left out.

        The dict that comes in is not changed. Which steps those are, and the warning that is
        logged: `fastlens.weights.fold.possible_flags`.
        """
        _no_adapter(adapter)
        return fold.process_state_dict(
            state_dict,
            cfg,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )

    # -- layouts -------------------------------------------------------------------------------

    @staticmethod
    def convert_tensor_to_tl_format(
        param_name: str,
        model_state_dict: StateDict,
        tensor: Tensor | None,
        cfg: HookedTransformerConfig | None,
        adapter: Any = None,
        layer_idx: int | None = None,
    ) -> Tensor | None:
        """The tensor itself: without an adapter it has TransformerLens' layout."""
        _no_adapter(adapter)
        return tensor

    @staticmethod
    def convert_tensor_to_hf_format(
        param_name: str,
        tensor: Tensor | None,
        cfg: HookedTransformerConfig | None,
        adapter: Any = None,
        layer_idx: int | None = None,
    ) -> Tensor | None:
        """The tensor itself: without an adapter there is no other layout."""
        _no_adapter(adapter)
        return tensor
