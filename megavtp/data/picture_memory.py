"""Memory that a loader and its workers share, in which the pictures of one batch after another lie.

New shared memory for each batch costs a worker the time in which it decodes ten pictures.
"""

import itertools
import mmap
import os
import weakref
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

_numbers = itertools.count()
_memories: weakref.WeakValueDictionary[int, "PictureMemory"] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Place:
    """A worker sends this in place of a tensor: it tells where the tensor lies."""

    memory: int  # number of the memory
    slot: int
    start: int  # bytes from the slot's first
    shape: tuple[int, ...]


class PictureMemory:
    """For each worker, ``slots`` pieces of ``size`` bytes, each of which holds the pictures of a batch.

    It is made before the workers are forked. A worker takes a free slot of its own, and the slot is free again once the
    process that the worker works for holds none of its tensors. Pages take memory once they are written to.
    """

    def __init__(self, workers: int, slots: int, size: int):
        self.slots = slots
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pages = mmap.mmap(-1, workers * slots * self.size)
        self._taken = mmap.mmap(-1, workers * slots)  # one byte for a slot, set by its worker and cleared by the other
        self._first = np.frombuffer(self._pages, np.uint8).ctypes.data  # an address that a fork does not change
        self.number = next(_numbers)
        _memories[self.number] = self

    def take(self, worker: int, size: int) -> Tensor | None:
        """Take a slot of a worker's, and return its first ``size`` bytes as they are; None if no slot is free."""
        if size > self.size:
            return None
        for slot in range(worker * self.slots, (worker + 1) * self.slots):
            if not self._taken[slot]:
                self._taken[slot] = 1
                return torch.frombuffer(self._pages, dtype=torch.uint8, count=size, offset=slot * self.size)
        return None

    def place(self, tensor: Tensor) -> Place | None:
        """Return where a tensor lies; None if that is elsewhere, or if it is not a row of bytes there."""
        start = tensor.data_ptr() - self._first
        if not 0 <= start < len(self._pages) or tensor.dtype != torch.uint8 or not tensor.is_contiguous():
            return None
        return Place(self.number, *divmod(start, self.size), tuple(tensor.shape))

    def slot(self, slot: int) -> Tensor:
        """Return the bytes of a slot that a worker has filled. The slot becomes free when their storage is released."""
        whole = np.frombuffer(self._pages, np.uint8, self.size, slot * self.size)
        weakref.finalize(whole, _free, self._taken, slot, os.getpid()).atexit = False
        return torch.from_numpy(whole)


def _free(taken: mmap.mmap, slot: int, holder: int) -> None:
    if os.getpid() == holder:  # and no process that was forked meanwhile, and lets go of a copy
        taken[slot] = 0


def at_places(places: dict[str, Place]) -> dict[str, Tensor]:
    """Return the tensors of a batch that a worker has sent as places."""
    taken = {(place.memory, place.slot) for place in places.values()}
    slots = {(memory, slot): _memories[memory].slot(slot) for memory, slot in taken}
    return {
        name: slots[place.memory, place.slot][place.start : place.start + prod(place.shape)].view(place.shape)
        for name, place in places.items()
    }
