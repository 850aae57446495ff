"""`path_patching`: what each head passes to chosen later heads, or straight to the logits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.components.latent_attention import LatentAttention
from fastlens.components.norms import norm_behind
from fastlens.components.rows import mlp_output, output_of_heads, projections, read, written
from fastlens.decompose import head_results
from fastlens.errors import SweepError, did_you_mean
from fastlens.memory import bytes_of
from fastlens.patching import Patch, sweep
from fastlens.patching.execute import Verify
from fastlens.patching.metrics import Metric
from fastlens.patching.model import PatchableModel, check_patchable
from fastlens.patching.prompts import Direction, Prompt, Prompts, prompt_record, prompts_of
from fastlens.patching.query import Metrics
from fastlens.patching.result import TOLERANCE
from fastlens.patching.sites import SITES
from fastlens.patching.strategy import strategy_of
from fastlens.scores import Scores

INPUTS = ("q", "k", "v")
LOGITS = "logits"
MLPS = ("recompute", "freeze")
# Rows that the streams of several senders take at once, bytes, unless memory= says otherwise.
STREAM_BYTES = 256 * 2**20
_BASE = "base"


class Receiver(NamedTuple):
    """One input of a head that hears the sender: ``letter`` is ``"q"``, ``"k"`` or ``"v"``."""

    layer: int
    head: int
    letter: str

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}.{self.letter}"

    @property
    def hook_name(self) -> str:
        """Where it is."""
        return SITES[self.letter].hook_name(self.layer)


def path_patching(
    model: PatchableModel,
    clean: Prompt,
    corrupted: Prompt,
    *,
    receivers: str | Sequence[Any] = LOGITS,
    metric: Metrics,
    mlps: str = "recompute",
    direction: Direction = "noising",
    normalize: bool | None = None,
    attention_mask: Any = None,
    memory: int | str | None = None,
    verify: Verify = None,
    progress: bool = True,
) -> Scores:
    """For every head, the effect of what it passes to the receivers alone, along direct paths.

    Three steps (Wang et al. 2211.00593, appendix B), for each sending head h:

    1. Both prompts are run.
    2. The base prompt is run again with every head's output frozen to what it was, except that h
       writes what it writes on the other prompt. What then arrives at the receivers is kept: h's
       message by all ways that pass no other head.
    3. The base prompt is run a third time, with that put into the receivers and nothing else
       frozen, and the metric is read.

    >>> path_patching(model, clean, corrupted, receivers=[(9, 9, "q"), (9, 6, "q")],
    ...               metric=logit_diff(" Mary", " John", normalize=True)).plot("movers.png")

    Args:
        clean, corrupted: As in `fastlens.patching.sweep`.
        receivers: ``"logits"``: what reaches the final norm; or ``(layer, head, "q"|"k"|"v")``, one
            or several, which then receive together. Under grouped attention the heads of ``k`` and
            ``v`` are KV heads. Layers and heads may count from the end.
        metric, normalize: As in `fastlens.patching.sweep`.
        mlps: In step 2, ``"recompute"`` lets the sender's message change MLPs on its way, as the
            paper does; ``"freeze"`` freezes them too, so that only the residual stream itself
            carries it (the single edge of Goldowsky-Dill et al. 2304.05969).
        direction: ``"noising"`` runs the clean prompt and sends the corrupted one's message, as the
            paper does (`fastlens.patching.sweep` has the other default); ``"denoising"`` swaps
            them.
        attention_mask, verify, progress: As in `fastlens.patching.sweep`.
        memory: What step 2 and step 3 may take each; by default 256 MiB and half of what is free.

    Returns: `Scores` with axes ``("layer", "head")`` of the sender (behind ``"metric"``, if several
    were given). Heads that come too late to reach a receiver have the base run's value.

    Cost: a forward of each prompt; for step 2, no attention at all: with attention frozen each
    position is on its own, so a sender costs the MLPs between it and the receivers at the positions
    that are read (no layer at all with ``mlps="freeze"``); for step 3, one sweep of as many runs as
    there are senders (see `fastlens.patching.plan`). To the logits of one position step 3 is the
    unembedding alone. A metric that is a Python function may read any position, so all are kept.
    Models with live hooks or foreign modules take one hooked forward per sender in step 2.

    Numerics: as `fastlens.patching.sweep`. Unless ``verify`` is 0, step 2 of the sender with the
    largest effect is made again with hooks, and compared.

    Raises: SweepError for receivers that the model lacks or no head can reach, or if a check fails
        (the scores are in its ``scores`` attribute); otherwise as `fastlens.patching.sweep`.
    """
    if mlps not in MLPS:
        raise SweepError(
            f"mlps={mlps!r} must be 'recompute' or 'freeze'.{did_you_mean(mlps, MLPS)}"
        )
    check_patchable(model)
    prompts = prompts_of(model, clean, corrupted, attention_mask)
    heard = _receivers(model, receivers)
    is_plain = strategy_of(model).is_wave
    # Hooks and modules of a user's may carry a message to any position.
    everywhere = list(range(prompts.n_pos))
    paths = _Paths(
        *(model, prompts, direction, heard, mlps == "recompute"),
        positions=_positions(model, prompts, heard, metric) if is_plain else everywhere,
        n_bytes=STREAM_BYTES if memory is None else bytes_of(memory),
    )
    with torch.no_grad():
        messages = paths.all_by_rows() if is_plain else paths.all_by_hooks()
    runs = {f"L{layer}H{head}": paths.patches(sent) for (layer, head), sent in messages.items()}
    # The value of senders that reach nothing, as this sweep sees it.
    runs[_BASE] = [Patch("z", -1, head=0, source=1.0, mode="scale")]
    found = sweep(
        *(model, prompts.clean, prompts.corrupted),
        runs=runs,
        metric=metric,
        direction=direction,
        normalize=normalize,
        attention_mask=prompts.mask,
        memory=memory,
        verify=verify,
        progress=progress,
    )
    scores = _by_sender(found, model, list(messages), paths)
    scores.meta |= {
        "clean": prompt_record(clean),
        "corrupted": prompt_record(corrupted),
        "receivers": paths.named,
        "mlps": mlps,
    }
    if is_plain and verify is not False and verify != 0:
        _check(scores, paths, messages)
    return scores


def _receivers(model: PatchableModel, receivers: Any) -> tuple[Receiver, ...]:
    """The receivers checked; none stands for the logits."""
    if isinstance(receivers, str):
        if receivers != LOGITS:
            raise SweepError(
                f"receivers={receivers!r} must be 'logits', or heads as (layer, head, 'q'), ..."
            )
        return ()
    if not isinstance(receivers, list | tuple):
        raise SweepError(
            f"receivers={receivers!r} must be 'logits', or a list of (layer, head, 'q')."
        )
    is_one = len(receivers) == 3 and hasattr(receivers[0], "__index__")
    listed = [receivers] if is_one else list(receivers)
    cfg = model.cfg
    found = []
    for one in listed:
        if not isinstance(one, list | tuple) or len(one) != 3 or one[2] not in INPUTS:
            raise SweepError(f"receiver {one!r} must be (layer, head, 'q'), with 'q', 'k' or 'v'.")
        layer, head, letter = one
        if not (hasattr(layer, "__index__") and hasattr(head, "__index__")):
            raise SweepError(f"receiver {one!r} must be (layer, head, 'q') with two integers.")
        # Those of numpy and torch too.
        layer, head = int(layer), int(head)
        heads = cfg.n_heads
        if letter != "q" and not cfg.ungroup_grouped_query_attention:
            heads = cfg.n_key_value_heads or heads
        for index, size, what in ((layer, cfg.n_layers, "layers"), (head, heads, "heads")):
            if not -size <= index < size:
                raise SweepError(f"receiver {one!r}: {letter} has {size} {what}, not {index}.")
        found.append(Receiver(layer % cfg.n_layers, head % heads, letter))
    if not found or len(set(found)) < len(found):
        raise SweepError(f"receivers={receivers!r} is empty or names an input twice.")
    if max(found).layer == 0:
        raise SweepError(
            f"receivers={[str(one) for one in found]} are in the first layer: no head is before it."
        )
    return tuple(found)


def _positions(
    model: PatchableModel, prompts: Prompts, heard: Sequence[Receiver], metric: Any
) -> list[int]:
    """Positions at which a message can arrive and be seen."""
    if not heard:
        metrics = list(metric.values()) if isinstance(metric, Mapping) else metric
        metrics = metrics if isinstance(metrics, list | tuple) else [metrics]
        if not all(isinstance(one, Metric) for one in metrics):
            # A function may look elsewhere on other logits.
            return list(range(prompts.n_pos))
        read = [one.positions(prompts.batch, prompts.n_pos) for one in metrics]
        return sorted({position for positions in read for position in positions})
    if model.cfg.attention_dir != "causal":
        return list(range(prompts.n_pos))
    differs = (prompts.clean != prompts.corrupted).any(0)
    first = int(differs.int().argmax()) if bool(differs.any()) else prompts.n_pos - 1
    return list(range(first, prompts.n_pos))


@dataclass
class _Paths:
    """Step 2: what arrives at the receivers from each sender, less what the base run has there.

    A message is one tensor per receiver, ``[batch, kept pos, d_head]``, or for the logits one
    ``[batch, kept pos, d_model]``.

    Attributes:
        receivers: Empty for the logits.
        recompute: Whether MLPs hear the message.
        positions: Those that are kept.
        n_bytes: For the rows of several senders at once.
        before: What each receiver has in the base run; filled in with the messages.
    """

    model: Any
    prompts: Prompts
    direction: Direction
    receivers: tuple[Receiver, ...]
    recompute: bool
    positions: list[int]
    n_bytes: int
    before: list[Tensor] = field(default_factory=list)

    @property
    def named(self) -> list[str]:
        """The receivers in words."""
        return [str(one) for one in self.receivers] or [LOGITS]

    @property
    def last(self) -> int:
        """The layer that the message enters last; ``n_layers`` is the final norm."""
        return max((one.layer for one in self.receivers), default=self.model.cfg.n_layers)

    @property
    def senders(self) -> list[tuple[int, int]]:
        """Heads that come before a receiver, by layer."""
        heads = range(self.model.cfg.n_heads)
        return [(layer, head) for layer in range(self.last) for head in heads]

    def patches(self, message: Sequence[Tensor]) -> list[Patch]:
        """Step 3 for one sender."""
        pos = self.positions
        if not self.receivers:
            return [Patch("resid_post", -1, pos=pos, source=message[0], mode="add")]
        # Replaced, not added to: an earlier receiver must not change what a later one hears.
        return [
            Patch(r.letter, r.layer, pos=pos, head=r.head, source=(before + sent)[:, :, None])
            for r, before, sent in zip(self.receivers, self.before, message, strict=True)
        ]

    def _tokens(self) -> tuple[Tensor, Tensor]:
        return self.prompts.base_and_source(self.direction)

    def _run(self, tokens: Int[Tensor, "batch pos"], hooks: list[Any]) -> None:
        masked = {} if self.prompts.mask is None else {"attention_mask": self.prompts.mask}
        stop = self.last + 1 if self.receivers else None
        self.model.run_with_hooks(
            tokens, return_type=None, stop_at_layer=stop, fwd_hooks=hooks, **masked
        )

    def _kept(self, tokens: Int[Tensor, "batch pos"], names: Sequence[str]) -> dict[str, Tensor]:
        """Activations of one run at the kept positions."""
        kept: dict[str, Tensor] = {}
        at = torch.tensor(self.positions, device=tokens.device)

        def keep(activation: Tensor, hook: Any) -> None:
            kept[hook.name] = activation.detach()[:, at.to(activation.device)]

        self._run(tokens, [(name, keep) for name in names])
        return kept

    # -- position by position, without attention ---------------------------------------------

    def all_by_rows(self) -> dict[tuple[int, int], list[Tensor]]:
        """Sender -> message, from packed rows that no module or hook sees."""
        cfg, last = self.model.cfg, self.last
        base, source = self._tokens()
        of_z = [f"blocks.{layer}.attn.hook_z" for layer in range(last)]
        streams = [f"blocks.{n}.hook_resid_pre" for n in range(min(last + 1, cfg.n_layers))]
        written = [f"blocks.{layer}.hook_attn_out" for layer in range(last)]
        places = self._places() if self.receivers else []
        self.at_base = self._kept(base, [*of_z, *streams, *written, *places])
        self.before = [self.at_base[one.hook_name][:, :, one.head] for one in self.receivers]
        self.at_source = self._kept(source, of_z)
        one = base.shape[0] * len(self.positions) * cfg.dtype.itemsize
        one *= 6 * cfg.d_model + (3 * (cfg.d_mlp or 0) if self.recompute else 0)
        size = max(1, self.n_bytes // one)
        found: dict[tuple[int, int], list[Tensor]] = {}
        for start in range(0, len(self.senders), size):
            part = self.senders[start : start + size]
            found |= dict(zip(part, self._messages(part), strict=True))
        del self.at_base, self.at_source
        return found

    def _messages(self, senders: Sequence[tuple[int, int]]) -> list[list[Tensor]]:
        """Messages of senders that are given in the order of their layers."""
        stream: Tensor | None = None
        arrived: dict[Receiver, Tensor] = {}
        for layer in range(senders[0][0], self.last):
            if stream is not None:
                arrived |= self._heard(layer, stream)
            heads = [head for sender_layer, head in senders if sender_layer == layer]
            stream = self._after(layer, stream, heads)
        assert stream is not None
        if not self.receivers:
            return [[one] for one in stream]
        arrived |= self._heard(self.last, stream)
        messages: list[list[Tensor]] = [[] for _ in senders]
        for receiver, before in zip(self.receivers, self.before, strict=True):
            sent = arrived.get(receiver, ())
            for i, message in enumerate(messages):
                # A sender may come too late for this receiver, but not for another.
                message.append(sent[i] if i < len(sent) else torch.zeros_like(before))
        return messages

    def _after(
        self, layer: int, stream: Tensor | None, heads: Sequence[int]
    ) -> Float[Tensor, "sender batch pos d_model"]:
        """Differences from the base run's stream after a layer whose ``heads`` begin to send."""
        cfg = self.model.cfg
        block = self.model.blocks[layer]
        parts = [] if stream is None else [stream]
        if heads:
            parts.append(self._sent(layer, heads))
        if cfg.attn_only or not self.recompute:
            return torch.cat(parts)
        before = self.at_base[f"blocks.{layer}.hook_resid_pre"]
        if cfg.parallel_attn_mlp:
            if stream is not None:
                parts[0] = stream + self._change(block, before, stream)
            return torch.cat(parts)
        middle = before + self.at_base[f"blocks.{layer}.hook_attn_out"]
        joined = torch.cat(parts)
        return joined + self._change(block, middle, joined)

    def _sent(self, layer: int, heads: Sequence[int]) -> Float[Tensor, "sender batch pos d_model"]:
        """How each head's output differs between the prompts, in the stream."""
        block = self.model.blocks[layer]
        name = f"blocks.{layer}.attn.hook_z"
        base, source = self.at_base[name], self.at_source[name]
        chosen = list(heads)
        sent = head_results((source - base)[:, :, chosen], block.attn.W_O[chosen])
        if norm_behind(self.model.cfg, "ln1") is None:
            return sent
        whole = output_of_heads(block.attn, base.flatten(0, 1)).view(sent.shape[1:])
        return _difference(lambda x: written(block, "ln1", x), whole, sent)

    def _change(self, block: Any, base: Tensor, stream: Tensor) -> Tensor:
        """How what the MLP writes differs."""

        def mlp_out(rows: Tensor) -> Tensor:
            return written(block, "ln2", mlp_output(block.mlp, read(block, "ln2", rows)))

        return _difference(mlp_out, base, stream)

    def _heard(self, layer: int, stream: Tensor) -> dict[Receiver, Tensor]:
        """What arrives at this layer's receivers."""
        here = [receiver for receiver in self.receivers if receiver.layer == layer]
        if not here:
            return {}
        block = self.model.blocks[layer]
        before = self.at_base[f"blocks.{layer}.hook_resid_pre"]
        if isinstance(block.attn, LatentAttention):
            # A norm stands between the stream and queries, keys and values.
            return {one: _difference(_heard_by(block, one), before, stream) for one in here}
        change = _difference(lambda x: read(block, "ln1", x), before, stream)
        w_k, w_v, _, _ = block.attn.key_value_leaves()
        weights = {"q": block.attn.W_Q, "k": w_k, "v": w_v}
        return {one: change @ weights[one.letter][one.head] for one in here}

    # -- by hooks, one forward per sender ----------------------------------------------------

    def all_by_hooks(self) -> dict[tuple[int, int], list[Tensor]]:
        """Sender -> message, for any hooks and modules."""
        base, source = self._for_hooks()
        at = self.positions
        self.before = [base[one.hook_name][:, at, one.head] for one in self.receivers]
        return {sender: self.by_hooks(sender, base, source) for sender in self.senders}

    def _for_hooks(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Whole activations of both runs."""
        base, source = self._tokens()
        of_z = [f"blocks.{layer}.attn.hook_z" for layer in range(self.last)]
        of_mlp = [f"blocks.{layer}.hook_mlp_out" for layer in range(self.last)]
        frozen = of_z if self.recompute or self.model.cfg.attn_only else [*of_z, *of_mlp]
        found = []
        for tokens, names in ((base, [*frozen, *self._places()]), (source, of_z)):
            kept: dict[str, Tensor] = {}
            hooks = [(name, _keeper(kept)) for name in dict.fromkeys(names)]
            self._run(tokens, hooks)
            found.append(kept)
        return found[0], found[1]

    def _places(self) -> list[str]:
        """Hook names at which messages arrive."""
        if not self.receivers:
            return [f"blocks.{self.last - 1}.hook_resid_post"]
        return list(dict.fromkeys(one.hook_name for one in self.receivers))

    def by_hooks(
        self,
        sender: tuple[int, int],
        base: Mapping[str, Tensor],
        source: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """One sender's message, from a forward with everything else frozen."""
        layer, head = sender
        places = self._places()

        def freeze(activation: Tensor, hook: Any) -> Tensor:
            value = base[hook.name]
            if hook.name == f"blocks.{layer}.attn.hook_z":
                value = value.clone()
                value[:, :, head] = source[hook.name][:, :, head]
            return value

        arrived: dict[str, Tensor] = {}
        hooks: list[Any] = [(name, freeze) for name in base if name not in places]
        hooks += [(name, _keeper(arrived)) for name in places]
        self._run(self._tokens()[0], hooks)
        at = self.positions
        changes = {name: (arrived[name] - base[name])[:, at] for name in places}
        if not self.receivers:
            return [changes[places[0]]]
        return [changes[one.hook_name][:, :, one.head] for one in self.receivers]


def _keeper(kept: dict[str, Tensor]) -> Any:
    def keep(activation: Tensor, hook: Any) -> None:
        kept[hook.name] = activation.detach().clone()

    return keep


def _heard_by(block: Any, receiver: Receiver) -> Callable[[Tensor], Tensor]:
    """Rows of the stream to the receiver's own query, key or value."""

    def heard(rows: Tensor) -> Tensor:
        (found,) = projections(block.attn, read(block, "ln1", rows), receiver.letter)
        return found[:, receiver.head]

    return heard


def _difference(
    function: Any, base: Float[Tensor, "batch pos d"], change: Float[Tensor, "n batch pos d"]
) -> Float[Tensor, "n batch pos d_out"]:
    """``function(base + change) - function(base)``, of rows."""
    rows = torch.cat([base[None], base + change])
    out = function(rows.flatten(0, 2)).unflatten(0, rows.shape[:3])
    return out[1:] - out[:1]


def _by_sender(
    found: Scores, model: PatchableModel, senders: Sequence[tuple[int, int]], paths: _Paths
) -> Scores:
    """Scores of runs as scores of senders."""
    cfg = model.cfg
    place = {sender: i for i, sender in enumerate(senders)}
    every = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    index = torch.tensor([place.get(one, len(senders)) for one in every])
    index = index.view(cfg.n_layers, cfg.n_heads)
    what = f"{paths.direction} paths from heads to {', '.join(paths.named)}"
    sites = ", ".join(found.meta["sites"])
    old = f"{paths.direction} {sites}"
    by_metric = {
        name: {**facts, "title": facts["title"].replace(old, what)}
        for name, facts in found.by_metric.items()
    }
    labels = {axis: names for axis, names in found.labels.items() if axis != "run"}
    return replace(
        found,
        values=found.values[..., index],
        axes=(*found.axes[:-1], "layer", "head"),
        labels={
            **labels,
            "layer": [f"L{layer}" for layer in range(cfg.n_layers)],
            "head": [f"H{head}" for head in range(cfg.n_heads)],
        },
        title=found.title.replace(old, what),
        per_example=None if found.per_example is None else found.per_example[..., index],
        by_metric=by_metric,
        meta={name: fact for name, fact in found.meta.items() if name != "sites"},
    )


def _check(
    scores: Scores, paths: _Paths, messages: Mapping[tuple[int, int], Sequence[Tensor]]
) -> None:
    """Step 2 of the strongest sender again, by hooks.

    Raises: SweepError if it differs.
    """
    strongest = (cell.index[-2:] for cell in scores.top(scores.values.numel()))
    sender = next((layer, head) for layer, head in strongest if (layer, head) in messages)
    with torch.no_grad():
        base, source = paths._for_hooks()
        again = paths.by_hooks(sender, base, source)
    largest = max(float(base[name].abs().max()) for name in paths._places())
    tolerance = TOLERANCE.get(paths.model.cfg.dtype, TOLERANCE[torch.float32]) * max(1.0, largest)
    difference = max(
        float((a - b).abs().max()) for a, b in zip(messages[sender], again, strict=True)
    )
    scores.meta["checked_message"] = {
        "sender": f"L{sender[0]}H{sender[1]}",
        "max_difference": difference,
        "tolerance": tolerance,
    }
    if not difference <= tolerance:
        error = SweepError(
            f"what L{sender[0]}H{sender[1]} passes to {', '.join(paths.named)} differs by "
            f"{difference:.3g} from a forward with hooks (tolerance {tolerance:.3g}): this is a "
            f"fault of fastlens. The scores are in this error's .scores."
        )
        error.scores = scores  # type: ignore[attr-defined]
        raise error
