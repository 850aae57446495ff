"""In which order chunks and layers are gone through, by what is read and written. Integers only.

Chunk by chunk, every chunk reads the weights of the layers that it passes. Layer by layer, a group
of chunks shares each layer's weights, and the rows of those that wait lie in memory, or are written
to a disk (of a model on a GPU: to the host's memory) and read again in every layer. The products
are the same either way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fastlens.memory import said_bytes
from fastlens.patching.plan import Chunk, Plan

BY_CHUNK = "chunk by chunk"
BY_LAYER = "layer by layer"
IN_MEMORY, ON_DISK, ON_HOST = "memory", "disk", "host memory"
# Part of the memory that chunks under way get where those that wait stay in memory beside them.
ACTIVE_SHARES = (0.75, 0.5, 0.25, 0.125)


class Means(NamedTuple):
    """What a pass over the layers costs, and where rows can wait.

    Attributes:
        weights: Bytes of each layer's weights that are read anew in every pass; empty where they
            are in memory anyway.
        away: `ON_DISK` or `ON_HOST`, where rows may wait out of memory.
        room: Bytes there.
    """

    weights: tuple[int, ...] = ()
    away: str = ON_DISK
    room: int = 0


class Choice(NamedTuple):
    """One way to go, and its price.

    Attributes:
        order: `BY_CHUNK` or `BY_LAYER`.
        where: Where the rows of waiting chunks lie; empty if none waits.
        chunks: How many.
        groups: How many.
        weights: Bytes of weights that are read more than once, each time but the first.
        rows: Bytes of rows written and read while they wait.
    """

    order: str
    where: str
    chunks: int
    groups: int
    weights: int
    rows: int

    @property
    def said(self) -> str:
        """In words."""
        return (
            f"{self.order}{f', rows in {self.where}' if self.where == IN_MEMORY else ''}"
            f"{f', rows on {self.where}' if self.where == ON_DISK else ''}"
            f"{f', rows in {self.where}' if self.where == ON_HOST else ''}: "
            f"{self.chunks:,} chunk{'s' * (self.chunks != 1)}, "
            f"weights read again {said_bytes(self.weights)}, "
            f"rows written and read {said_bytes(self.rows)}"
        )


@dataclass(frozen=True)
class Passes:
    """The passes over the layers that make all chunks.

    Attributes:
        groups: Numbers of the chunks that go through the layers together; one alone, each.
        where: Where the rows of the others of a group wait: `IN_MEMORY`, `ON_DISK`, `ON_HOST`.
        held: Predicted bytes that the sweep takes, rows that wait in memory included.
        choices: What was compared, the one taken first; empty if there was nothing to choose.
    """

    groups: tuple[tuple[int, ...], ...]
    where: str = ""
    held: int = 0
    choices: tuple[Choice, ...] = ()

    @property
    def order(self) -> str:
        """`BY_LAYER` if any chunks go together."""
        return BY_LAYER if any(len(group) > 1 for group in self.groups) else BY_CHUNK

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "choices": [list(choice) for choice in self.choices]}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Passes":
        """What `record` gave."""
        return cls(
            tuple(tuple(group) for group in record["groups"]),
            record["where"],
            record["held"],
            tuple(Choice(*choice) for choice in record["choices"]),
        )

    def summary(self) -> dict[str, Any]:
        """What is kept with the scores; nothing where there was nothing to choose."""
        if not self.choices:
            return {}
        return {
            "order": self.order,
            "traffic": [choice._asdict() for choice in self.choices],
        }

    def lines(self) -> list[str]:
        """For `SweepPlan.explain`."""
        if not self.choices:
            return []
        first, *others = self.choices
        grouped = ""
        if self.order == BY_LAYER:
            n = len(self.groups)
            grouped = f" ({n:,} group{'s' * (n != 1)}, whose chunks are finished together)"
        return [f"order: {first.said}{grouped}", *(f"  not {choice.said}" for choice in others)]


def cut_and_ordered(plan: Plan, memory: int, means: Means) -> Passes:
    """Cut a plan into chunks, and choose in which order they go through the layers.

    Raises: SweepError if one run alone does not fit.
    """
    plan.split(memory)
    if len(plan.chunks) < 2 or not _read_again(plan, [[i] for i in range(len(plan.chunks))], means):
        return alone(plan)
    found = [_priced(plan, plan.chunks, [[i] for i in range(len(plan.chunks))], "", means)]
    least = plan.taken(1, max(plan.held))
    for share in ACTIVE_SHARES:
        active = plan.fixed_bytes + int((memory - plan.fixed_bytes) * share)
        if active >= least:
            chunks = plan.chunks_within(active)
            groups = groups_within(plan, chunks, memory - active)
            found.append(_priced(plan, chunks, groups, IN_MEMORY, means))
    groups = groups_within(plan, plan.chunks, means.room)
    found.append(_priced(plan, plan.chunks, groups, means.away, means))
    # Of equals the first, which has the largest chunks.
    best = min(found, key=lambda one: one[1].weights + one[1].rows)
    plan.chunks = best[0]
    by_kind: dict[tuple[str, str], Choice] = {}
    for _, choice, _ in sorted(found, key=lambda one: one[1].weights + one[1].rows):
        by_kind.setdefault((choice.order, choice.where), choice)
    by_kind.pop((best[1].order, best[1].where))
    return Passes(
        tuple(tuple(group) for group in best[2]),
        best[1].where,
        _held(plan, best[2], best[1].where),
        (best[1], *by_kind.values()),
    )


def alone(plan: Plan) -> Passes:
    """Chunk by chunk."""
    return Passes(tuple((i,) for i in range(len(plan.chunks))), "", plan.peak_bytes())


def groups_within(plan: Plan, chunks: Sequence[Chunk], room: int) -> list[list[int]]:
    """Neighbours together, as many as can wait in ``room`` bytes."""
    groups: list[list[int]] = []
    taken = 0
    for number, chunk in enumerate(chunks):
        size = plan.waiting(chunk)
        if not groups or taken + size > room:
            groups.append([])
            taken = 0
        groups[-1].append(number)
        taken += size
    return groups


def _priced(
    plan: Plan, chunks: list[Chunk], groups: list[list[int]], where: str, means: Means
) -> tuple[list[Chunk], Choice, list[list[int]]]:
    is_grouped = any(len(group) > 1 for group in groups)
    where = where if is_grouped else ""
    rows = 0
    if where in (ON_DISK, ON_HOST):
        last = plan.frame.n_layers - 1
        rows = sum(
            2 * plan.waiting(chunks[i]) * (last - chunks[i].first_layer)
            for group in groups
            if len(group) > 1
            for i in group
        )
    order = BY_LAYER if is_grouped else BY_CHUNK
    weights = _read_again(plan, groups, means, chunks)
    return chunks, Choice(order, where, len(chunks), len(groups), weights, rows), groups


def _read_again(
    plan: Plan,
    groups: Sequence[Sequence[int]],
    means: Means,
    chunks: Sequence[Chunk] | None = None,
) -> int:
    """Bytes of weights that all passes read, less those of one pass."""
    chunks = plan.chunks if chunks is None else chunks
    total, made = 0, 0
    for group in groups:
        # From where the base runs' stream was left, or from the first layer.
        total += sum(means.weights[made:])
        made = max(chunks[i].first_layer for i in group)
    return max(0, total - sum(means.weights))


def _held(plan: Plan, groups: Sequence[Sequence[int]], where: str) -> int:
    """Predicted bytes."""
    waiting = 0
    if where == IN_MEMORY:
        waiting = max(sum(plan.waiting(plan.chunks[i]) for i in group) for group in groups)
    return plan.peak_bytes() + waiting
