"""How runs are made: many stacked in the batch of one hooked forward, or one by one.

A patch in layer l changes nothing below it, so a stack starts at layer l from the base run's
residual stream. One by one is the slow way that is exact under any hooks, and what stacks are
checked by.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.errors import SweepError
from fastlens.patching.metrics import Reading
from fastlens.patching.model import PatchableModel
from fastlens.patching.runs import AxisIndex, Run

# Activations of one stacked forward, unless the caller says how many prompts it may hold.
STACK_BYTES = 256 * 2**20

Progress = Callable[[int], Any]


@dataclass(eq=False)
class Patch:
    """A hook that gives each run of a stack its patched entries.

    The runs share one hook point; the activation's batch axis holds the prompts of the first run,
    then those of the second, and so on.
    """

    runs: Sequence[Run]
    source: Float[Tensor, "batch ..."]
    fired: bool = field(default=False, init=False)

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        """The activation with every run's entries replaced; the one passed in is left alone."""
        self.fired = True
        source = self.source.to(activation)
        wanted = (len(self.runs) * source.shape[0], *source.shape[1:])
        if tuple(activation.shape) != wanted:
            raise SweepError(
                f"{self.runs[0].hook_name} has shape {list(activation.shape)} in the patched run; "
                f"{list(wanted)} was expected from the run it is patched from."
            )
        patched = activation.clone()
        stack = patched.unflatten(0, (len(self.runs), -1))
        for i, run in enumerate(self.runs):
            where = (slice(None), *_product_index(run.index, activation.device))
            stack[i][where] = source[where]
        return patched


def _product_index(index: tuple[AxisIndex, ...], device: torch.device) -> tuple[Any, ...]:
    """What selects the product of the entries that each axis names."""
    n_several = sum(isinstance(entry, tuple) for entry in index)
    where: list[Any] = []
    seen = 0
    for entry in index:
        if isinstance(entry, tuple):
            shape = [-1 if axis == seen else 1 for axis in range(n_several)]
            where.append(torch.tensor(entry, device=device).view(shape))
            seen += 1
        else:
            where.append(slice(None) if entry is None else entry)
    return tuple(where)


def run_alone(
    model: PatchableModel,
    base: Int[Tensor, "batch pos"],
    run: Run,
    source: Mapping[str, Tensor],
    reading: Reading,
    name: str,
) -> Tensor:
    """One run, as a user would make it: the whole prompt, `run_with_hooks`, all logits.

    Args:
        base: The prompt that is patched.
        source: Hook name -> activation of the other prompt.
        name: What to call the run in messages.
    """
    patch = Patch([run], source[run.hook_name])
    logits = model.run_with_hooks(base, fwd_hooks=[(run.hook_name, patch)])
    _check_fired(patch)
    return reading.of_logits(logits, name)


def run_stacked(
    model: PatchableModel,
    base: Int[Tensor, "batch pos"],
    runs: Sequence[Run],
    source: Mapping[str, Tensor],
    reading: Reading,
    names: Sequence[str],
    *,
    stack: int,
    progress: Progress,
) -> list[Tensor]:
    """Every run, ``stack`` at a time in one forward from their layer on.

    Args:
        base, source: As in `run_alone`.
        names: What to call each run in messages.
        stack: Runs per forward.
        progress: Called with the number of runs that were finished.

    Returns: each run's value, in the order of ``runs``.
    """
    n_layers = model.cfg.n_layers
    values: dict[int, Tensor] = {}
    order = sorted(range(len(runs)), key=lambda i: (runs[i].layer, runs[i].site.name))
    streams = _residual_streams(model, base)
    for hook_name, group in itertools.groupby(order, key=lambda i: runs[i].hook_name):
        members = list(group)
        layer = runs[members[0]].layer
        residual, extra = streams(layer)
        for start in range(0, len(members), stack):
            part = members[start : start + stack]
            n = len(part)
            patch = Patch([runs[i] for i in part], source[hook_name])
            with model.hooks(fwd_hooks=[(hook_name, patch)]):
                final = model(
                    _repeated(residual, n),
                    start_at_layer=layer,
                    stop_at_layer=n_layers,
                    **{key: _repeated(value, n) for key, value in extra.items()},
                )
            _check_fired(patch)
            if reading.position is not None:
                final = final[:, reading.position, None]
            logits = model(final, start_at_layer=n_layers).unflatten(0, (n, -1))
            for i, one in zip(part, logits, strict=True):
                values[i] = reading.of_needed(one, names[i])
            progress(n)
    return [values[i] for i in range(len(runs))]


def _residual_streams(
    model: PatchableModel, base: Tensor
) -> Callable[[int], tuple[Tensor, dict[str, Tensor]]]:
    """The base run's residual stream where a layer starts, asked for in rising order.

    Layers are run once each, and only one stream is held.
    """

    def walk() -> Iterator[Tensor]:
        residual, _, positions, mask = model.input_to_embed(base)
        named = {"shortformer_pos_embed": positions, "attention_mask": mask}
        extra.update({key: value for key, value in named.items() if value is not None})
        yield residual
        for layer in range(model.cfg.n_layers):
            residual = model(residual, start_at_layer=layer, stop_at_layer=layer + 1, **extra)
            yield residual

    extra: dict[str, Tensor] = {}
    walking = enumerate(walk())
    at, residual = next(walking)

    def stream(layer: int) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal at, residual
        while at < layer:
            at, residual = next(walking)
        return residual, extra

    return stream


def _repeated(tensor: Tensor, n: int) -> Tensor:
    return tensor.repeat(n, *[1] * (tensor.ndim - 1))


def _check_fired(patch: Patch) -> None:
    if not patch.fired:
        raise SweepError(
            f"nothing passed the hook point {patch.runs[0].hook_name!r} in the patched run, so "
            f"nothing was patched. The model has the place but does not use it."
        )


def runs_per_stack(
    model: PatchableModel, n_pos: int, batch: int, n_bytes: int, *, all_logits: bool
) -> int:
    """Runs that fit one stack of about ``STACK_BYTES``, by an estimate of a block's activations."""
    cfg = model.cfg
    per_token = 8 * cfg.d_model + 6 * cfg.n_heads * cfg.d_head
    per_token += 0 if cfg.attn_only else 4 * cfg.d_mlp
    # Scores, their mask and the pattern, in case they are materialised.
    per_token += 3 * cfg.n_heads * n_pos
    logits = 3 * cfg.d_vocab_out * (n_pos if all_logits else 1)
    return max(1, STACK_BYTES // (batch * n_bytes * (n_pos * per_token + logits)))
