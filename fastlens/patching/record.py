"""What identifies a sweep in a folder, and how it was cut up there."""

from dataclasses import replace
from typing import Any

import torch

from fastlens.errors import SourceError
from fastlens.patching.fingerprint import config_fingerprint, weights_fingerprint
from fastlens.patching.metrics import Metric
from fastlens.patching.query import SweepPlan
from fastlens.patching.sources import Source
from fastlens.patching.traffic import Passes, alone


def key_of(query: SweepPlan) -> dict[str, Any]:
    """What the values of a sweep depend on: a folder that holds another key is refused.

    A Python function cannot be compared, so a metric is known by its name and by what it says of
    logits that are drawn from a fixed seed.
    """
    prompts = query.prompts
    codes = {"codes": [codes.record() for codes in query.codes]} if query.codes else {}
    return codes | {
        "clean_tokens": prompts.clean.tolist(),
        "corrupted_tokens": prompts.corrupted.tolist(),
        "attention_mask": None if prompts.mask is None else prompts.mask.tolist(),
        "direction": query.direction,
        "runs": _digest([[run.cell, *run.patches] for run in query.runs]),
        "axes": {axis: len(query.grid.labels[axis]) for axis in query.grid.axes},
        "sites": query.grid.named,
        "sources": [_source(source) for source in query.sources],
        "metrics": [_metric(query, m) for m in range(len(query.readings))],
        "dtype": str(query.model.cfg.dtype),
        "config": config_fingerprint(query.model.cfg),
        "weights": weights_fingerprint(query.model),  # type: ignore[arg-type]
    }


def layout_of(query: SweepPlan) -> dict[str, Any]:
    """How this sweep is cut up, and what its bytes depend on beside its key."""
    # Where there was something to choose: it is said in the scores, whose bytes stay the same.
    passes = {"passes": query.passes.record()} if query.passes.choices else {}
    return passes | {
        "strategy": query.strategy.name,
        "chunks": [chunk.runs for chunk in query.plan.chunks],
        "memory": query.memory,
        "threads": torch.get_num_threads(),
        "seed": query.seed,
        "torch": str(torch.__version__),
    }


def plan_from_layout(query: SweepPlan, layout: dict[str, Any]) -> SweepPlan:
    """The plan cut as the folder's first run cut it, so that resuming ends in the same bytes.

    Raises: SourceError if that run used another strategy.
    """
    if layout["strategy"] != query.strategy.name:
        raise SourceError(
            f"the folder's sweep was begun as {layout['strategy']!r}, and now it would run as "
            f"{query.strategy.name!r} ({query.strategy.because or 'no hooks are live'}). Use "
            f"another folder."
        )
    plan, memory = query.plan, int(layout["memory"])
    query = replace(query, memory=memory)
    if not query.strategy.is_wave:
        return query
    stored = [run for runs in layout["chunks"] for run in runs]
    if sorted(stored) != sorted(plan.order):
        raise SourceError(
            f"the folder's sweep computes {len(stored)} runs and this one {len(plan.order)}: it "
            f"was planned by another version of fastlens. Use another folder."
        )
    plan = replace(plan, chunks=[plan.part(runs) for runs in layout["chunks"]])
    if plan.order:
        # What products hold at a time shows in the last bits, too.
        plan.blocks = plan.blocks_within(memory)
    passes = Passes.of_record(layout["passes"]) if "passes" in layout else alone(plan)
    return replace(query, plan=plan, passes=passes)


def _source(source: Source) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": source.kind, "number": source.number}
    if source.tensor is not None:
        record["tensor"] = _tensor(source.tensor)
    if source.cache is not None:
        record["cache"] = {name: _tensor(source.cache[name]) for name in sorted(source.cache)}
    if source.permutation is not None:
        record["permutation"] = source.permutation.tolist()
    return record


def _metric(query: SweepPlan, number: int) -> dict[str, Any]:
    reading = query.readings[number]
    record: dict[str, Any] = {"name": reading.name, "normalize": reading.normalize}
    metric = reading.metric
    if isinstance(metric, Metric):
        assert reading.positions is not None
        answers = [torch.as_tensor(answer).tolist() for answer in metric.answers]
        return record | {"answers": answers, "positions": list(reading.positions)}
    generator = torch.Generator().manual_seed(0)
    shape = (query.prompts.batch, query.prompts.n_pos, query.model.cfg.d_vocab_out)
    if shape[0] * shape[1] * shape[2] <= 2**26:
        logits = torch.randn(shape, generator=generator)
        try:
            value = torch.as_tensor(metric(logits))
        except Exception as error:
            # Metrics may look up things that random logits do not have.
            return record | {"on_random_logits": type(error).__name__}
        return record | {"on_random_logits": value.double().tolist()}
    return record


def _tensor(tensor: torch.Tensor) -> str:
    holder = torch.nn.Module()
    holder.register_buffer("tensor", tensor.detach())
    return weights_fingerprint(holder)


def _digest(value: Any) -> str:
    import hashlib

    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
