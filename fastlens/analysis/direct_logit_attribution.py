"""`direct_logit_attribution`: how much of a logit each component, head or neuron wrote itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from jaxtyping import Float
from torch import Tensor

from fastlens.components.norms import norm_behind
from fastlens.decompose import FrozenNorm
from fastlens.errors import ConfigError, FastlensError, did_you_mean
from fastlens.patching.metrics import Answer, Metric, Position, answer_logit, logit_diff
from fastlens.patching.model import PatchableModel, check_patchable
from fastlens.patching.prompts import Prompt, prompt_record, prompts_of
from fastlens.patching.result import TOLERANCE
from fastlens.scores import Scores

UNITS = ("component", "head", "neuron")


def direct_logit_attribution(
    model: PatchableModel,
    prompts: Prompt,
    answer: Answer,
    wrong: Answer | None = None,
    *,
    by: str = "component",
    position: Position = -1,
    rest: bool = True,
    attention_mask: Any = None,
) -> Scores:
    """The logit of ``answer``, or ``logit[answer] - logit[wrong]``, as a sum over who wrote it.

    The residual stream is a sum, the unembedding is linear, and so is the final norm once held at
    the scale it had in this run; so every component has its own share of the logit (Elhage et al.
    2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2211.00593). The share is
    what it writes itself: what later components make of it is theirs.

    >>> direct_logit_attribution(model, "The Eiffel Tower is in", " Paris", " Rome").plot()
    >>> direct_logit_attribution(model, prompts, names, others, by="head", rest=False).plot()

    Args:
        prompts: Text, a list of texts, or tokens ``[batch, pos]``; texts of different lengths are
            padded on the left.
        answer, wrong: A token id or a string of one token; or one for each prompt.
        by: ``"component"``: the embeddings and every attention and MLP layer. ``"head"``: every
            head, with MLP layers and embeddings. ``"neuron"``: every MLP neuron, with attention
            layers and embeddings.
        position: Where the logit is read, one or one for each prompt; negative counts from the end,
            padding included. What is there must not be padding.
        rest: False leaves out all that is no head (neuron) and gives axes ``("layer", "head")``
            (``("layer", "neuron")``), ready for a heatmap; ``meta["rest"]`` is the sum of the
            others.
        attention_mask: 0 for padding, for tokens given as ``[batch, pos]``.

    Returns: `Scores` with the axis ``"component"``: ``embed``, ``pos_embed``, ``L0 attn``,
    ``L0 MLP``, ..., or ``L0H0``, ... or ``L0N0``, ..., and last ``bias``: ``b_U``, the final norm's
    bias, and the output biases of layers that are taken apart. They sum to the logit itself
    (``meta["logit"]``), before the soft-cap in models that have one. If something else writes into
    the stream, such as a hook of yours, a last row ``other`` has its share.

    Cost: one forward. Only what is read at the position is kept, and everything is projected onto
    the logit before it is split up: nothing of the size ``[neuron, d_model]`` per prompt is made.

    Numerics: exact for any norm, folded or not, with or without norms behind sublayers (Gemma 2),
    but for rounding; 16-bit activations are widened to float32.

    Raises: TokenError, MetricError, SweepError as a sweep's metric; ConfigError for MLPs that have
        no neurons, or models without MLPs, by neuron.
    """
    if by not in UNITS:
        raise FastlensError(
            f"by={by!r} must be one of {', '.join(UNITS)}.{did_you_mean(str(by), UNITS)}"
        )
    if by == "component" and not rest:
        raise FastlensError("rest=False goes with by='head' and by='neuron'.")
    check_patchable(model)
    given = prompts_of(model, prompts, prompts, attention_mask)
    metric = answer_logit(answer) if wrong is None else logit_diff(answer, wrong)
    metric = Metric(metric.name, "logits", metric.formula, metric.answers, position)
    title = metric.label
    metric = metric.bind(model)
    read = metric.positions(given.batch, given.n_pos)
    given.check_not_padding(read)
    run = _Run(model, read)
    masked = {} if given.mask is None else {"attention_mask": given.mask}
    with torch.no_grad():
        logits = model.run_with_hooks(given.clean, fwd_hooks=run.hooks(by), **masked)
        before_cap = run.rows.pop("unembed.hook_out")
        capped = model.cfg.output_logits_soft_cap > 0
        # What the model answers: a module's own hooks come behind its places.
        logit = metric.of_rows(before_cap if capped else run.at_positions(logits))
        signs = (1.0, -1.0)[: len(metric.answers)]
        ids = [torch.as_tensor(one).expand(given.batch) for one in metric.answers]
        parts, labels, n_units = run.shares(by, ids, signs)
    found = torch.cat(parts, 1)  # [batch, component]
    other = logit.to(found) - found.sum(1)
    # The widest sum decides what is rounding.
    size = float(found.abs().sum(1).max())
    if float(other.abs().max()) > TOLERANCE[model.cfg.dtype] * max(1.0, size):
        found, labels = torch.cat([found, other[:, None]], 1), [*labels, "other"]
    found = found.cpu()
    meta = {
        "model": model.cfg.model_name,
        "by": by,
        "prompts": prompt_record(prompts),
        "answers": [one.tolist() for one in ids],
        "logit": float(logit.double().mean()),
    }
    axes: tuple[str, ...] = ("component",)
    names = {"component": labels}
    if not rest:
        meta["rest"] = float(found[:, n_units:].double().sum(1).mean())
        layers = model.cfg.n_layers
        found = found[:, :n_units].unflatten(1, (layers, -1))
        axes = ("layer", by)
        names = {
            "layer": [f"L{layer}" for layer in range(layers)],
            by: [f"{by[0].upper()}{unit}" for unit in range(found.shape[2])],
        }
    return Scores(
        values=found.mean(0),
        axes=axes,
        labels=names,
        unit="logits before the soft-cap" if capped else "logits",
        title=f"direct attribution of the {title}, by {by}",
        per_example=found,
        meta=meta,
    )


class _Run:
    """One run at one position of each prompt: what was written there, and the norms' scales.

    Args:
        positions: One for each prompt.
    """

    def __init__(self, model: Any, positions: Sequence[int]):
        self.model = model
        self.positions = torch.tensor(positions)
        self.rows: dict[str, Tensor] = {}

    def hooks(self, by: str) -> list[tuple[str, Callable[[Tensor, Any], None]]]:
        """The hooks that keep what `shares` needs."""
        cfg = self.model.cfg
        if by == "neuron" and cfg.attn_only:
            raise ConfigError("by='neuron': this model is attn_only, so it has no MLPs.")
        if by == "neuron" and cfg.num_experts:
            raise ConfigError(
                "by='neuron': this model has mixtures of experts, and no neurons that all tokens "
                "pass. Use by='component' or by='head'."
            )
        names = ["hook_embed", "unembed.hook_out"]
        if cfg.positional_embedding_type == "standard":
            names.append("hook_pos_embed")
        if cfg.normalization_type is not None:
            names.append("ln_final.hook_scale")
        behind = norm_behind(cfg, "ln1" if by == "head" else "ln2")
        for layer in range(cfg.n_layers):
            start = f"blocks.{layer}."
            names.append(start + ("attn.hook_z" if by == "head" else "hook_attn_out"))
            if not cfg.attn_only:
                names.append(start + ("mlp.hook_post" if by == "neuron" else "hook_mlp_out"))
            if behind is not None and by != "component":
                names.append(f"{start}{behind}.hook_scale")
        return [(name, self._keep) for name in names]

    def _keep(self, activation: Tensor, hook: Any) -> None:
        self.rows[hook.name] = self.at_positions(activation)

    def at_positions(self, activation: Float[Tensor, "batch pos *rest"]) -> Tensor:
        """What an activation is at each prompt's position, in float32 at least."""
        at = self.positions.to(activation.device)
        return self._wide(activation.detach()[torch.arange(len(at), device=at.device), at])

    def shares(
        self, by: str, ids: Sequence[Tensor], signs: Sequence[float]
    ) -> tuple[list[Float[Tensor, "batch part"]], list[str], int]:
        """Shares of the logit, their labels, and how many of them are heads or neurons."""
        cfg, unembed = self.model.cfg, self.model.unembed
        norm = self._norm("ln_final", getattr(self.model, "ln_final", None), cfg.final_rms)
        direction: Any = 0.0
        bias: Any = 0.0
        for one, sign in zip(ids, signs, strict=True):
            one = one.to(unembed.W_U.device)
            direction = direction + sign * self._wide(unembed.W_U.detach()[:, one].T)
            bias = bias + sign * self._wide(unembed.b_U.detach()[one])
        if norm.bias is not None:
            bias = bias + direction @ norm.bias
        # Along this, what is in the stream counts as it does in the logit.
        read = norm.divide(norm.pull_back(direction))  # [batch, d_model]
        units: list[Tensor] = []
        labels: list[str] = []
        rest: list[Tensor] = []
        others: list[str] = []

        def whole(name: str, label: str) -> None:
            rest.append((self.rows[name] * read).sum(-1, keepdim=True))
            others.append(label)

        whole("hook_embed", "embed")
        if "hook_pos_embed" in self.rows:
            whole("hook_pos_embed", "pos_embed")
        for layer, block in enumerate(self.model.blocks):
            if by == "head":
                share, own_bias = self._heads(layer, block, read)
                units.append(share)
                labels += [f"L{layer}H{head}" for head in range(share.shape[1])]
                bias = bias + own_bias
            else:
                whole(f"blocks.{layer}.hook_attn_out", f"L{layer} attn")
            if by == "neuron":
                share, own_bias = self._neurons(layer, block, read)
                units.append(share)
                labels += [f"L{layer}N{neuron}" for neuron in range(share.shape[1])]
                bias = bias + own_bias
            elif not cfg.attn_only:
                whole(f"blocks.{layer}.hook_mlp_out", f"L{layer} MLP")
        parts = [*units, *rest, bias[:, None].to(read)]
        return parts, [*labels, *others, "bias"], len(labels)

    def _heads(self, layer: int, block: Any, read: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the heads ``[batch, head]`` and of the output bias ``[batch]``."""
        along, bias = self._behind(layer, block, "ln1", read)
        attn = block.attn
        w_o = self._wide(attn.W_O.detach())
        onto = (along @ w_o.reshape(-1, w_o.shape[2]).T).unflatten(1, w_o.shape[:2])
        share = (self.rows[f"blocks.{layer}.attn.hook_z"] * onto).sum(-1)
        return share, bias + along @ self._wide(attn.b_O.detach())

    def _neurons(self, layer: int, block: Any, read: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the neurons ``[batch, neuron]`` and of the output bias ``[batch]``."""
        w_out = getattr(block.mlp, "W_out", None)
        if w_out is None:
            raise ConfigError(
                f"by='neuron': the MLP of layer {layer} ({type(block.mlp).__name__}) has no W_out, "
                f"so it has no neurons to tell apart."
            )
        along, bias = self._behind(layer, block, "ln2", read)
        share = self.rows[f"blocks.{layer}.mlp.hook_post"] * (along @ self._wide(w_out.detach()).T)
        return share, bias + along @ self._wide(block.mlp.b_out.detach())

    def _behind(self, layer: int, block: Any, name: str, read: Tensor) -> tuple[Tensor, Tensor]:
        """The direction as seen before the norm on what the sublayer writes, and the share of that
        norm's bias."""
        behind = norm_behind(self.model.cfg, name)
        if behind is None:
            return read, read.new_zeros(len(read))
        name = behind
        norm = self._norm(f"blocks.{layer}.{name}", getattr(block, name))
        bias = read.new_zeros(len(read)) if norm.bias is None else read @ norm.bias
        return norm.divide(norm.pull_back(read)), bias

    def _norm(self, name: str, module: Any, is_rms: bool = False) -> FrozenNorm:
        kind = self.model.cfg.normalization_type
        if kind is None or isinstance(module, nn.Identity):
            return FrozenNorm()
        if f"{name}.hook_scale" not in self.rows:
            raise ConfigError(
                f"{name} is a {type(module).__name__} without hook_scale, so the logit is no sum "
                f"of what was written before it."
            )
        gain, bias = (getattr(module, leaf, None) for leaf in ("w", "b"))
        return FrozenNorm(
            self.rows[f"{name}.hook_scale"],
            centred=not (is_rms or kind.startswith("RMS")),
            gain=None if gain is None else self._wide(gain.detach()),
            bias=None if bias is None else self._wide(bias.detach()),
        )

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
