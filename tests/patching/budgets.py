"""Budgets that cut plans as a test wants them, and a model whose weights pretend to be streamed."""

import contextlib
from dataclasses import replace

from torch import nn

from fastlens.patching.plan import Plan


def memory_for(plan: Plan, n_bytes: int) -> int:
    """The smallest budget that leaves the runs under way ``n_bytes``."""
    n_bytes = max(n_bytes, max(plan.held))
    low, high = plan.least_bytes, 2 * plan.least_bytes + 16 * n_bytes + 2**32
    while low < high:
        middle = (low + high) // 2
        cut = replace(plan, blocks=plan.blocks_within(middle))
        n_runs = n_bytes * len(plan.order) // sum(plan.held)
        if middle >= cut.taken(n_runs, n_bytes):
            high = middle
        else:
            low = middle + 1
    return low


def memory_for_rows(plan: Plan, rows: int) -> int:
    """The smallest budget under which so many rows, of the plan's mean size, go together."""
    return memory_for(plan, rows * sum(plan.held) // sum(plan.rows))


class FakeStreaming:
    """`model.streaming` as a sweep sees it."""

    def __init__(self, model, room, block_bytes=10**9):
        self.block_bytes = [block_bytes] * model.cfg.n_layers
        self._room = room
        self.reserved = []
        self.inside = 0

    def room(self):
        return self._room

    def traced(self, activation):
        return activation

    def run(self, *args):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def reserve(self, n):
        self.reserved.append(n)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def streamed(model, room=2**31, block_bytes=10**9):
    """The model, as if its weights were read anew in each pass."""
    model.streaming = FakeStreaming(model, room, block_bytes)
    return model


class CountedDict(dict):
    """A module's parameters; notes who was read, in turn."""

    def __init__(self, entries, name, seen):
        super().__init__(entries)
        self.name, self.seen = name, seen

    def __getitem__(self, key):
        if not self.seen or self.seen[-1] != self.name:
            self.seen.append(self.name)
        return super().__getitem__(key)


def reads_of(model: nn.Module) -> list[str]:
    """From now on filled with the parts (``blocks.3``, ``unembed``) whose weights are read."""
    seen: list[str] = []
    for path, module in model.named_modules():
        if module._parameters:
            parts = path.split(".")
            name = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
            module.__dict__["_parameters"] = CountedDict(module._parameters, name, seen)
    return seen
