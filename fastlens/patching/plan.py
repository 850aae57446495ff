"""What a sweep will run: integers only, no torch.

A patch at layer l changes nothing below l, and in a causal model nothing at earlier positions. So a
run is a *branch* of the base run for each example: it joins at its first patch, holds only the rows
(positions) that differ from the base, and grows to the whole suffix at its first attention. `Plan`
says which runs need no work at all, in which order and chunks the others join, and how many rows
each product will see.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np

from fastlens.errors import SweepError
from fastlens.patching.runs import PlannedPatch, Run
from fastlens.patching.sites import SITES, STAGES

# The first source of every sweep: the other prompt, same example, same place.
OTHER = 0
# What is counted in each layer, of rows but for the last: scores.
COUNTED = ("keys", "queries", "output", "mlp", "scores")
KEYS, QUERIES, OUTPUT, MLP, SCORES = range(5)
STAGE = {name: stage for stage, names in enumerate(STAGES) for name in names}

# (patch, example) -> positions where the new value is known to be the old one.
NullTest: TypeAlias = Callable[[PlannedPatch, int], frozenset[int]]


@dataclass(frozen=True)
class Frame:
    """What the planner knows of model and prompts.

    Attributes:
        n_pos: Positions that can matter: up to the last one read, in a causal model.
        first_difference: For each example, the first position at which token, mask or position
            of the pair differ; ``n_pos`` where they do not.
        needed: Positions whose logits are read.
        columns: Vocabulary columns that are read.
        has_source: Whether the other prompt is run as well.
        nulls: Source number -> test for values that are equal to the base run's.
        caches: Numbers of the sources whose values are looked up by hook name.
        itemsize: Bytes of one number.
    """

    n_layers: int
    n_pos: int
    first_difference: tuple[int, ...]
    needed: tuple[int, ...]
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    columns: int
    is_causal: bool = True
    is_parallel: bool = False
    is_attn_only: bool = False
    is_gated: bool = False
    has_source: bool = True
    nulls: Mapping[int, NullTest] = field(default_factory=dict)
    caches: frozenset[int] = frozenset()
    itemsize: int = 4

    @property
    def batch(self) -> int:
        """Examples of every run."""
        return len(self.first_difference)

    @cached_property
    def needed_mask(self) -> int:
        """``needed`` as bits."""
        return mask_of(self.needed)

    def reach_of(self, rows: int) -> int:
        """Rows that attention changes if keys or values of ``rows`` change."""
        if not rows:
            return 0
        everything = (1 << self.n_pos) - 1
        first = (rows & -rows).bit_length() - 1 if self.is_causal else 0
        return everything & ~((1 << first) - 1)

    def scores_of(self, rows: int) -> int:
        """Pairs of query and key that these query rows look at."""
        if not self.is_causal:
            return rows.bit_count() * self.n_pos
        low = (rows & -rows).bit_length() - 1
        if rows and rows.bit_count() == rows.bit_length() - low:
            return self.scores_between(low, rows.bit_length())
        return sum(position + 1 for position in positions_of(rows))

    def scores_between(self, start: int, stop: int) -> int:
        """`scores_of` rows ``start .. stop - 1``."""
        if not self.is_causal:
            return (stop - start) * self.n_pos
        return (stop * (stop + 1) - start * (start + 1)) // 2


def mask_of(positions: Sequence[int]) -> int:
    """Positions as bits."""
    mask = 0
    for position in positions:
        mask |= 1 << position
    return mask


def positions_of(mask: int) -> Iterator[int]:
    """The positions of the bits that are set, rising."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class Profile(NamedTuple):
    """What one branch costs.

    Attributes:
        counts: Numbers of `COUNTED` in each layer ``[layer, counted]``.
        peak: Most rows it holds at any time.
        entry: (layer, stage) of its first live patch.
        start: Its first row.
    """

    counts: np.ndarray
    peak: int
    entry: tuple[int, int]
    start: int


def canonical(run: Run, n_layers: int, caches: Collection[int] = ()) -> tuple[PlannedPatch, ...]:
    """The patches in the order of the forward; at one place those of codes come last, each
    autoencoder's together. ``resid_post`` below the last layer is the next layer's ``resid_pre``,
    but for the sources ``caches``, whose values go by the hook's name."""
    patches = run.patches
    if len(patches) > 1:
        turns: dict[int | None, int] = {None: -1}
        for patch in patches:
            turns.setdefault(patch.codes, len(turns))
        patches = tuple(sorted(patches, key=lambda p: (p.layer, STAGE[p.site], turns[p.codes])))
    aliased = {
        index
        for index, patch in enumerate(patches)
        if patch.site == "resid_post" and patch.layer < n_layers - 1
    }
    # All or none of them, or those of one layer would change places.
    if aliased and not any(patches[index].value in caches for index in aliased):
        patches = tuple(
            patch._replace(site="resid_pre", layer=patch.layer + 1) if index in aliased else patch
            for index, patch in enumerate(patches)
        )
    return patches


