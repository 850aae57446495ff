"""Attention over packed rows by gathering: each branch's keys, or a shared prefix's once for all.

Branches that are runs of one prompt have the same packed rows for the keys before their first
patch. Where that prefix is long, the rows of all of them attend to it as one batch of queries over
one copy of the keys, without a mask, and then to their own keys; the two are merged by their
log-sum-exp. Else every branch's keys are gathered behind one another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.spans import Span
from fastlens.kernels.torch_attention import attention
from fastlens.kernels.torch_attention_lse import attention_lse

# Keys and values that one piece of attention gathers, bytes.
GATHER_BYTES = 24 * 2**20
# A prefix of fewer keys is not looked for.
SHARED_KEYS = 64
# Keys that need not be gathered, for each row that is merged in return.
SHARED_GAIN = 1.0


def shares_prefix(n_keys: int, n_branches: int, n_rows: int) -> bool:
    """Whether reading a prefix once for all branches pays for the merge.

    Args:
        n_keys: Keys of the prefix.
        n_branches: Branches that share it.
        n_rows: Query rows of each.
    """
    saved = n_keys * (n_branches - 1)
    return n_keys >= SHARED_KEYS and saved >= SHARED_GAIN * n_branches * n_rows


def suffix_attention(
    q: Float[Tensor, "row head d_head"],
    k: Float[Tensor, "row kv_head d_head"],
    v: Float[Tensor, "row kv_head d_head"],
    table: Int[Tensor, "branch pos"],
    spans: Sequence[Span],
    rule: AttentionRule,
    key_mask: Bool[Tensor, "branch pos"] | None = None,
    sinks: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "out_row head d_head"]:
    """See `fastlens.ops.suffix_attention.suffix_attention`."""
    # Rows are gathered as flat vectors: faster by index_select than heads are.
    flat = q.flatten(1), k.flatten(1), v.flatten(1)
    pieces = []
    for span in spans:
        mask = None if key_mask is None else key_mask[span.branches]
        some = _Some(*flat, q.shape[2], span, rule, table[span.branches], mask, sinks)
        pieces += some.attended()
    return torch.cat(pieces) if pieces else torch.empty_like(q[:0])


@dataclass
class _Some:
    """Some branches of one span.

    Attributes:
        q, k, v: Packed rows, flat.
        table, key_mask: Of these branches.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    d_head: int
    span: Span
    rule: AttentionRule
    table: Int[Tensor, "branch pos"]
    key_mask: Bool[Tensor, "branch pos"] | None
    sinks: Float[Tensor, " head"] | None = None

    def __post_init__(self) -> None:
        self.n_rows = self.span.stop - self.span.start
        self.last = self.span.stop if self.rule.causal else self.table.shape[1]
        window = self.rule.window
        if window is not None and self.span.stop <= window:
            # Every key is near enough to every row.
            self.rule = self.rule._replace(window=None)

    def only(self, which: Int[Tensor, " branch"]) -> "_Some":
        """Some of them."""
        mask = None if self.key_mask is None else self.key_mask[which]
        span = self.span._replace(branches=self.span.branches[which])
        kept = self.q, self.k, self.v, self.d_head
        return _Some(*kept, span, self.rule, self.table[which], mask, self.sinks)

    def attended(self) -> list[Float[Tensor, "row head d_head"]]:
        """Every row of every branch, in pieces."""
        parts = self.parts()
        if parts[0][0] is None:
            return [z.flatten(0, 1) for _, z in self._of(parts[0][1])]
        n_heads = self.q.shape[1] // self.d_head
        out = self.q.new_empty(len(self.table), self.n_rows, n_heads, self.d_head)
        for which, prefix in parts:
            assert which is not None
            for piece, z in self.only(which)._of(prefix):
                out[which[piece]] = z
        return [out.flatten(0, 1)]

    def _of(self, prefix: int) -> Iterator[tuple[slice, Tensor]]:
        return self.shared(prefix) if prefix else self.gathered()

    # -- which share their leading keys ---------------------------------------------------------

    def parts(self) -> list[tuple[Tensor | None, int]]:
        """Which branches go together, and how many leading keys each part reads once for all.

        None is all branches.
        """
        rule, n = self.rule, len(self.table)
        # Keys that every row of every branch sees.
        limit = self.span.start if rule.causal else self.last
        # With a window or ALiBi each row sees the prefix in its own way.
        can_share = rule.window is None and not rule.alibi
        if not (can_share and n > 1 and shares_prefix(limit, n, self.n_rows)):
            return [(None, 0)]
        length, group = self._agreement(limit)
        # Lengths of about one size are cut to the shortest of them.
        bucket = group * (limit // SHARED_KEYS + 1) + length // SHARED_KEYS
        found: list[tuple[Tensor | None, int]] = []
        rest = torch.ones(n, dtype=torch.bool, device=bucket.device)
        codes, counts = bucket.unique(return_counts=True)
        for code in codes[counts > 1].tolist():
            which = (bucket == code).nonzero()[:, 0]
            prefix = int(length[which].min())
            if shares_prefix(prefix, len(which), self.n_rows):
                if len(which) == n:
                    return [(None, prefix)]
                found.append((which, prefix))
                rest[which] = False
        if not found:
            return [(None, 0)]
        if bool(rest.any()):
            found.append((rest.nonzero()[:, 0], 0))
        return found

    def _agreement(self, limit: int) -> tuple[Int[Tensor, " branch"], Int[Tensor, " branch"]]:
        """Groups of branches with the same first key, and each one's agreement with its first.

        Returns: leading keys, of ``limit``, that are the same rows as those of the first branch
        of its group, and are padding in both or in none; the number of its group.
        """
        leading = self.table[:, :limit]
        _, group = leading[:, 0].unique(return_inverse=True)
        numbers = torch.arange(len(group), device=group.device)
        firsts = torch.full_like(numbers, len(group)).scatter_reduce(0, group, numbers, "amin")
        first = firsts[group]
        same = leading == leading[first]
        if self.key_mask is not None:
            mask = self.key_mask[:, :limit]
            same &= mask == mask[first]
        return same.cumprod(1, dtype=torch.uint8).sum(1), group

    # -- both forms -----------------------------------------------------------------------------

    def gathered(self) -> Iterator[tuple[slice, Float[Tensor, "branch pos head d_head"]]]:
        """Each branch with all keys that its rows see, in pieces that bound the gather."""
        rule, start = self.rule, self.span.start
        first = 0 if rule.window is None else max(0, start - rule.window + 1)
        each = (self.last - first) * (self.k.shape[1] + self.v.shape[1]) * self.k.element_size()
        for piece in self._pieces(each):
            table = self.table[piece]
            mask = None if self.key_mask is None else self.key_mask[piece, first : self.last]
            k, v = self._keys(table[:, first : self.last])
            inputs = self._queries(table), k, v, rule, start - first, mask
            if self.sinks is None:
                yield piece, attention(*inputs)
            else:
                z, lse = attention_lse(*inputs)
                yield piece, self._beside_sinks(z, lse.transpose(1, 2))

    def shared(
        self, prefix: int
    ) -> Iterator[tuple[slice, Float[Tensor, "branch pos head d_head"]]]:
        """All rows with the first branch's ``prefix`` leading keys, then each with its own."""
        leading = self.table[0, :prefix]
        if self.key_mask is not None:
            # The same keys are padding for all: they can be left out.
            leading = leading[self.key_mask[0, :prefix]]
        if not len(leading):
            yield from self.gathered()
            return
        k, v = self._keys(leading[None])
        everything = self.rule._replace(causal=False)
        rule, offset = everything, 0
        if self.rule.causal:
            rule, offset = self.rule, self.span.start - prefix
        own = (self.last - prefix) * (self.k.shape[1] + self.v.shape[1])
        each = (own + 2 * self.n_rows * self.q.shape[1]) * self.q.element_size()
        for piece in self._pieces(each):
            q = self._queries(self.table[piece])
            z, lse = attention_lse(q.flatten(0, 1)[None], k, v, everything)
            z, lse = z.reshape(q.shape), lse[0].T.reshape(q.shape[:3])
            if prefix < self.last:
                keys = self._keys(self.table[piece, prefix : self.last])
                mask = None if self.key_mask is None else self.key_mask[piece, prefix : self.last]
                if mask is not None and bool(mask.all()):
                    # Padding lay in the prefix: these need no mask.
                    mask = None
                own_z, own_lse = attention_lse(q, *keys, rule, offset, mask)
                own_lse = own_lse.transpose(1, 2)
                z = _merged(z, lse, own_z, own_lse)
                lse = torch.logaddexp(lse, own_lse)
            yield piece, self._beside_sinks(z, lse)

    def _beside_sinks(
        self, z: Float[Tensor, "branch pos head d_head"], lse: Float[Tensor, "branch pos head"]
    ) -> Float[Tensor, "branch pos head d_head"]:
        if self.sinks is None:
            return z
        return z * torch.sigmoid(lse - self.sinks.to(lse))[..., None].to(z.dtype)

    def _pieces(self, each: int) -> Iterator[slice]:
        size = max(1, GATHER_BYTES // max(1, each))
        for first in range(0, len(self.table), size):
            yield slice(first, first + size)

    def _queries(self, table: Int[Tensor, "branch pos"]) -> Tensor:
        rows = table[:, self.span.start : self.span.stop]
        return self.q.index_select(0, rows.reshape(-1)).view(*rows.shape, -1, self.d_head)

    def _keys(self, rows: Int[Tensor, "branch key_pos"]) -> tuple[Tensor, Tensor]:
        flat = rows.reshape(-1)
        k, v = self.k.index_select(0, flat), self.v.index_select(0, flat)
        return k.view(*rows.shape, -1, self.d_head), v.view(*rows.shape, -1, self.d_head)


def _merged(
    z: Float[Tensor, "branch pos head d_head"],
    lse: Float[Tensor, "branch pos head"],
    other_z: Float[Tensor, "branch pos head d_head"],
    other_lse: Float[Tensor, "branch pos head"],
) -> Float[Tensor, "branch pos head d_head"]:
    """Attention to all keys, from that to some of them and that to the others, if any."""
    weight = torch.sigmoid(lse - other_lse)[..., None]
    return torch.lerp(other_z.to(weight), z.to(weight), weight).to(z.dtype)


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


KERNEL = Kernel("suffix_attention", "torch SDPA over gathered keys", suffix_attention, _refuses, 10)
