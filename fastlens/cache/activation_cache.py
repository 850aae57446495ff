"""`ActivationCache`: the activations of one run, and what each component of the model added.

Finds tensors through `Activations` and `RunParts`; the arithmetic is in `fastlens.decompose`, how
activations get here in `fastlens.hooks`.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.act_names import get_act_name
from fastlens.cache.activations import AnySlice, as_slice
from fastlens.cache.one_device import sums_on_one_device
from fastlens.cache.run_parts import RunParts
from fastlens.decompose import FrozenNorm, remainder
from fastlens.errors import HookNameError, LayerError, ShapeError
from fastlens.slices import Slice
from fastlens.store.entries import open_entries

_log = logging.getLogger(__name__)

Stack: TypeAlias = Float[Tensor, "component *batch_pos d_out"]
MaybeLabelled: TypeAlias = Stack | tuple[Stack, list[str]]
Tokens: TypeAlias = str | int | Int[Tensor, "..."]

P = ParamSpec("P")
R = TypeVar("R")


def _says_who_asked(method: Callable[P, R]) -> Callable[P, R]:
    """A missing activation is reported with the method that needed it."""

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except HookNameError as error:
            raise HookNameError(f"{method.__name__}() needs more than is cached: {error}") from None

    return wrapper


class ActivationCache(RunParts):
    """The activations of one run, by hook name, with methods that take the run apart.

    >>> logits, cache = model.run_with_cache("The cat sat")
    >>> cache["blocks.0.attn.hook_pattern"] is cache["pattern", 0]
    True
    >>> stack, labels = cache.decompose_resid(return_labels=True)  # what wrote the final stream
    >>> cache.logit_attrs(stack, " on")  # and how much of the logit is whose

    **Keys.** ``cache["blocks.1.attn.hook_q"]``, ``cache["q1"]``, ``cache["q", 1]``,
    ``cache["scale", 1, "ln2"]`` (`get_act_name` has the rules); a negative layer counts from the
    end. What comes back is the stored tensor itself: editing it in place edits the cache.

    **Shapes.** Stacks are ``[component, *batch_pos, d_model]``: ``batch_pos`` is batch and
    position, less the batch if it was removed, less the position if ``pos_slice`` is an int.

    **Arguments** that mean the same everywhere:

    * ``layer``: the stream *entering* that layer, so everything before it. ``n_layers``, -1 and
      None mean the stream entering the unembedding.
    * ``mlp_input``: the stream entering the MLP of ``layer`` instead of its attention. In a model
      with parallel blocks these are the same stream.
    * ``pos_slice``: positions to keep; see `Slice`.
    * ``apply_ln``: divide by the scale that the norm before ``layer`` had in this run (and centre,
      for LayerNorm): a linear map, so the rows still sum to what that layer read.
    * ``return_labels``: also return a name for every row.

    **Several devices.** Each activation lies on its layer's device (or ``run_with_cache``'s
    ``device``). Methods that mix layers bring what they read to ``model.cfg.device``, unless all
    of it lies on one device.

    Names, order and values are TransformerLens'. Where its sums do not come out, these do: see
    `decompose_resid`, `stack_head_results` and `get_full_resid_decomposition`.

    Args:
        cache_dict: Activations by full hook name. Kept, not copied.
        model: The model of the run (`CachedModel`). It is kept alive; ``cache.model = None`` frees
            it, and the cache still works as a mapping.
        has_batch_dim: Whether activations have a batch axis.
    """

    @classmethod
    def open(
        cls, folder: str | Path, model: Any = None, shard: int | None = None
    ) -> "ActivationCache":
        """The cache that a run wrote with ``store=``, read from disk when asked.

        Nothing is held: each entry is mapped from its file at the first read, and what is not
        looked at is not read; ``cache[name][..., 3, :]`` touches those bytes. Files are checked
        as `fastlens.store.Store` says.

        Args:
            folder: Written by ``run_with_cache(store=...)``, or by `fastlens.store.capture_text`.
            model: The model of that run, for methods that read weights; reading needs none.
            shard: One shard, which is one batch, of a dataset.

        Raises: SourceError if this is no store, and at the read of an entry whose shard is torn or
            was changed, naming both; ShapeError for a dataset without ``shard``.
        """
        entries, key = open_entries(folder, shard)
        return cls(entries, model, has_batch_dim=bool(key.get("has_batch_dim", True)))

    @_says_who_asked
    @sums_on_one_device
    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: AnySlice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> MaybeLabelled:
        """The residual stream as it stood before each layer: the logit lens' input.

        Rows ``0_pre, 1_pre, ..., final_post``; multiplied by ``W_U`` they say what the model would
        answer if it stopped there (nostalgebraist 2020, "interpreting GPT: the logit lens").

        Args:
            layer, pos_slice, mlp_input, return_labels: See the class. ``mlp_input`` adds a row
                ``{layer}_mid``.
            incl_mid: Also the stream between attention and MLP, ``0_mid``, ... (models that have
                one: not attention-only, not parallel).
            apply_ln: For the unembedding each row goes through ``ln_final`` with statistics of its
                own, as if the model ended there; for an inner ``layer``, see the class.
        """
        upto, pos = self._up_to(layer), as_slice(pos_slice)
        parallel = getattr(self.model.cfg, "parallel_attn_mlp", False)
        streams, labels = [], []
        for i in range(upto + 1):
            if i == self.model.cfg.n_layers:
                streams.append(self[("resid_post", i - 1)])
                labels.append("final_post")
                break
            streams.append(self._resid_into(i, "resid_pre"))
            labels.append(f"{i}_pre")
            if (incl_mid and i < upto) or (mlp_input and i == upto and not parallel):
                streams.append(self[("resid_mid", i)])
                labels.append(f"{i}_mid")
        stack = torch.stack([pos.apply(stream, dim=-2) for stream in streams])
        if apply_ln:
            stack = self.apply_ln_to_stack(
                stack,
                upto,
                mlp_input=mlp_input,
                pos_slice=pos,
                has_batch_dim=self.has_batch_dim,
                recompute_ln=upto == self.model.cfg.n_layers,
            )
        return (stack, labels) if return_labels else stack

    @_says_who_asked
    @sums_on_one_device
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: AnySlice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> MaybeLabelled:
        """What each layer wrote into the stream: ``embed, pos_embed, 0_attn_out, 0_mlp_out, ...``.

        With ``mode="all"`` the rows sum to the stream entering ``layer``. For that, and unlike
        TransformerLens, positions that never enter the stream (shortformer) get no row, and an
        embedding that was not cached is an error.

        Args:
            layer, mlp_input, apply_ln, pos_slice, return_labels: See the class.
            mode: ``"attn"`` or ``"mlp"`` leave the other kind of layer out.
            incl_embeds: False leaves the embeddings out.
        """
        upto, pos = self._up_to(layer), as_slice(pos_slice)
        self._warn_of_normalised_stream("decompose_resid")
        rows = self._embeds() if incl_embeds else []
        with_mlps = mode != "attn" and not self.model.cfg.attn_only
        for i in range(upto):
            if mode != "mlp":
                rows.append((f"{i}_attn_out", self[("attn_out", i)]))
            if with_mlps:
                rows.append((f"{i}_mlp_out", self[("mlp_out", i)]))
        if self._attention_comes_first(upto, mlp_input) and mode != "mlp":
            rows.append((f"{upto}_attn_out", self[("attn_out", upto)]))
        parts = [pos.apply(activation, dim=-2)[None] for _, activation in rows]
        norm = self._norm_into(upto, mlp_input, pos) if apply_ln else FrozenNorm()
        stack = norm.apply(self._rows(parts, pos))
        return (stack, [label for label, _ in rows]) if return_labels else stack

    @_says_who_asked
    @sums_on_one_device
    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "component *batch_pos d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: AnySlice = None,
        batch_slice: AnySlice = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "component *batch_pos_out d_model"]:
        """The stack through the norm before ``layer``, held at the scale it had in this run.

        Gain and bias are left out: process the model with ``fold_ln`` (the default of
        ``from_pretrained``), or the result is in other units than the layer's input.

        Args:
            residual_stack: Rows over the positions that ``pos_slice`` says, and the whole batch.
            layer, mlp_input: Which norm; see the class.
            pos_slice: Positions of the stack's rows; only the scale is sliced with it.
            batch_slice: Part of the batch to return.
            has_batch_dim: Whether the stack has a batch axis.
            recompute_ln: Pass each row through ``ln_final`` itself, with its own statistics (only
                for the unembedding; the hooks on ``ln_final`` see all rows at once).

        Cost: one more tensor of the stack's size, two for LayerNorm.
        """
        upto, pos, batch = self._up_to(layer), as_slice(pos_slice), as_slice(batch_slice)
        if has_batch_dim:
            residual_stack = batch.apply(residual_stack, dim=1)
        if self.model.cfg.normalization_type is None:
            return residual_stack
        if recompute_ln and upto == self.model.cfg.n_layers:
            rows = residual_stack
            rows = rows.flatten(0, -3) if rows.ndim > 3 else rows
            rows = rows.unsqueeze(1) if rows.ndim == 2 else rows
            ln_final = self.model.ln_final
            # Norms without a gain have no device.
            weight = getattr(ln_final, "w", rows)
            normed = ln_final(rows.to(weight.device)).to(rows.device)
            return normed.reshape(residual_stack.shape)
        return self._norm_into(upto, mlp_input, pos, batch).apply(residual_stack)

    @_says_who_asked
    @sums_on_one_device
    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *batch_pos d_model"],
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: AnySlice = None,
        batch_slice: AnySlice = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component ..."]:
        """Direct logit attribution: how much each row of the stack adds to a logit, in logits.

        The stack (not yet normalised) is read along the token's unembedding vector through
        ``ln_final``, held at this run's scale. Over a full decomposition the values sum to the
        logit less ``b_U`` (of a model with folded norms and no soft-cap).

        Args:
            tokens: One token (text, number) or a tensor of shape [batch, pos], or what broadcasts
                against that from the right.
            incorrect_tokens: Attribute ``logit(tokens) - logit(incorrect_tokens)`` instead.
            pos_slice, batch_slice, has_batch_dim: See `apply_ln_to_stack`.

        Cost: one pass over the stack, no copy of it.
        Raises: ShapeError if the tokens' shapes differ, or do not fit the stack.
        """
        directions = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            ours, theirs = _shape(tokens), _shape(incorrect_tokens)
            if ours != theirs:
                raise ShapeError(
                    f"tokens and incorrect_tokens must have the same shape; these are {ours} and "
                    f"{theirs}."
                )
            directions = directions - self.model.tokens_to_residual_directions(incorrect_tokens)
        pos, batch = as_slice(pos_slice), as_slice(batch_slice)
        if has_batch_dim:
            residual_stack = batch.apply(residual_stack, dim=1)
        norm = self._norm_into(self.model.cfg.n_layers, False, pos, batch)
        return norm.dot(residual_stack, directions.to(residual_stack.device))

    @_says_who_asked
    def compute_head_results(self) -> None:
        """Put ``hook_result``, what each head writes, into the cache for every layer.

        Only for reading ``cache["result", layer]``: other methods compute what they need. Entries
        that are there (the run was made under ``use_attn_result``) stay as they are.
        """
        names = [get_act_name("result", i) for i in range(self.model.cfg.n_layers)]
        if all(name in self.cache_dict for name in names):
            _log.warning("Tried to compute head results when they were already cached")
        for i, name in enumerate(names):
            if name not in self.cache_dict:
                self.cache_dict[name] = self._heads(i, Slice()).movedim(0, -2)

    @_says_who_asked
    @sums_on_one_device
    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: AnySlice = None,
        apply_ln: bool = False,
    ) -> MaybeLabelled:
        """What every head before ``layer`` wrote: rows ``L0H0, L0H1, ...``, by layer then head.

        Computed from ``z`` and ``W_O``, or taken from ``hook_result`` where that is cached; nothing
        is added to the cache. In a model that normalises attention's output (Gemma 2) the rows are
        before that norm, as in TransformerLens; `get_full_resid_decomposition` goes through it.

        Args:
            layer, return_labels, pos_slice, apply_ln: See the class.
            incl_remainder: A last row ``remainder``: the rest of the stream.
        """
        upto, pos = self._up_to(layer), as_slice(pos_slice)
        self._warn_of_post_norms("stack_head_results")
        parts = [self._heads(i, pos) for i in range(upto)]
        labels = self._head_labels(upto)
        norm = self._norm_into(upto, False, pos) if apply_ln else FrozenNorm()
        if incl_remainder:
            total = pos.apply(self._resid_into(upto, "resid_post"), dim=-2)
            parts.append(remainder(total, parts)[None])
            labels.append("remainder")
        stack = norm.apply(self._rows(parts, pos))
        return (stack, labels) if return_labels else stack

    @_says_who_asked
    @sums_on_one_device
    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """One activation of all layers before ``layer``, stacked.

        Args:
            activation_name, sublayer_type: As in `get_act_name`, such as ``"scale"``, ``"ln1"``.
        """
        upto = self._up_to(layer)
        if upto == 0:
            raise LayerError("layer=0 asks for the activations before the first layer: none.")
        return torch.stack([self[(activation_name, i, sublayer_type)] for i in range(upto)])

    @_says_who_asked
    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: AnySlice = None,
        pos_slice: AnySlice = None,
        project_output_onto: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "..."]:
        """What each neuron of one MLP wrote: ``[*batch_pos, neuron, d_model]``. Not cached.

        Args:
            layer: The MLP's own layer (negative counts from the end).
            neuron_slice: Neurons to keep; an int drops their axis.
            pos_slice: Positions to keep.
            project_output_onto: Read along these instead, ``[d_model]`` (the last axis goes) or
                ``[d_model, n]``; ``d_model`` is then never built.
        """
        pos, neurons = as_slice(pos_slice), as_slice(neuron_slice)
        W_out = self._W_out(layer)
        post = neurons.apply(pos.apply(self[("post", layer)], dim=-2), dim=-1)
        written = neurons.apply(W_out.to(post.device), dim=0)
        if project_output_onto is not None:
            written = written @ project_output_onto
            if project_output_onto.ndim == 1:
                return post * written
        return post.unsqueeze(-1) * written

    @_says_who_asked
    @sums_on_one_device
    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: AnySlice = None,
        neuron_slice: AnySlice = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "component ..."] | tuple[Float[Tensor, "component ..."], list[str]]:
        """What every neuron before ``layer`` wrote: rows ``L0N0, L0N1, ...``.

        Args:
            layer, pos_slice, return_labels, apply_ln: See the class.
            neuron_slice: Neurons of each layer to keep.
            incl_remainder: A last row ``remainder``: the rest of the stream.
            project_output_onto: Read every row along these instead, ``[d_model]`` (the last axis
                goes) or ``[d_model, n]``, after the norm if ``apply_ln``.

        Cost: ``d_mlp`` rows a layer, so large without ``project_output_onto``, which never builds
        ``d_model``.
        """
        upto, pos = self._up_to(layer), as_slice(pos_slice)
        neurons = Slice.unwrap(neuron_slice)
        self._warn_of_post_norms("stack_neuron_results")
        norm = self._norm_into(upto, False, pos) if apply_ln else FrozenNorm()
        read = (
            None if project_output_onto is None else norm.pull_back(_columns(project_output_onto))
        )
        parts = [self._neurons(i, pos, neurons, read) for i in range(upto)]
        labels = self._neuron_labels(upto, neurons)
        if incl_remainder:
            total = pos.apply(self._resid_into(upto, "resid_post"), dim=-2)
            parts.append(remainder(total if read is None else total @ read.mT, parts)[None])
            labels.append("remainder")
        stack = self._rows(parts, pos, read)
        stack = norm.apply(stack) if read is None else norm.divide(stack)
        if project_output_onto is not None and project_output_onto.ndim == 1:
            stack = stack.squeeze(-1)
        return (stack, labels) if return_labels else stack

    @_says_who_asked
    @sums_on_one_device
    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: AnySlice = None,
        return_labels: bool = False,
        project_output_onto: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "component ..."] | tuple[Float[Tensor, "component ..."], list[str]]:
        """The stream entering ``layer`` as a sum of heads, neurons, embeddings and biases.

        Rows: heads, then neurons (or MLPs), then ``embed``, ``pos_embed`` and ``bias`` (all output
        biases together). They always sum to the stream: in a model that normalises what sublayers
        write (Gemma 2), heads and neurons pass that norm at this run's scale.

        Args:
            layer, mlp_input, apply_ln, pos_slice, return_labels: See the class.
            expand_neurons: A row a neuron; False gives one a layer, ``0_mlp_out``, ... Mixtures of
                experts need False.
            project_output_onto: See `stack_neuron_results`.
        """
        upto, pos = self._up_to(layer), as_slice(pos_slice)
        own_attention = self._attention_comes_first(upto, mlp_input)
        attentions = upto + own_attention
        norm = self._norm_into(upto, mlp_input, pos) if apply_ln else FrozenNorm()
        read = (
            None if project_output_onto is None else norm.pull_back(_columns(project_output_onto))
        )

        parts = [self._heads(i, pos, read, after_norm=True) for i in range(attentions)]
        labels = self._head_labels(attentions)
        rest: list[tuple[str, Tensor]] = []
        has_mlps = not self.model.cfg.attn_only
        if has_mlps and expand_neurons:
            every = Slice()
            parts += [self._neurons(i, pos, every, read, after_norm=True) for i in range(upto)]
            labels += self._neuron_labels(upto, every)
        elif has_mlps:
            rest = [(f"{i}_mlp_out", self[("mlp_out", i)]) for i in range(upto)]
        rest += self._embeds()
        written = [pos.apply(activation, dim=-2) for _, activation in rest]
        biases = self._biases(upto, own_attention, expand_neurons and has_mlps, pos)
        written.append(biases.to((*parts, *written, biases)[0].device))
        labels += [*(label for label, _ in rest), "bias"]
        if read is not None:
            written = [activation @ read.mT for activation in written]
        places = torch.broadcast_shapes(*(x.shape[1:] for x in parts), *(x.shape for x in written))
        stack = torch.cat([*parts, *(activation.expand(1, *places) for activation in written)])
        stack = norm.apply(stack) if read is None else norm.divide(stack)
        if project_output_onto is not None and project_output_onto.ndim == 1:
            stack = stack.squeeze(-1)
        return (stack, labels) if return_labels else stack


def _columns(directions: Tensor) -> Tensor:
    """``[d_model]`` or ``[d_model, n]`` as rows ``[n, d_model]``."""
    return directions.unsqueeze(0) if directions.ndim == 1 else directions.mT


def _shape(tokens: Tokens) -> tuple[int, ...]:
    return tuple(tokens.shape) if isinstance(tokens, Tensor) else ()
