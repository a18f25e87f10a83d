"""How a batch gets from a loader's worker to the process that it works for."""

import dataclasses
import errno
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from megavtp.data.picture_memory import PictureMemory, Place, at_places

# Tensors of up to so many bytes are handed over within the message. A larger one, if it is not in the loader's memory,
# goes to new shared memory, whose descriptor comes over a connection of its own: that takes both processes a
# millisecond, far longer than the message.
_BY_MESSAGE = 1 << 16


@dataclass(frozen=True)
class LoadedBatch:
    """What a loader delivers: a dataclass of tensors and other values."""

    bad: Sequence[str] = field(default=(), kw_only=True)  # "name: reason" of each sample that another replaced

    def __getstate__(self) -> dict[str, Any]:
        memory = _own_memory()
        return {name: _sent(value, memory) for name, value in vars(self).items()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        tensors = at_places({name: value for name, value in state.items() if isinstance(value, Place)})
        for name, value in state.items():
            vars(self)[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else tensors.get(name, value)

    def pin_memory(self) -> Self:
        """Move every tensor to page-locked memory (needs CUDA). torch's loader calls this in its pinning thread."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return dataclasses.replace(self, **pinned)


def new_pictures(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return uint8 tensors of any content for the pictures of a batch. A worker makes them in memory that the process
    which it works for can read: in its loader's if a slot is free, otherwise in new memory."""
    sizes = [math.prod(shape) for shape in shapes]
    worker, memory = get_worker_info(), _own_memory()
    if worker is None or not sum(sizes):
        return [torch.empty(shape, dtype=torch.uint8) for shape in shapes]
    slot = memory.take(worker.id, sum(sizes)) if memory else None
    if slot is not None:
        return [piece.view(shape) for piece, shape in zip(slot.split(sizes), shapes, strict=True)]
    try:
        storages = [torch.UntypedStorage._new_shared(size) for size in sizes]  # as torch does when it collates
    except RuntimeError as error:
        cannot_hand_over(worker.id, error, None)
    return [torch.empty(0, dtype=torch.uint8).set_(s).view(shape) for s, shape in zip(storages, shapes, strict=True)]


def _own_memory() -> PictureMemory | None:
    """The memory of the loader that this process works for, if it is a worker and the loader has one."""
    worker = get_worker_info()
    return getattr(worker.dataset, "memory", None) if worker else None


def _sent(value: Any, memory: PictureMemory | None) -> Any:
    """Return what the message has for a batch's value."""
    if not isinstance(value, Tensor):
        return value
    place = memory.place(value) if memory and value.nbytes else None
    return place or (value.numpy() if value.nbytes <= _BY_MESSAGE else value)


def cannot_hand_over(worker: int, error: Exception, batch: object) -> NoReturn:
    """End this worker: its batch would be awaited for ever."""
    reason = next(iter(str(error).splitlines()), "")
    print(f"data worker {worker}: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
    os._exit(errno.ENOSPC if os.strerror(errno.ENOSPC) in reason else 1)
