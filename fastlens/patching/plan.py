"""What a sweep will run: integers only, no torch.

A patch at layer l changes nothing below l, and in a causal model nothing at earlier positions. So a
run is a *branch* of the base run for each example: it joins at its first patch, holds only the rows
(positions) that differ from the base, and grows to the whole suffix at its first attention. `Plan`
says which runs need no work at all, in which order and chunks the others join, and how many rows
each product will see.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fastlens.errors import SweepError
from fastlens.patching.frame import BLOCKS, Blocks, Frame, mask_of
from fastlens.patching.runs import PlannedPatch, Run
from fastlens.patching.sites import BY_ENTRY, SITES, STAGES

# The first source of every sweep: the other prompt, same example, same place.
OTHER = 0
# What is counted in each layer, of rows but for the last: scores.
COUNTED = ("keys", "queries", "output", "mlp", "scores")
KEYS, QUERIES, OUTPUT, MLP, SCORES = range(5)
STAGE = {name: stage for stage, names in enumerate(STAGES) for name in names}


class Profile(NamedTuple):
    """What one branch costs.

    Attributes:
        counts: Numbers of `COUNTED` in each layer ``[layer, counted]``.
        peak: Most rows it holds at any time.
        entry: (layer, stage) of its first live patch.
        start: Its first row.
        patched: Bytes that its patches take beside rows.
    """

    counts: np.ndarray
    peak: int
    entry: tuple[int, int]
    start: int
    patched: int = 0


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
# Where rows of runs that join are put beside the queries, keys and values of all.
_HEADS = ("attn_in", "q_input", "k_input", "v_input", "q", "k", "v", "rot_q", "rot_k")


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
        held: Most bytes, likewise.
    """

    runs: list[int]
    first_layer: int
    rows: int
    held: int = 0


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
        rows, entries, held: Most rows, first layer and most bytes of each run in ``order``.
        blocks: How much some products hold at a time.
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
    held: list[int] = field(default_factory=list)
    blocks: Blocks = BLOCKS

    def split(self, memory: int) -> None:
        """Cut the order into chunks that stay within ``memory`` bytes.

        Raises: SweepError if one run alone needs more, with the smallest budget that would do.
        """
        self.chunks = []
        if self.order:
            self.blocks = self.blocks_within(memory)
            self.chunks = self.chunks_within(memory)

    def blocks_within(self, memory: int) -> Blocks:
        """What products may hold at a time, for chunks to have most of ``memory``.

        Raises: SweepError as `split`.
        """
        ample = replace(self, blocks=BLOCKS)
        if ample.taken(len(self.order), sum(self.held)) <= memory:
            return BLOCKS
        least = self._least_blocks()
        needed = self.least_bytes
        if needed > memory:
            base, largest = self._base_bytes, max(self.held)
            raise SweepError(
                f"memory={memory:,} bytes is too little: the base run takes {base:,}, the largest "
                f"run {largest:,} and its products {needed - base - largest:,}. Give at least "
                f"{needed:,}."
            )
        # They take turns, so each may have this share of what is left.
        spare = (memory - needed) // 16
        return Blocks(
            *(
                min(most, max(few, (few * most_of + spare) // most_of))
                for few, most, most_of in zip(least, BLOCKS, (2, 3, 2, 2), strict=True)
            )
        )

    def _least_blocks(self) -> Blocks:
        """Without which nothing runs: of a few rows."""
        f = self.frame
        keys = f.n_pos * f.d_head * f.itemsize
        logits = max(4 * f.columns * max(4, f.itemsize), self._logits_of_one)
        return Blocks(LEAST_MLP_ROWS * f.hidden_bytes, 2 * keys, logits, BLOCKS.codes // 16)

    @cached_property
    def _kinds(self) -> tuple[bool, bool]:
        """Whether any patch is of a pattern, and of codes."""
        patches = [patch for patches in self.patches for patch in patches]
        return (
            any(SITES[patch.site].axes[-1] == "key_pos" for patch in patches),
            any(patch.codes is not None for patch in patches),
        )

    @property
    def _logits_of_one(self) -> int:
        """Logits of one run that a metric reads."""
        f = self.frame
        return f.batch * len(f.needed) * f.columns * f.itemsize

    @property
    def least_bytes(self) -> int:
        """The smallest budget that works: the largest run alone."""
        return replace(self, blocks=self._least_blocks()).taken(1, max(self.held, default=0))

    def chunks_within(self, memory: int) -> list[Chunk]:
        """The order in parts that take ``memory`` bytes each, with these blocks; a run that takes
        more is alone in its part."""
        chunks: list[Chunk] = []
        part: list[int] = []
        rows = held = first = 0
        for number, more, layer, size in zip(
            self.order, self.rows, self.entries, self.held, strict=True
        ):
            if part and self.taken(len(part) + 1, held + size) > memory:
                chunks.append(Chunk(part, first, rows, held))
                part, rows, held = [], 0, 0
            if not part:
                first = layer
            part.append(number)
            rows += more
            held += size
        if part:
            chunks.append(Chunk(part, first, rows, held))
        return chunks

    def part(self, runs: Sequence[int]) -> Chunk:
        """A chunk of these runs, in this order."""
        at = self._place
        where = [at[run] for run in runs]
        return Chunk(
            list(runs),
            min((self.entries[i] for i in where), default=0),
            sum(self.rows[i] for i in where),
            sum(self.held[i] for i in where),
        )

    @cached_property
    def _place(self) -> dict[int, int]:
        return {number: i for i, number in enumerate(self.order)}

    @property
    def base_rows(self) -> int:
        """Rows of the base runs and of the other prompts, which every chunk has."""
        f = self.frame
        return f.batch * f.n_pos * (2 if f.has_source else 1)

    @property
    def row_bytes(self) -> int:
        """What one packed row takes at its widest."""
        return self.frame.row_bytes + self.frame.joining_bytes * self._joins_inside

    @cached_property
    def _joins_inside(self) -> bool:
        return any(patch.site in _HEADS for run in self.runs for patch in run.patches)

    @property
    def waiting_bytes(self) -> int:
        """What one packed row takes between two layers: the stream, and whose it is."""
        return self.frame.itemsize * self.frame.d_model + 8

    def waiting(self, chunk: Chunk) -> int:
        """What a chunk takes between two layers, at most."""
        return (chunk.rows + self.base_rows) * self.waiting_bytes + 16 * len(COUNTED) * (
            self.frame.n_layers
        )

    @property
    def _base_bytes(self) -> int:
        f = self.frame
        branches = f.batch * (2 if f.has_source else 1)
        # In the pack, at the embedding, and alone where the next chunk begins.
        rows = self.base_rows * (self.row_bytes + 2 * f.itemsize * f.d_model)
        return rows + branches * f.branch_bytes

    def _gather_bytes(self, n_runs: int) -> int:
        """Keys and values that attention gathers at a time, as they are and for each query head."""
        f = self.frame
        branches = f.batch * (n_runs + 2)
        each = f.n_pos * 2 * f.n_kv_heads * f.d_head * f.itemsize
        return 2 * max(each, min(GATHER_BYTES, branches * each))

    @property
    def fixed_bytes(self) -> int:
        """What is there for one run already: base rows, and what products hold at a time."""
        return self.taken(1, 0)

    def taken(self, n_runs: int, held: int) -> int:
        """What so many runs take at their widest that hold so many bytes themselves."""
        rows = self.base_rows + held // self.row_bytes
        hidden, logits = rows * self.frame.hidden_bytes, 4 * (n_runs + 2) * self._logits_of_one
        blocks = self.blocks.largest(hidden, logits, *self._kinds)
        return self._base_bytes + max(blocks, self._gather_bytes(n_runs)) + held

    def peak_bytes(self) -> int:
        """Most that a chunk under way takes."""
        taken = (self.taken(len(chunk.runs), chunk.held) for chunk in self.chunks)
        return max(taken, default=self.fixed_bytes)

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
        """All that runs: every chunk brings the base rows along, from its first layer on; before
        the last chunk's first layer they go once by themselves."""
        base = self.base_counts()
        if not self.chunks:
            return self.counts + base
        total = self.counts.copy()
        before = max(chunk.first_layer for chunk in self.chunks)
        total[:before] += base[:before]
        for chunk in self.chunks:
            total[chunk.first_layer :] += base[chunk.first_layer :]
        return total

    def flops(self, counts: np.ndarray) -> np.ndarray:
        """Floating-point operations of each layer: two a multiply-add of every product."""
        f = self.frame
        keys = 2 * f.d_model * 2 * f.n_kv_heads * f.d_head
        queries = 2 * f.d_model * f.n_heads * f.d_head
        mlp = (3 if f.is_gated else 2) * (f.experts_width or f.d_mlp) + f.n_experts
        mlp *= 2 * f.d_model
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
# Rows that an MLP takes at a time, at least.
LEAST_MLP_ROWS = 64
# Keys and values that a piece of attention gathers: `torch_suffix_attention.GATHER_BYTES`.
GATHER_BYTES = 24 * 2**20


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
    found: list[tuple[tuple[int, int], int, int, int, int]] = []
    row, branch = plan.row_bytes, frame.branch_bytes
    for number, run in enumerate(runs):
        patches = canonical(run, frame.n_layers, frame.caches)
        plan.patches.append(patches)
        first = known.setdefault(patches, number)
        plan.same_as.append(first)
        if first != number:
            continue
        rows, entry, start, reason = 0, (frame.n_layers, 0), frame.n_pos, "null"
        held = 0
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
            held += (profile.peak * row + branch + profile.patched) * times
            entry, start = min(entry, profile.entry), min(start, profile.start)
            if place is None:
                plan.counts += profile.counts * times
            else:
                before = totals.get(id(profile), (profile, 0))[1]
                totals[id(profile)] = (profile, before + times)
        if rows:
            found.append((entry, start, number, rows, held))
        else:
            plan.why_not[number] = reason
    found.sort()
    plan.order = [number for _, _, number, _, _ in found]
    plan.rows = [rows for *_, rows, _ in found]
    plan.held = [held for *_, held in found]
    plan.entries = [entry[0] for entry, *_ in found]
    for profile, times in totals.values():
        plan.counts += profile.counts * times
    if memory is not None:
        plan.split(memory)
    elif plan.order:
        plan.chunks = [Chunk(plan.order, plan.entries[0], sum(plan.rows), sum(plan.held))]
    return plan


# Runs that are made between two writes where the wave does not run.
HOOKED_RUNS = 32


def unplanned(frame: Frame, runs: Sequence[Run]) -> Plan:
    """All runs in the order of their first layer, none left out: for hooked forwards."""
    plan = Plan(frame, runs, [run.patches for run in runs], list(range(len(runs))))
    plan.counts = np.zeros((frame.n_layers, len(COUNTED)), dtype=np.int64)
    first = [min(patch.layer for patch in run.patches) for run in runs]
    plan.order = sorted(range(len(runs)), key=first.__getitem__)
    plan.rows, plan.held = [0] * len(runs), [0] * len(runs)
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
        profile = profile_of(frame, steps)
        return "dead" if profile is None else profile._replace(patched=_patched(frame, patches))
    unread = any(
        mask or (patch.pos is not None and max(patch.pos) >= frame.n_pos)
        for patch, mask in zip(
            patches, live_masks(frame, patches, example, trim=False), strict=True
        )
    )
    return "dead" if unread else "null"


def _patched(frame: Frame, patches: Sequence[PlannedPatch]) -> int:
    """Bytes that a branch's patches take: of every entry its place, and in one layer the values
    of single heads."""
    places, values = 0, [0] * frame.n_layers
    for patch in patches:
        entries = frame.n_pos if patch.pos is None else len(patch.pos)
        if patch.site in BY_ENTRY:
            site = SITES[patch.site]
            n_heads = frame.n_kv_heads if site.is_per_kv_head else frame.n_heads
            entries *= n_heads if patch.columns is None else len(patch.columns)
            width = frame.n_pos if site.axes[-1] == "key_pos" else frame.d_model
            values[patch.layer] += 4 * entries * width * frame.itemsize
        elif patch.columns is not None:
            entries *= len(patch.columns)
        places += PLACE_BYTES * entries
    return places + max(values)


# What one patched entry takes beside its value: where it is, as lists and as arrays.
PLACE_BYTES = 160


def live_steps(
    frame: Frame, patches: Sequence[PlannedPatch], example: int
) -> list[tuple[int, int, str, int]]:
    """The live patches of one branch as `profile_of` takes them."""
    return [
        (patch.layer, STAGE[patch.site], SITES[patch.site].reach, mask)
        for patch, mask in zip(patches, live_masks(frame, patches, example), strict=True)
        if mask
    ]
