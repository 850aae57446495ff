"""What a run was made of: who wrote into the stream, and the norms at the scale they had."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlens.act_names import get_act_name
from fastlens.cache.activations import Activations
from fastlens.components.norms import norm_before, norm_behind
from fastlens.decompose import FrozenNorm, head_results, neuron_results
from fastlens.errors import ConfigError, LayerError, ShapeError
from fastlens.slices import Slice

_log = logging.getLogger(__name__)


class RunParts(Activations):
    """Activations that can name the heads, neurons, embeddings, biases and norms of their run."""

    def _up_to(self, layer: int | None) -> int:
        n_layers = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return n_layers
        if not 0 <= layer <= n_layers:
            raise LayerError(
                f"layer={layer} in a model of {n_layers} layers: give 0 to {n_layers}, where "
                f"{n_layers}, -1 and None are the stream entering the unembedding."
            )
        return layer

    def _attention_comes_first(self, layer: int, mlp_input: bool) -> bool:
        """Whether what is asked for has this layer's own attention in it."""
        cfg = self.model.cfg
        if mlp_input and (layer == cfg.n_layers or cfg.attn_only):
            raise LayerError(
                f"mlp_input=True asks for the input of the MLP of layer {layer}, but "
                + ("the model has no MLPs." if cfg.attn_only else f"the last is {layer - 1}.")
            )
        return mlp_input and not getattr(cfg, "parallel_attn_mlp", False)

    @property
    def _normalises_the_stream(self) -> bool:
        """Whether the stream itself passes the norms, so that it is no sum (BERT)."""
        places = getattr(self.model, "hook_dict", None) or {}
        return "blocks.0.hook_normalized_resid_post" in places

    def _resid_into(self, layer: int, preferred: str) -> Tensor:
        """The stream entering ``layer``: the same tensor has two names, and either will do."""
        names = [("resid_post", layer - 1)] if layer > 0 else []
        if layer < self.model.cfg.n_layers:
            names.append(("resid_pre", layer))
        if len(names) == 2 and self._normalises_the_stream:
            # Then they are two tensors.
            names = [name for name in names if name[0] == preferred]
        names.sort(key=lambda name: name[0] != preferred)
        return self[next((name for name in names if name in self), names[0])]

    def _embeds(self) -> list[tuple[str, Tensor]]:
        """The embeddings that enter the stream."""
        places = getattr(self.model, "hook_dict", None) or {}
        positions = getattr(self.model.cfg, "positional_embedding_type", "standard")
        found = []
        if self.has_embed or "hook_embed" in places:
            found.append(("embed", self["hook_embed"]))
        if "hook_full_embed" in places and not self._normalises_the_stream:
            # An encoder's, summed and normalised before they enter.
            found.append(("embed", self["hook_full_embed"]))
        fires = "hook_pos_embed" in places and positions == "standard"
        if (self.has_pos_embed or fires) and positions != "shortformer":
            found.append(("pos_embed", self["hook_pos_embed"]))
        return found

    def _norm_into(
        self, layer: int, mlp_input: bool, pos: Slice, batch: Slice | None = None
    ) -> FrozenNorm:
        """The norm before ``layer``, without gain and bias."""
        cfg = self.model.cfg
        if cfg.normalization_type is None:
            return FrozenNorm()
        is_final = layer == cfg.n_layers
        if not is_final and norm_before(cfg, "ln1") is None:
            # The sublayer reads the stream as it is.
            return FrozenNorm()
        norm = "ln_final" if is_final else f"blocks.{layer}.ln{2 if mlp_input else 1}"
        is_rms = cfg.normalization_type.startswith("RMS") or (
            is_final and getattr(cfg, "final_rms", False)
        )
        scale = self._scale(f"{norm}.hook_scale", pos)
        if batch is not None and self.has_batch_dim:
            scale = batch.apply(scale)
        return FrozenNorm(scale, centred=not is_rms)

    def _post_norm(self, layer: int, norm: str, pos: Slice) -> FrozenNorm:
        """The norm on what a sublayer writes, if the model has such norms (Gemma 2)."""
        behind = norm_behind(self.model.cfg, norm)
        if behind is None:
            return FrozenNorm()
        norm = behind
        module = getattr(self.model.blocks[layer], norm)
        scale = self._scale(f"blocks.{layer}.{norm}.hook_scale", pos)
        leaves = (getattr(module, name, None) for name in ("w", "b"))
        gain, bias = (None if leaf is None else leaf.to(scale.device) for leaf in leaves)
        centred = not self.model.cfg.normalization_type.startswith("RMS")
        return FrozenNorm(scale, centred=centred, gain=gain, bias=bias)

    def _scale(self, name: str, pos: Slice) -> Tensor:
        scale = self[name]
        if scale.ndim > 2 + self.has_batch_dim:
            # Under use_attn_in and use_split_qkv_input every head has a norm of its own.
            first = scale[..., :1, :]
            if not torch.allclose(scale, first.expand_as(scale)):
                raise ShapeError(
                    f"{name!r} differs between heads, whose inputs were edited in this run: there "
                    "is no one norm to apply. Use apply_ln=False."
                )
            scale = first.squeeze(-2)
        return pos.apply(scale, dim=-2)

    def _heads(
        self, layer: int, pos: Slice, read: Tensor | None = None, after_norm: bool = False
    ) -> Tensor:
        """One row a head, along the directions ``read`` if given (``[n, d_model]``)."""
        norm = self._post_norm(layer, "ln1", pos) if after_norm else FrozenNorm()
        name = get_act_name("result", layer)
        along = None if read is None else norm.pull_back(read).mT
        if name in self.cache_dict:
            rows = pos.apply(self[name], dim=-3).movedim(-2, 0)
            rows = rows if along is None else rows @ along
        else:
            z = pos.apply(self[("z", layer)], dim=-3)
            W_O = self.model.blocks[layer].attn.W_O.to(z.device)
            rows = head_results(z, W_O if along is None else W_O @ along)
        return norm.apply(rows) if read is None else norm.divide(rows)

    def _neurons(
        self,
        layer: int,
        pos: Slice,
        neurons: Slice,
        read: Tensor | None = None,
        after_norm: bool = False,
    ) -> Tensor:
        """One row a neuron, along the directions ``read`` if given (``[n, d_model]``)."""
        norm = self._post_norm(layer, "ln2", pos) if after_norm else FrozenNorm()
        W_out = self._W_out(layer)
        post = neurons.apply(pos.apply(self[("post", layer)], dim=-2), dim=-1)
        W_out = neurons.apply(W_out.to(post.device), dim=0)
        if read is not None:
            W_out = W_out @ norm.pull_back(read).mT
        rows = neuron_results(post, W_out)
        return norm.apply(rows) if read is None else norm.divide(rows)

    def _W_out(self, layer: int) -> Tensor:
        W_out = getattr(self.model.blocks[layer].mlp, "W_out", None)
        if W_out is None:
            raise ConfigError(
                f"the MLP of layer {layer} ({type(self.model.blocks[layer].mlp).__name__}) has no "
                "W_out, so it has no neurons to tell apart. Use expand_neurons=False."
            )
        return W_out

    def _biases(self, layer: int, with_own_attention: bool, with_mlps: bool, pos: Slice) -> Tensor:
        """Sum of the output biases before ``layer``, or before its MLP."""
        if norm_behind(self.model.cfg, "ln1") is None:
            return self.model.accumulated_bias(
                layer, mlp_input=with_own_attention, include_mlp_biases=with_mlps
            )
        attentions, mlps = layer + with_own_attention, layer if with_mlps else 0
        total: Tensor | None = None
        sublayers = [(i, "ln1", self.model.blocks[i].attn.b_O) for i in range(attentions)]
        # What a mixture of experts adds depends on the token, its biases too.
        mlp_biases = [getattr(self.model.blocks[i].mlp, "b_out", None) for i in range(mlps)]
        sublayers += [(i, "ln2", bias) for i, bias in enumerate(mlp_biases) if bias is not None]
        for i, name, bias in sublayers:
            norm = self._post_norm(i, name, pos)
            through = norm.apply(bias if norm.scale is None else bias.to(norm.scale.device))
            through = through if norm.bias is None else through + norm.bias
            total = through if total is None else total + through
        return self.model.accumulated_bias(0) if total is None else total

    def _rows(self, parts: Sequence[Tensor], pos: Slice, read: Tensor | None = None) -> Tensor:
        """The parts as one stack; without any, a stack of no rows."""
        if parts:
            return torch.cat(list(parts))
        known = "hook_embed" if self.has_embed else "blocks.0.hook_resid_pre"
        like = pos.apply(self[known], dim=-2)
        width = like.shape[-1] if read is None else read.shape[0]
        return like.new_zeros(0, *like.shape[:-1], width)

    def _head_labels(self, layers: int) -> list[str]:
        return [f"L{i}H{h}" for i in range(layers) for h in range(self.model.cfg.n_heads)]

    def _neuron_labels(self, layers: int, neurons: Slice) -> list[str]:
        # Dense layers beside mixtures of experts have another number of them.
        sizes = [self._W_out(i).shape[0] for i in range(layers)]
        return [f"L{i}N{n}" for i, size in enumerate(sizes) for n in neurons.indices(size)]

    def _warn_of_normalised_stream(self, method: str) -> None:
        if self._normalises_the_stream:
            _log.warning(
                "%s: this model normalises the residual stream after every sublayer. These rows "
                "are what was written; they do not sum to the stream.",
                method,
            )

    def _warn_of_post_norms(self, method: str) -> None:
        self._warn_of_normalised_stream(method)
        if norm_behind(self.model.cfg, "ln1") is not None:
            _log.warning(
                "%s: this model normalises what its sublayers write. These rows are before that "
                "norm, so they are not what entered the stream; get_full_resid_decomposition() is.",
                method,
            )
