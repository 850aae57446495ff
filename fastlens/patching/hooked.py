"""Runs made with hooks: one whole forward each, or many stacked in the batch of one forward.

One by one is what a user would write. It is exact under any hooks and modules, it is what every
other way is checked by, and it shares no code with the wave.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.errors import SweepError
from fastlens.patching.codes import PlacedCodes
from fastlens.patching.model import PatchableModel
from fastlens.patching.runs import PlannedPatch, Run
from fastlens.patching.sources import Source, applied

# Activations of one stacked forward.
STACK_BYTES = 256 * 2**20

Logits = Callable[[Float[Tensor, "batch pos d_vocab"]], Any]


@dataclass(eq=False, repr=False)
class HookedRuns:
    """What hooked runs are made from.

    Attributes:
        model: Any hooked model.
        base: Tokens that are patched.
        mask: Their attention mask, or None.
        sources: What `PlannedPatch.value` counts.
        other: Hook name -> the other prompt's activation there.
        codes: What `PlannedPatch.codes` counts.
    """

    model: PatchableModel
    base: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"] | None
    sources: Sequence[Source]
    other: Mapping[str, Tensor]
    codes: Sequence[PlacedCodes] = ()

    def alone(self, run: Run, *, materialise: bool = False) -> Float[Tensor, "batch pos d_vocab"]:
        """One run: the whole prompt, `run_with_hooks`, all logits.

        Args:
            materialise: Also look at every layer's pattern, so that scores and patterns are made
                in full: another way through attention than the fused one.
        """
        hooks = self._hooks([run])
        looks = []
        if materialise:
            names = [name for name in self.model.hook_dict if name.endswith("attn.hook_pattern")]
            looks = [(name, _look) for name in names]
        logits = self.model.run_with_hooks(
            self.base, fwd_hooks=[*hooks, *looks], **_masked(self.mask)
        )
        _check_fired([hook for _, hook in hooks])
        return logits

    def stacked(
        self, runs: Sequence[Run], n_stacked: int
    ) -> Iterator[tuple[list[int], Float[Tensor, "run batch pos d_vocab"]]]:
        """Runs ``n_stacked`` at a time in one forward from their first layer on.

        Exact where no module mixes the rows of a batch, which hooks and modules of a user's may.

        Yields: numbers of runs, and their logits.
        """
        order = sorted(range(len(runs)), key=lambda i: _first_layer(runs[i]))
        streams = self._residual_streams()
        for start in range(0, len(order), n_stacked):
            part = order[start : start + n_stacked]
            layer = _first_layer(runs[part[0]])
            residual, extra = streams(layer)
            hooks = self._hooks([runs[i] for i in part])
            with self.model.hooks(fwd_hooks=hooks):
                final = self.model(
                    _repeated(residual, len(part)),
                    start_at_layer=layer,
                    stop_at_layer=self.model.cfg.n_layers,
                    **{key: _repeated(value, len(part)) for key, value in extra.items()},
                )
            _check_fired([hook for _, hook in hooks])
            logits = self.model(final, start_at_layer=self.model.cfg.n_layers)
            yield part, logits.unflatten(0, (len(part), -1))

    def runs_per_stack(self, n_bytes: int, most: int | None = None) -> int:
        """Runs that fit one stack of about ``most`` bytes, by default ``STACK_BYTES``.

        Args:
            n_bytes: Of one number.
        """
        cfg = self.model.cfg
        batch, n_pos = self.base.shape
        per_token = 8 * cfg.d_model + 6 * cfg.n_heads * cfg.d_head + 3 * cfg.n_heads * n_pos
        per_token += (0 if cfg.attn_only else 4 * cfg.d_mlp) + 3 * cfg.d_vocab_out
        most = STACK_BYTES if most is None else most
        return max(1, most // (batch * n_bytes * n_pos * per_token))

    def _hooks(self, runs: Sequence[Run]) -> list[tuple[str, "_PatchHook"]]:
        by_name: dict[str, _PatchHook] = {}
        for i, run in enumerate(runs):
            for patch in run.patches:
                hook = by_name.setdefault(patch.hook_name, _PatchHook(self, len(runs)))
                hook.patches.append((i, patch))
        return list(by_name.items())

    def _residual_streams(self) -> Callable[[int], tuple[Tensor, dict[str, Tensor]]]:
        """The base run's residual stream where a layer starts, asked for in rising order."""
        model = self.model
        residual, _, positions, mask = model.input_to_embed(self.base, **_masked(self.mask))
        named = {"shortformer_pos_embed": positions, "attention_mask": mask}
        extra = {key: value for key, value in named.items() if value is not None}
        at = 0

        def stream(layer: int) -> tuple[Tensor, dict[str, Tensor]]:
            nonlocal at, residual
            while at < layer:
                residual = model(residual, start_at_layer=at, stop_at_layer=at + 1, **extra)
                at += 1
            return residual, extra

        return stream


