"""Copies of activations from a GPU to the host that do not make the run wait."""

from typing import Any

import torch
from torch import Tensor


class Copies:
    """Copies into pinned memory, in flight until `finish`.

    A copy of memory that nobody else can write to goes on a stream of its own, beside the run. One
    of memory that the run goes on with stays in the run's stream: a later hook may write there in
    place, and what is kept is what was there before. Neither makes the host wait. Between other
    pairs of devices it is an ordinary copy. Not run on a GPU.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._devices: set[torch.device] = set()

    def to(self, tensor: Tensor, device: torch.device | str, is_owned: bool) -> Tensor:
        """The tensor on that device; not to be read before `finish`.

        Args:
            is_owned: Whether its memory is a copy's own.
        """
        source = tensor.device
        if source.type != "cuda" or torch.device(device).type != "cpu":
            return tensor.to(device)
        try:
            kept = torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError:
            # No more of it can be had.
            return tensor.to(device)
        self._devices.add(source)
        if not is_owned:
            return kept.copy_(tensor, non_blocking=True)
        if source not in self._streams:
            self._streams[source] = torch.cuda.Stream(source)
        stream = self._streams[source]
        stream.wait_stream(torch.cuda.current_stream(source))
        with torch.cuda.stream(stream):
            kept.copy_(tensor, non_blocking=True)
        # Its memory is not given out again before the copy is made.
        tensor.record_stream(stream)
        return kept

    def finish(self) -> None:
        """Wait until every copy is there."""
        for stream in self._streams.values():
            stream.synchronize()
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        self._devices.clear()
