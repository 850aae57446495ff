"""What the planner knows of model and prompts, and what products may hold at a time. No torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeAlias

from fastlens.patching.runs import PlannedPatch

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
        is_rotary: Whether queries and keys are rotated.
        experts_width: Neurons of all experts that a row passes; 0 where there are none.
        n_experts: Experts of a layer, for each of which the router gives a row one number.
        d_shared: Neurons of the expert that all rows pass.
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
    is_rotary: bool = False
    experts_width: int = 0
    n_experts: int = 0
    d_shared: int = 0

    @property
    def batch(self) -> int:
        """Examples of every run."""
        return len(self.first_difference)

    @cached_property
    def needed_mask(self) -> int:
        """``needed`` as bits."""
        return mask_of(self.needed)

    @property
    def row_bytes(self) -> int:
        """What one packed row takes at its widest, in attention: the stream before and behind it,
        queries, keys and values, rotated ones beside them, and outputs."""
        heads = 2 * self.n_heads + 2 * self.n_kv_heads
        heads += (self.n_heads + self.n_kv_heads) * self.is_rotary
        return self.itemsize * (2 * self.d_model + heads * self.d_head) + 128

    @property
    def joining_bytes(self) -> int:
        """What one packed row takes beside that where runs join at queries, keys or values."""
        return self.itemsize * (self.n_heads + 2 * self.n_kv_heads) * self.d_head

    @property
    def branch_bytes(self) -> int:
        """What the tables of one run of one example take."""
        return 40 * self.n_pos + 256

    @property
    def hidden_bytes(self) -> int:
        """Hidden activations of one row of an MLP."""
        # Experts compute one after the other.
        return max(self.d_mlp, self.d_shared) * (2 + self.is_gated) * self.itemsize

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


class Blocks(NamedTuple):
    """What is held for some rows at a time, at most, in bytes.

    Attributes:
        hidden: Hidden activations of the MLP; about as much again while they are made.
        pattern: Keys or values that patched rows of patterns gather.
        logits: Logits and what metrics make of them.
        codes: Codes of autoencoders.
    """

    hidden: int = 48 * 2**20
    pattern: int = 24 * 2**20
    logits: int = 64 * 2**20
    codes: int = 48 * 2**20

    def largest(
        self, most_hidden: int, most_logits: int, has_patterns: bool, has_codes: bool
    ) -> int:
        """Bytes that any of them needs: they are held one after the other.

        Args:
            most_hidden, most_logits: What there is of hidden activations and logits.
        """
        return max(
            2 * min(self.hidden, most_hidden),
            3 * self.pattern * has_patterns,
            3 * min(self.logits, most_logits) // 2,
            2 * self.codes * has_codes,
        )


# Where memory is ample.
BLOCKS = Blocks()