def live_masks(
    frame: Frame, patches: Sequence[PlannedPatch], example: int, trim: bool = True
) -> list[int]:
    """For each patch of a branch, the positions at which it may change something that is read.

    Args:
        patches: In the order of the forward.
        trim: False also keeps rows of the last layer that nobody reads.
    """
    everything = (1 << frame.n_pos) - 1
    # Rows that no earlier patch of the run can have changed: only there is a null patch null.
    untouched = everything
    masks = []
    for patch in patches:
        mask = everything if patch.pos is None else mask_of(patch.pos) & everything
        if patch.mode == "replace":
            mask &= ~(_null_mask(frame, patch, example) & untouched)
        if trim and patch.layer == frame.n_layers - 1 and SITES[patch.site].reach in _ROWS:
            mask &= frame.needed_mask
        untouched &= ~frame.reach_of(mask)
        masks.append(mask)
    return masks


_ROWS = ("row", "query")


def _null_mask(frame: Frame, patch: PlannedPatch, example: int) -> int:
    """Positions at which the new value is the base run's."""
    if patch.value in frame.nulls:
        return mask_of(sorted(frame.nulls[patch.value](patch, example)))
    if patch.value != OTHER:
        return 0
    null = (1 << frame.first_difference[example]) - 1
    if patch.keys is not None and frame.is_causal:
        # Both prompts give a later key nothing.
        null |= (1 << min(patch.keys)) - 1
    return null


def profile_of(
    frame: Frame, steps: Sequence[tuple[int, int, str, int]], *, even_unread: bool = False
) -> Profile | None:
    """What a branch costs whose live patches are ``(layer, stage, reach, positions as bits)`` in
    the order of the forward; None, unless ``even_unread``, if nothing that is read changes."""
    n_layers, last = frame.n_layers, frame.n_layers - 1
    counts = np.zeros((n_layers, len(COUNTED)), dtype=np.int64)
    rows = peak = 0
    at = 0
    start = frame.n_pos
    layer = steps[0][0]
    while layer < n_layers:
        here: dict[str, int] = {}
        early = late = mlp = 0
        while at < len(steps) and steps[at][0] == layer:
            _, stage, reach, mask = steps[at]
            here[reach] = here.get(reach, 0) | mask
            if reach == "row":
                early |= mask if stage <= STAGE["result"] else 0
                mlp |= mask if STAGE["mlp_in"] <= stage <= STAGE["mlp_post"] else 0
                late |= mask
            start = min(start, (mask & -mask).bit_length() - 1)
            at += 1
        stream = rows | here.get("stream", 0)
        queries = stream | here.get("query", 0) | here.get("both", 0)
        keys = stream | here.get("key", 0) | here.get("both", 0)
        wanted = frame.needed_mask if layer == last else -1
        attended = (queries | frame.reach_of(keys)) & wanted
        outputs = attended | (early & wanted)
        before_mlp = outputs | (late & ~_only(steps, at, layer, "mlp_out", "resid_post") & wanted)
        counts[layer] = (
            stream.bit_count(),
            (stream & wanted).bit_count(),
            outputs.bit_count(),
            0 if frame.is_attn_only else _mlp_rows(frame, stream & wanted, before_mlp, mlp),
            frame.scores_of(attended),
        )
        rows = outputs | (late & wanted)
        peak = max(peak, (queries | keys).bit_count(), rows.bit_count())
        layer += 1
        until = min(last, steps[at][0] if at < len(steps) else last)
        if layer < until and rows == frame.reach_of(rows):
            # Up to the next patch or the last layer nothing changes any more.
            n = rows.bit_count()
            counts[layer:until] = (n, n, n, 0 if frame.is_attn_only else n, frame.scores_of(rows))
            layer = until
    if not rows & frame.needed_mask and not even_unread:
        return None
    return Profile(counts, peak, steps[0][:2], start)


def _mlp_rows(frame: Frame, stream: int, before_mlp: int, patched: int) -> int:
    # A parallel MLP reads what the layer reads: rows that only attention changed keep the base's.
    if frame.is_parallel:
        return (stream | (patched & before_mlp)).bit_count()
    return before_mlp.bit_count()


def _only(steps: Sequence[tuple[int, int, str, int]], end: int, layer: int, *sites: str) -> int:
    """Positions of a layer's patches at these sites that no earlier site of the layer patches."""
    stages = {STAGE[site] for site in sites}
    only = others = 0
    for other, stage, reach, mask in steps[:end]:
        if other == layer and reach == "row":
            only |= mask if stage in stages else 0
            others |= 0 if stage in stages else mask
    return only & ~others


