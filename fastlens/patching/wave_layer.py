"""One layer of the wave: where runs join, what is patched, and which rows each product sees."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.components.attention import AbstractAttention
from fastlens.components.rows import (
    finished_qkv,
    mlp_output,
    output_of_heads,
    projected_heads,
    projections,
    read,
    result_of_heads,
    written,
)
from fastlens.kernels.reference import score_rows
from fastlens.ops.attention_sinks import pattern_from
from fastlens.ops.patch_sites import patch_sites_
from fastlens.ops.suffix_attention import suffix_attention
from fastlens.patching.codes import PlacedCodes
from fastlens.patching.frame import Blocks, Frame
from fastlens.patching.pack import Pack, regrouped, spans_of
from fastlens.patching.plan import LEAST_MLP_ROWS
from fastlens.patching.sites import CHANGING_KEYS, SITES
from fastlens.patching.sources import Source, applied
from fastlens.patching.uses import ChunkUse, Entries
from fastlens.patching.wave_codes import patch_codes

# Keys or values that some patched rows of patterns gather at a time, bytes.
PATTERN_BYTES = 24 * 2**20
# Hidden activations of one block of the MLP, bytes.
HIDDEN_BYTES = 48 * 2**20


@runtime_checkable
class Surroundings(Protocol):
    """What a layer needs of its chunk and wave."""

    pack: Pack
    stem_of: Int[Tensor, " branch"]
    key_mask: Bool[Tensor, "branch pos"] | None
    needed: Bool[Tensor, " pos"]

    @property
    def frame(self) -> Frame:
        """What the plan was made for."""
        ...

    @property
    def sources(self) -> list[Source]:
        """What `PlannedPatch.value` counts."""
        ...

    @property
    def codes(self) -> Sequence[PlacedCodes]:
        """What `PlannedPatch.codes` counts."""
        ...

    @property
    def blocks(self) -> Blocks:
        """How much some products hold at a time."""
        ...

    @property
    def n_all_pos(self) -> int:
        """Positions of the prompts."""
        ...

    @property
    def n_stems(self) -> int:
        """Branches of base runs and other prompts."""
        ...

    @property
    def stem(self) -> Any:
        """Masks and positions."""
        ...


class WaveLayer:
    """One layer of one wave: its rows from the stream before it to the stream behind it.

    Attributes:
        rows: Every tensor over the packed rows that is wanted further on, by name.
    """

    def __init__(self, wave: Surroundings, use: ChunkUse, layer: int, block: Any, counts: Tensor):
        self.wave = wave
        self.frame = wave.frame
        self.use = use
        self.layer = layer
        self.block = block
        self.attn: AbstractAttention = block.attn
        self.counts = counts
        self.is_last = layer == wave.frame.n_layers - 1
        self.rows: dict[str, Tensor] = {}

    @property
    def pack(self) -> Pack:
        """Which packed row is whose, as of now."""
        return self.wave.pack

    def run(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row_after d_model"]:
        """The stream behind the layer, of the rows that are in the pack then."""
        self.rows = {"x": x}
        # Its memory is free as soon as nothing reads it any more.
        del x
        self._join("resid_pre")
        self._patch_rows("resid_pre", "x")
        in_stream = self.pack.own.clone()
        self._project()
        self._attend(in_stream)
        self._write_attention()
        if not self.frame.is_attn_only:
            self._mlp(in_stream)
        self._join("resid_post")
        self._patch_rows("resid_post", "x")
        return self.rows["x"]

    # -- who patches what --------------------------------------------------------------------

    def _steps(self, site: str) -> list[Entries]:
        at_stage = self.use.entries.get((self.layer, SITES[site].stage))
        return at_stage.get(site, []) if at_stage else []

    def _entries(self, site: str) -> list[Entries]:
        return [entries for entries in self._steps(site) if entries.codes is None]

    def place(self, entries: Entries) -> tuple[Tensor, Tensor, Tensor | None]:
        """Branch, position and column of each entry."""
        device = self.pack.table.device
        branch = torch.from_numpy(entries.branch).to(device) + self.wave.n_stems
        pos = torch.from_numpy(entries.pos).to(device)
        column = entries.column
        return branch, pos, None if column is None else torch.from_numpy(column).to(device)

    def _join(self, *sites: str) -> None:
        """Give the branches that patch here rows of their own to patch."""
        wanted = None
        for site in sites:
            for entries in self._entries(site):
                branch, pos, _ = self.place(entries)
                mask = self.pack.mask(branch, pos)
                wanted = mask if wanted is None else wanted | mask
        if wanted is not None:
            self.own(wanted)

    def own(self, wanted: Bool[Tensor, "branch pos"]) -> None:
        """Give branches rows of their own, copies of what they had."""
        copied = self.pack.missing(wanted)
        if len(copied):
            for name, rows in self.rows.items():
                self.rows[name] = torch.cat([rows, rows.index_select(0, copied)])

    def _new_value(
        self, site: str, entries: Entries, like: Tensor, read: Callable[[Tensor], Tensor]
    ) -> Any:
        """The value the source gives; ``read(branches)`` are other branches' values there.

        Args:
            like: Any number of values of the site.
        """
        source = self.wave.sources[entries.value]
        branch, _, _ = self.place(entries)
        example = self.pack.example[branch]
        if source.reads_other:
            batch = self.frame.batch
            return source.of_examples(lambda one: read(batch + one), example, batch)
        frame = self.frame
        sizes = {
            **dict.fromkeys(("pos", "query_pos", "key_pos"), self.wave.n_all_pos),
            "head": frame.n_kv_heads if SITES[site].is_per_kv_head else frame.n_heads,
            "neuron": frame.d_mlp,
            "width": like.shape[-1],
            "batch": frame.batch,
        }
        new = source.of_entries(site, self.layer, entries, example, sizes, like)
        if not isinstance(new, Tensor):
            return new
        if SITES[site].axes[-1] == "key_pos":
            if source.kind == "cache" and entries.keys is not None:
                return new[:, list(entries.keys)]
            return new
        # Whole rows are [entry, column, width]; sites without columns have one.
        return new.reshape(len(example), *like.shape[1:])

    def _patch_rows(self, site: str, name: str) -> None:
        """Patch a site of whole rows, which go by ``name``: the activation, and codes of it."""
        for (_, number), steps in itertools.groupby(
            self._steps(site), key=lambda entries: (entries.turn, entries.codes)
        ):
            if number is None:
                rows = self.rows[name]
                self._patch(site, rows.unsqueeze(1) if rows.ndim == 2 else rows, list(steps))
            else:
                patch_codes(self, name, self.wave.codes[number], list(steps))

    def _patch(
        self,
        site: str,
        rows: Tensor,
        steps: list[Entries] | None = None,
        some: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Write every patch of a site into its packed rows ``[row, column, width]``.

        Args:
            steps: Which patches, if not all.
            some: None if ``rows`` are all packed rows. Else where each packed row stands in them,
                and which packed rows are to be patched.
        """
        for entries in self._entries(site) if steps is None else steps:
            branch, pos, column = self.place(entries)
            if some is not None:
                here = some[1][self.pack.table[branch, pos]]
                if not bool(here.any()):
                    continue
                entries = entries.only(here.cpu().numpy())
                branch, pos, column = self.place(entries)

            def at(of: Tensor, pos: Tensor = pos, column: Tensor | None = column) -> Any:
                row = self.pack.table[of, pos]
                row = row if some is None else some[0][row]
                return (row,) if column is None else (row, column)

            # Of what is patched, only the dtype and the lengths of its axes are asked for.
            like = rows[:1] if column is None else rows[:1, 0]
            new = self._new_value(site, entries, like, lambda of, at=at: rows[at(of)])
            _write(rows, at(branch), new, entries.mode)

    def _patch_by_entry(
        self, site: str, value: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Patch a site whose (row, head) values are computed for the purpose.

        Args:
            value: ``value(branch, pos, head)`` before any patch.

        Returns: branch, position, head and patched value of each entry; None if there is none.
        """
        groups = self._entries(site)
        if not groups:
            return None
        n_pos, n_heads = self.frame.n_pos, self.frame.n_heads
        codes = []
        for entries in groups:
            branch, pos, head = self.place(entries)
            assert head is not None
            codes.append((branch * n_pos + pos) * n_heads + head)
        every = torch.cat(codes).unique()
        branch, pos, head = every // n_heads // n_pos, every // n_heads % n_pos, every % n_heads
        values = value(branch, pos, head)
        for entries, code in zip(groups, codes, strict=True):
            where = torch.searchsorted(every, code)
            at_pos, at_head = pos[where], head[where]
            keys = torch.arange(values.shape[-1], device=values.device)
            if entries.keys is not None:
                # Maybe none: keys behind the last position that matters.
                kept = [key for key in entries.keys if key < n_pos]
                keys = torch.tensor(kept, dtype=torch.long, device=keys.device)
            at = where[:, None], keys

            def read(of: Tensor, pos: Tensor = at_pos, head: Tensor = at_head,
                     keys: Tensor = keys) -> Tensor:  # fmt: skip
                return value(of, pos, head)[:, keys]

            new = self._new_value(site, entries, values[at], read)
            values[at] = applied(values[at], new, entries.mode)
        return branch, pos, head, values

    # -- attention ---------------------------------------------------------------------------

    def _project(self) -> None:
        """Queries, keys and values of all rows; of the last layer, queries only where needed."""
        attn, cfg, pack = self.attn, self.attn.cfg, self.pack
        x = self.rows["x"]
        h = h_qk = read(self.block, "ln1", x)
        positions = self.wave.stem.shortformer
        if positions is not None:
            h_qk = h + positions[self.wave.stem_of[pack.branch], pack.pos]
        self.counts[0] = len(pack)
        if self.is_last:
            wanted = self.wave.needed[pack.pos].nonzero()[:, 0]
            self.counts[1] = len(wanted)
            q = h.new_zeros(len(pack), cfg.n_heads, cfg.d_head)
            (q[wanted],) = projections(attn, h_qk[wanted], "q")
            if h_qk is h:
                k, v = projections(attn, h, "kv")
            else:
                (k,), (v,) = projections(attn, h_qk, "k"), projections(attn, h, "v")
        elif h_qk is h:
            self.counts[1] = len(pack)
            q, k, v = projections(attn, h, "qkv")
        else:
            self.counts[1] = len(pack)
            q, k = projections(attn, h_qk, "qk")
            (v,) = projections(attn, h, "v")
        self.rows |= {"q": q, "k": k, "v": v}
        self._join("attn_in", "q_input", "k_input", "v_input")
        self._patch_inputs()
        self._join("q", "k", "v")
        for name in ("q", "k", "v"):
            self._patch(name, self.rows[name])
        rotary_pos = self.wave.stem.rotary_pos[self.wave.stem_of[pack.branch], pack.pos]
        finished = finished_qkv(attn, self.rows["q"], self.rows["k"], self.rows["v"], rotary_pos)
        self.rows |= dict(zip(("q", "k", "v"), finished, strict=True))
        self._join("rot_q", "rot_k")
        self._patch("rot_q", self.rows["q"])
        self._patch("rot_k", self.rows["k"])

    def _patch_inputs(self) -> None:
        """What single heads read: patched, normalised and projected for those heads alone."""
        x, pack, wave = self.rows["x"], self.pack, self.wave

        def stream(branch: Tensor, pos: Tensor, head: Tensor) -> Tensor:
            return x[pack.table[branch, pos]]

        inputs = {"attn_in": "qkv", "q_input": "q", "k_input": "k", "v_input": "v"}
        for site, names in inputs.items():
            patched = self._patch_by_entry(site, stream)
            if patched is None:
                continue
            branch, pos, head, value = patched
            h = read(self.block, "ln1", value)
            rows = pack.table[branch, pos]
            for name in names:
                seen = h
                if wave.stem.shortformer is not None and name != "v":
                    seen = h + wave.stem.shortformer[wave.stem_of[branch], pos]
                self.rows[name][rows, head] = projected_heads(self.attn, seen, name, head)

    def _attend(self, in_stream: Tensor) -> None:
        """Attention of every row whose output differs from the base run's, and is needed."""
        pack = self.pack
        outputs = self._rows_after(in_stream)
        spans = spans_of(outputs)
        seen = [self.frame.scores_between(span.start, span.stop) for span in spans]
        self.counts[4] = sum(n * len(s.branches) for n, s in zip(seen, spans, strict=True))
        q, k, v = (self.rows[name] for name in ("q", "k", "v"))
        before = pack.table
        rest = spans, self.attn.rule, self.wave.key_mask, self.attn.sinks
        z = suffix_attention(q, k, v, before, *rest)
        self.wave.pack, copied = regrouped(pack, spans, self.frame.batch)
        x = self.rows["x"].index_select(0, copied)
        self.rows = {"x": x, "z": z}
        self._join("attn_scores", "pattern")
        if self._entries("attn_scores") or self._entries("pattern"):
            self._patch_pattern(q, k, v, before)

    def _rows_after(self, in_stream: Tensor) -> Tensor:
        """Which rows attention changes: those whose query or stream changed, and all that see a
        changed key or value."""
        pack = self.pack
        changed_keys = in_stream.clone()
        for site in CHANGING_KEYS:
            for entries in self._entries(site):
                branch, pos, _ = self.place(entries)
                changed_keys[branch, pos] = True
        if self.frame.is_causal:
            after = changed_keys.cumsum(1) > 0
        else:
            after = changed_keys.any(1, keepdim=True).expand_as(changed_keys)
        # Rows that only a key patch made own lie after it anyway.
        after = after | pack.own
        return after & self.wave.needed if self.is_last else after

    def _patch_pattern(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> None:
        """Rows of scores and patterns that are patched: made one by one, their z put in place.

        Args:
            q, k, v, table: Of the pack before attention, which holds every key.
        """
        wave, rule, n_heads = self.wave, self.attn.rule, self.attn.cfg.n_heads
        group = n_heads // self.frame.n_kv_heads
        # Every entry gathers all keys of its head: so many at a time.
        most = min(PATTERN_BYTES, wave.blocks.pattern)
        size = max(1, most // (table.shape[1] * k.shape[2] * k.element_size()))

        def scores(branch: Tensor, pos: Tensor, head: Tensor) -> Tensor:
            parts = zip(*(t.split(size) for t in (branch, pos, head)), strict=True)
            return torch.cat([some_scores(*part) for part in parts])

        def some_scores(branch: Tensor, pos: Tensor, head: Tensor) -> Tensor:
            mask = None if wave.key_mask is None else wave.key_mask[branch]
            keys = _gathered(k, table[branch], head // group)
            return score_rows(q[table[branch, pos], head], keys, rule, pos, head, n_heads, mask)

        def mix(*entries: Tensor) -> None:
            for branch, pos, head, pattern in zip(*(t.split(size) for t in entries), strict=True):
                values = _gathered(v, table[branch], head // group)
                z = torch.einsum("es,esd->ed", pattern.to(values.dtype), values)
                self.rows["z"][self.pack.table[branch, pos], head] = z

        patched = self._patch_by_entry("attn_scores", scores)
        by_scores: dict[tuple[int, ...], Tensor] = {}
        if patched is not None:
            place, patterns = patched[:3], self._softmax(patched[3], patched[2])
            places = zip(*(part.tolist() for part in place), strict=True)
            by_scores = dict(zip(places, patterns, strict=True))
            mix(*place, patterns)

        def pattern(branch: Tensor, pos: Tensor, head: Tensor) -> Tensor:
            rows = self._softmax(scores(branch, pos, head), head)
            if by_scores:
                places = zip(branch.tolist(), pos.tolist(), head.tolist(), strict=True)
                for i, place in enumerate(places):
                    rows[i] = by_scores.get(place, rows[i])
            return rows

        patched = self._patch_by_entry("pattern", pattern)
        if patched is not None:
            mix(*patched)

    def _softmax(self, scores: Tensor, head: Tensor) -> Tensor:
        sinks = self.attn.sinks
        return pattern_from(scores, None if sinks is None else sinks[head])

    def _write_attention(self) -> None:
        """Heads' outputs into the stream: z, result, attn_out and resid_mid."""
        self._join("z")
        self._patch_rows("z", "z")
        self._join("result")
        extra = self._patch_result()
        self.counts[2] = len(self.pack)
        out = output_of_heads(self.attn, self.rows.pop("z"))
        if extra is not None:
            rows, value = extra
            out.index_add_(0, rows, value)
        self.rows["attn_out"] = written(self.block, "ln1", out)
        self._join("attn_out")
        self._patch_rows("attn_out", "attn_out")
        if not self.frame.is_parallel:
            # Attention gathered these rows, so nobody else holds them.
            self.rows["x"].add_(self.rows.pop("attn_out"))
            self._join("resid_mid")
            self._patch_rows("resid_mid", "x")

    def _patch_result(self) -> tuple[Tensor, Tensor] | None:
        """Single heads' writes: taken out of z, patched, and handed back to be added."""
        z, pack = self.rows["z"], self.pack

        def result(branch: Tensor, pos: Tensor, head: Tensor) -> Tensor:
            return result_of_heads(self.attn, z[pack.table[branch, pos], head], head)

        patched = self._patch_by_entry("result", result)
        if patched is None:
            return None
        branch, pos, head, value = patched
        rows = pack.table[branch, pos]
        z[rows, head] = 0.0
        return rows, value

    # -- MLP ---------------------------------------------------------------------------------

    def _mlp(self, in_stream: Tensor) -> None:
        """The MLP's output into the stream; in a parallel block, only where its input changed."""
        inside = ("mlp_in", "mlp_pre", "mlp_pre_linear", "mlp_mid", "mlp_post")
        self._join(*inside)
        pack, x = self.pack, self.rows["x"]
        patched = torch.zeros(len(pack), dtype=torch.bool, device=x.device)
        for site in inside:
            for entries in self._entries(site):
                branch, pos, _ = self.place(entries)
                patched[pack.table[branch, pos]] = True
        computed = torch.ones_like(patched)
        if self.frame.is_parallel:
            computed = in_stream[pack.branch, pack.pos] | patched
        self.counts[3] = int(computed.sum())
        most = min(HIDDEN_BYTES, self.wave.blocks.hidden)
        size = max(LEAST_MLP_ROWS, most // self.frame.hidden_bytes)
        if not (self.frame.is_parallel or self._steps("mlp_out") or bool(patched.any())):
            for rows in x.split(size):
                rows.add_(self._mlp_rows(rows, None, False))
            return
        out = torch.empty_like(x)
        if len(pack) <= size and bool(computed.all()):
            out = self._mlp_rows(x, None, bool(patched.any()))
        else:
            plain = (computed & ~patched).nonzero()[:, 0]
            for rows in plain.split(size):
                out[rows] = self._mlp_rows(x[rows], None, False)
            self._mlp_patched(x, out, patched.nonzero()[:, 0], size)
            if not bool(computed.all()):
                kept = (~computed).nonzero()[:, 0]
                base = pack.table[pack.example[pack.branch[kept]], pack.pos[kept]]
                out[kept] = out[base]
        self.rows["mlp_out"] = out
        self._join("mlp_out")
        self._patch_rows("mlp_out", "mlp_out")
        x = self.rows["x"]
        if self.frame.is_parallel:
            x = x + self.rows.pop("attn_out")
        self.rows["x"] = x + self.rows.pop("mlp_out")

    def _mlp_patched(self, x: Tensor, out: Tensor, rows: Tensor, size: int) -> None:
        """Rows patched inside the MLP, a block at a time, each with the source rows it reads."""
        pack, batch = self.pack, self.frame.batch
        for part in rows.split(size):
            every = part
            if self.frame.has_source:
                others = torch.arange(batch, 2 * batch, device=x.device)
                sources = pack.table[others][:, pack.pos[part].unique()].flatten()
                # Of the last layer only some rows are left.
                every = torch.cat([part, sources[sources >= 0]]).unique()
            local = torch.full((len(pack),), -1, dtype=torch.long, device=x.device)
            local[every] = torch.arange(len(every), device=x.device)
            is_part = torch.zeros(len(pack), dtype=torch.bool, device=x.device)
            is_part[part] = True
            found = self._mlp_rows(x[every], (local, is_part), True)
            out[part] = found[local[part]]

    def _mlp_rows(self, x: Tensor, some: tuple[Tensor, Tensor] | None, is_patched: bool) -> Tensor:
        """What the MLP writes for these rows; ``some`` as in `_patch`."""
        block = self.block
        if is_patched and self._entries("mlp_in"):
            # The stream itself is not patched, only what the MLP reads of it.
            x = x.clone()
            self._patch("mlp_in", x.unsqueeze(1), some=some)
        h = read(block, "ln2", x)

        def edit(site: str, activation: Tensor) -> None:
            self._patch(site, activation.unsqueeze(2), some=some)

        return written(block, "ln2", mlp_output(block.mlp, h, edit if is_patched else None))


def _write(rows: Tensor, where: tuple[Tensor, ...], new: Any, mode: str) -> None:
    """Patch places of packed rows, each at most once, with a number or a value each.

    Args:
        where: The places' index along each of the first axes.
    """
    if not isinstance(new, Tensor):
        if mode != "replace":
            # Done here, where a number is not rounded to 16 bits before it is used.
            new, mode = applied(rows[where], new, mode), "replace"
        elif new == 0:
            new, mode = None, "zero"
        else:
            new = rows.new_tensor(new)
    patch_sites_(rows, torch.stack(where, 1), new, mode, is_checked=True)


def _gathered(
    x: Float[Tensor, "row head d_head"],
    rows: Int[Tensor, "entry pos"],
    head: Int[Tensor, " entry"],
) -> Float[Tensor, "entry pos d_head"]:
    """Each entry's keys or values of its own head."""
    return x[rows, head[:, None]]
