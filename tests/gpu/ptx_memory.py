"""The two memories of a simulated block, and what may not happen in them."""

import ctypes

import numpy as np
import torch

from tests.gpu.ptx_program import PtxError


class GlobalMemory:
    """The bytes of the tensors a kernel was given, and no others.

    An access outside every tensor, one that is not aligned to its size, and two blocks writing
    one byte are errors. Addresses are the real ones; what is stored lands in the tensors.
    """

    def __init__(self, tensors: list[torch.Tensor]):
        ends: list[list[int]] = []
        for start, stop in sorted(_extent(tensor) for tensor in tensors if tensor.numel()):
            # Slices of one tensor interleave: their union is what may be touched.
            if ends and start <= ends[-1][1]:
                ends[-1][1] = max(ends[-1][1], stop)
            else:
                ends.append([start, stop])
        self.starts = np.array([start for start, _ in ends], np.int64)
        self.stops = np.array([stop for _, stop in ends], np.int64)
        self.bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * (stop - start)).from_address(start))
            for start, stop in ends
        ]
        self.writers = [np.full(len(data), -1, np.int64) for data in self.bytes]

    def _places(self, addresses: np.ndarray, size: int, what: str, text: str):
        """For each tensor touched: which of the accesses, and the bytes' offsets in it."""
        if (addresses % size).any():
            raise PtxError(f"misaligned {size}-byte global {what}: {text}")
        owners = np.searchsorted(self.starts, addresses, side="right") - 1
        if (owners < 0).any() or (addresses + size > self.stops[owners]).any():
            bad = (owners < 0) | (addresses + size > self.stops[np.maximum(owners, 0)])
            raise PtxError(
                f"out-of-bounds global {what} of {size} bytes by {int(bad.sum())} threads, the "
                f"first {int(addresses[bad][0] - self.starts[max(0, int(owners[bad][0]))])} bytes "
                f"after the start of a tensor: {text}"
            )
        for owner in np.unique(owners):
            which = np.nonzero(owners == owner)[0]
            offsets = (addresses[which] - self.starts[owner])[:, None] + np.arange(size)
            yield owner, which, offsets

    def load(self, addresses: np.ndarray, size: int, text: str) -> np.ndarray:
        """Bytes [access, size]."""
        out = np.empty((len(addresses), size), np.uint8)
        for owner, which, offsets in self._places(addresses, size, "load", text):
            out[which] = self.bytes[owner][offsets]
        return out

    def store(self, addresses: np.ndarray, data: np.ndarray, block: int, text: str) -> None:
        """Bytes [access, size], by block number ``block``."""
        for owner, which, offsets in self._places(addresses, data.shape[1], "store", text):
            writers = self.writers[owner][offsets]
            if ((writers >= 0) & (writers != block)).any():
                raise PtxError(f"two blocks store to one address: {text}")
            self.writers[owner][offsets] = block
            self.bytes[owner][offsets] = data[which]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


class SharedMemory:
    """One block's shared memory. It starts out as NaN in every float format.

    Between two barriers (an epoch) a byte that one warp writes may not be touched by another: a
    race, whatever order the warps would have run in. Only writing the same value is harmless. A
    byte that an asynchronous copy is on its way to may not be touched by anyone.
    """

    def __init__(self, size: int):
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.epoch = 1
        self.write_epoch = np.zeros(size, np.int32)
        self.writers = np.zeros(size, np.int64)  # a bit a warp
        self.read_epoch = np.zeros(size, np.int32)
        self.readers = np.zeros(size, np.int64)
        self.in_flight = np.zeros(size, np.int16)

    def _offsets(self, addresses: np.ndarray, size: int, what: str, text: str) -> np.ndarray:
        if (addresses % size).any():
            raise PtxError(f"misaligned {size}-byte shared {what}: {text}")
        if len(addresses) and (addresses.min() < 0 or addresses.max() + size > len(self.bytes)):
            raise PtxError(
                f"out-of-bounds shared {what} at {int(addresses.max())} of {len(self.bytes)}: "
                f"{text}"
            )
        return addresses[:, None] + np.arange(size)

    def load(self, addresses: np.ndarray, size: int, warps: np.ndarray, text: str) -> np.ndarray:
        """Bytes [access, size]; ``warps`` says who reads."""
        at = self._offsets(addresses, size, "load", text)
        if self.in_flight[at].any():
            raise PtxError(f"read of an asynchronous copy that was not waited for: {text}")
        mine = _bits(warps)
        if ((self.write_epoch[at] == self.epoch) & (self.writers[at] & mine == 0)).any():
            raise PtxError(f"race: read after another warp's write, no barrier between: {text}")
        stale = at[self.read_epoch[at] != self.epoch]
        self.readers[stale] = 0
        self.read_epoch[at] = self.epoch
        for warp in np.unique(warps):
            self.readers[at[warps == warp]] |= 1 << int(warp)
        return self.bytes[at]

    def store(self, addresses: np.ndarray, data: np.ndarray, warps: np.ndarray, text: str) -> None:
        """Bytes [access, size]."""
        at = self._offsets(addresses, data.shape[1], "store", text)
        if self.in_flight[at].any():
            raise PtxError(f"write over an asynchronous copy that was not waited for: {text}")
        self._claim(at, warps, text, data)
        self.bytes[at] = data
        # Within one warp a lane wins: Triton stores sums that lanes have rounded differently.
        if ((self.bytes[at] != data) & (self.writers[at] & ~_bits(warps) != 0)).any():
            raise PtxError(f"race: two warps write different values at once: {text}")

    def start_copy(self, addresses: np.ndarray, size: int, warps: np.ndarray, text: str) -> None:
        """From now on the bytes may change at any time."""
        at = self._offsets(addresses, size, "asynchronous copy", text)
        self._claim(at, warps, text)
        self.in_flight[at] += 1

    def land_copy(
        self, addresses: np.ndarray, data: np.ndarray, warps: np.ndarray, text: str
    ) -> None:
        """The bytes have arrived, for the thread that waited; for others at the next barrier."""
        at = self._offsets(addresses, data.shape[1], "asynchronous copy", text)
        self.in_flight[at] -= 1
        self._claim(at, warps, text, data)
        self.bytes[at] = data

    def _claim(
        self, at: np.ndarray, warps: np.ndarray, text: str, data: np.ndarray | None = None
    ) -> None:
        """Note who writes; an error if another warp has touched a byte in this epoch."""
        mine = _bits(warps)
        written = self.write_epoch[at] == self.epoch
        foreign = written & (self.writers[at] & ~mine != 0)
        if (foreign if data is None else foreign & (self.bytes[at] != data)).any():
            raise PtxError(f"race: two warps write, no barrier between: {text}")
        read = (self.read_epoch[at] == self.epoch) & (self.readers[at] & ~mine != 0)
        if read.any():
            raise PtxError(f"race: write after another warp's read, no barrier between: {text}")
        self.writers[at[~written]] = 0
        self.write_epoch[at] = self.epoch
        for warp in np.unique(warps):
            self.writers[at[warps == warp]] |= 1 << int(warp)


def _bits(warps: np.ndarray) -> np.ndarray:
    return (np.int64(1) << warps.astype(np.int64))[:, None]