class Chunk(NamedTuple):
    """Runs that are made together.

    Attributes:
        runs: Their numbers, in the order in which they join.
        first_layer: Where the first of them joins.
        rows: Most rows they hold at any time, the base runs' left out.
    """

    runs: list[int]
    first_layer: int
    rows: int


@dataclass
class Plan:
    """Which runs are computed, in what order and chunks, and what that costs.

    Attributes:
        frame, runs: What was asked.
        patches: Each run's patches in the order of the forward, aliases resolved.
        same_as: For each run, the number of an equal run before it, or its own.
        why_not: Run number -> ``"null"`` or ``"dead"``: nothing that is read changes, so the answer
            is the base run's, to the bit.
        order: Runs that are computed, in the order in which they join.
        chunks: ``order`` in parts that fit the memory.
        counts: ``[layer, counted]`` of all computed runs, base runs left out.
        rows, entries: Most rows, and first layer, of each run in ``order``.
    """

    frame: Frame
    runs: Sequence[Run]
    patches: list[tuple[PlannedPatch, ...]] = field(default_factory=list)
    same_as: list[int] = field(default_factory=list)
    why_not: dict[int, str] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    rows: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)

    def split(self, memory: int) -> None:
        """Cut the order into chunks that stay within ``memory`` bytes.

        Raises: SweepError if one run alone needs more, with the smallest budget that would do.
        """
        self.chunks = []
        if not self.order:
            return
        row, fixed = self.row_bytes, self.fixed_bytes
        largest = max(self.rows)
        if fixed + largest * row > memory:
            raise SweepError(
                f"memory={memory:,} bytes is too little: the base run takes {fixed:,} and the "
                f"largest run {largest * row:,}. Give at least {fixed + largest * row:,}."
            )
        room = (memory - fixed) // row
        part: list[int] = []
        held = 0
        first = 0
        for number, rows, layer in zip(self.order, self.rows, self.entries, strict=True):
            if part and held + rows > room:
                self.chunks.append(Chunk(part, first, held))
                part, held = [], 0
            if not part:
                first = layer
            part.append(number)
            held += rows
        self.chunks.append(Chunk(part, first, held))

    @property
    def row_bytes(self) -> int:
        """What one packed row takes at its widest, in attention, with its share of the tables."""
        f = self.frame
        heads = f.n_heads + 2 * f.n_kv_heads
        numbers = 3 * f.d_model + 2 * heads * f.d_head + f.n_heads * f.d_head
        return f.itemsize * numbers + 64

    @property
    def fixed_bytes(self) -> int:
        """What does not grow with the runs: base rows in every layer, and blocks of the MLP."""
        f = self.frame
        base = f.batch * f.n_pos * (2 if f.has_source else 1)
        return base * (self.row_bytes + f.itemsize * f.n_layers * f.d_model) + MLP_BYTES

    def base_counts(self) -> np.ndarray:
        """``[layer, counted]`` of the base run and the rows of the other prompt that differ."""
        f = self.frame
        total = np.zeros((f.n_layers, len(COUNTED)), dtype=np.int64)
        starts = [0] * f.batch
        if f.has_source:
            starts += [first if f.is_causal else 0 for first in f.first_difference]
        for start in starts:
            if start < f.n_pos:
                rows = ((1 << f.n_pos) - 1) & ~((1 << start) - 1)
                profile = profile_of(f, [(0, 0, "stream", rows)], even_unread=True)
                if profile is not None:
                    total += profile.counts
        return total

    def total_counts(self) -> np.ndarray:
        """All that runs: every chunk brings the base rows along, from its first layer on; for
        several chunks the base rows go once by themselves up to the last layer before."""
        base = self.base_counts()
        if len(self.chunks) < 2:
            return self.counts + base
        total = self.counts.copy()
        total[:-1] += base[:-1]
        for chunk in self.chunks:
            total[chunk.first_layer :] += base[chunk.first_layer :]
        return total

    def flops(self, counts: np.ndarray) -> np.ndarray:
        """Floating-point operations of each layer: two a multiply-add of every product."""
        f = self.frame
        keys = 2 * f.d_model * 2 * f.n_kv_heads * f.d_head
        queries = 2 * f.d_model * f.n_heads * f.d_head
        mlp = 2 * (3 if f.is_gated else 2) * f.d_model * f.d_mlp
        scores = 4 * f.n_heads * f.d_head
        return counts @ np.array([keys, queries, queries, mlp, scores], dtype=np.int64)

    def plain_flops(self) -> int:
        """Of one plain forward of all examples, logits of every position included."""
        f = self.frame
        rows, pairs = f.batch * f.n_pos, f.batch * f.n_pos**2
        layer = np.array([[rows, rows, rows, 0 if f.is_attn_only else rows, pairs]])
        return int(self.flops(layer)[0]) * f.n_layers