@dataclass(eq=False, repr=False)
class _PatchHook:
    """Gives each run of a stack its patched entries; the activation passed in is left alone.

    The activation's batch axis holds the prompts of the first run, then those of the second.
    """

    how: HookedRuns
    n_runs: int
    patches: list[tuple[int, PlannedPatch]] = field(default_factory=list)
    fired: bool = False

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        self.fired = True
        patched = activation.clone()
        stack = patched.unflatten(0, (self.n_runs, -1))
        coded: dict[tuple[int, int], list[PlannedPatch]] = {}
        for i, patch in self.patches:
            if patch.codes is not None:
                coded.setdefault((i, patch.codes), []).append(patch)
                continue
            where = _product_index(patch, stack.shape[2:], activation.device)
            old = stack[i][where]
            stack[i][where] = applied(old, self._value(patch, old, where), patch.mode)
        for (i, number), patches in coded.items():
            stack[i] += self._change(stack[i], self.how.codes[number], patches)
        return patched

    def _change(self, x: Tensor, codes: PlacedCodes, patches: list[PlannedPatch]) -> Tensor:
        """What patched codes change of the activation of one run."""
        flat = x.flatten(2)
        found = codes.encode(flat)
        edited, before = found.clone(), codes.decode(found)
        for patch in patches:
            where = _product_index(patch, edited.shape[1:], edited.device)
            old = edited[where]
            edited[where] = applied(old, self._value(patch, old, where), patch.mode)
        # Some decode by what they last encoded.
        codes.encode(flat)
        return (codes.decode(edited) - before).to(x).view_as(x)

    def _value(self, patch: PlannedPatch, old: Tensor, where: tuple[Any, ...]) -> Any:
        source = self.how.sources[patch.value]
        if source.kind == "number":
            return source.number
        if source.kind == "tensor":
            assert source.tensor is not None
            return source.tensor.to(old).expand(old.shape)
        if source.kind == "cache":
            assert source.cache is not None
            return source.cache[patch.hook_name].to(old)[where]
        found = self.how.other[patch.hook_name]
        if patch.codes is not None:
            found = self.how.codes[patch.codes].encode(found.flatten(2))
        found = found.to(old)
        if source.kind == "resample":
            assert source.permutation is not None
            found = found[source.permutation.to(found.device)]
        if source.kind == "mean":
            found = found.mean(0, keepdim=True).expand_as(found)
        return found[where]


def _product_index(
    patch: PlannedPatch, sizes: Sequence[int], device: torch.device
) -> tuple[Any, ...]:
    """What selects the product of the entries that each axis names, for all examples."""
    indices = patch.indices()
    where: list[Any] = [slice(None)]
    for number, index in enumerate(indices):
        chosen = range(sizes[number]) if index is None else index
        shape = [-1 if axis == number else 1 for axis in range(len(indices))]
        where.append(torch.tensor(list(chosen), device=device).view(shape))
    return tuple(where)


def _look(activation: Tensor, hook: Any) -> None:
    """A hook that only makes its place be passed."""


def _first_layer(run: Run) -> int:
    return min(patch.layer for patch in run.patches)


def _repeated(tensor: Tensor, n: int) -> Tensor:
    return tensor.repeat(n, *[1] * (tensor.ndim - 1))


def _masked(mask: Tensor | None) -> dict[str, Tensor]:
    return {} if mask is None else {"attention_mask": mask}


def _check_fired(hooks: Sequence[_PatchHook]) -> None:
    for hook in hooks:
        if not hook.fired:
            name = hook.patches[0][1].hook_name
            raise SweepError(
                f"nothing passed the hook point {name!r} in the patched run, so nothing was "
                f"patched. The model has the place but does not use it."
            )


def places_of(runs: Sequence[Run], sources: Sequence[Source]) -> list[str]:
    """Hook names at which runs read the other prompt."""
    names = {
        patch.hook_name for run in runs for patch in run.patches if sources[patch.value].reads_other
    }
    return sorted(names)