# Profiles of runs of several patches that are kept for others alike.
KEPT_PROFILES = 10_000
# Hidden activations of the MLP that are held at once.
MLP_BYTES = 96 * 2**20


def plan_runs(frame: Frame, runs: Sequence[Run], memory: int | None = None) -> Plan:
    """Plan runs; without ``memory`` all in one chunk.

    Cost: a few microseconds a run; runs whose patches stand at the same places share the work.
    """
    plan = Plan(frame, runs)
    plan.counts = np.zeros((frame.n_layers, len(COUNTED)), dtype=np.int64)
    known: dict[tuple[PlannedPatch, ...], int] = {}
    totals: dict[int, tuple[Profile, int]] = {}
    profiles: dict[tuple, Profile | str] = {}
    examples = _kinds_of_example(frame)
    found: list[tuple[tuple[int, int], int, int, int]] = []
    for number, run in enumerate(runs):
        patches = canonical(run, frame.n_layers, frame.caches)
        plan.patches.append(patches)
        first = known.setdefault(patches, number)
        plan.same_as.append(first)
        if first != number:
            continue
        rows, entry, start, reason = 0, (frame.n_layers, 0), frame.n_pos, "null"
        # Runs come in many alike: of all heads, say. Nulls by value are each run's own.
        place = None
        if not frame.nulls and (len(patches) == 1 or len(profiles) < KEPT_PROFILES):
            place = tuple((patch[:3], patch[4:]) for patch in patches)
        for example, times in examples:
            profile = None if place is None else profiles.get((place, example))
            if profile is None:
                profile = _profile_or_reason(frame, patches, example)
                if place is not None:
                    profiles[place, example] = profile
            if not isinstance(profile, Profile):
                reason = "dead" if profile == "dead" else reason
                continue
            rows += profile.peak * times
            entry, start = min(entry, profile.entry), min(start, profile.start)
            if place is None:
                plan.counts += profile.counts * times
            else:
                before = totals.get(id(profile), (profile, 0))[1]
                totals[id(profile)] = (profile, before + times)
        if rows:
            found.append((entry, start, number, rows))
        else:
            plan.why_not[number] = reason
    found.sort()
    plan.order = [number for _, _, number, _ in found]
    plan.rows = [rows for _, _, _, rows in found]
    plan.entries = [entry[0] for entry, _, _, _ in found]
    for profile, times in totals.values():
        plan.counts += profile.counts * times
    if memory is not None:
        plan.split(memory)
    elif plan.order:
        plan.chunks = [Chunk(plan.order, plan.entries[0], sum(plan.rows))]
    return plan


# Runs that are made between two writes where the wave does not run.
HOOKED_RUNS = 32


def unplanned(frame: Frame, runs: Sequence[Run]) -> Plan:
    """All runs in the order of their first layer, none left out: for hooked forwards."""
    plan = Plan(frame, runs, [run.patches for run in runs], list(range(len(runs))))
    plan.counts = np.zeros((frame.n_layers, len(COUNTED)), dtype=np.int64)
    first = [min(patch.layer for patch in run.patches) for run in runs]
    plan.order = sorted(range(len(runs)), key=first.__getitem__)
    plan.rows = [0] * len(runs)
    plan.entries = [first[number] for number in plan.order]
    for start in range(0, len(runs), HOOKED_RUNS):
        part = plan.order[start : start + HOOKED_RUNS]
        plan.chunks.append(Chunk(part, first[part[0]], 0))
    return plan


def _kinds_of_example(frame: Frame) -> list[tuple[int, int]]:
    """(an example, how many are planned alike)."""
    if frame.nulls:
        return [(example, 1) for example in range(frame.batch)]
    alike: dict[int, list[int]] = {}
    for example, first in enumerate(frame.first_difference):
        alike.setdefault(first, []).append(example)
    return [(examples[0], len(examples)) for examples in alike.values()]


def _profile_or_reason(
    frame: Frame, patches: Sequence[PlannedPatch], example: int
) -> Profile | str:
    steps = live_steps(frame, patches, example)
    if steps:
        return profile_of(frame, steps) or "dead"
    unread = any(
        mask or (patch.pos is not None and max(patch.pos) >= frame.n_pos)
        for patch, mask in zip(
            patches, live_masks(frame, patches, example, trim=False), strict=True
        )
    )
    return "dead" if unread else "null"


def live_steps(
    frame: Frame, patches: Sequence[PlannedPatch], example: int
) -> list[tuple[int, int, str, int]]:
    """The live patches of one branch as `profile_of` takes them."""
    return [
        (patch.layer, STAGE[patch.site], SITES[patch.site].reach, mask)
        for patch, mask in zip(patches, live_masks(frame, patches, example), strict=True)
        if mask
    ]
