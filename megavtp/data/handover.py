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

# Tensors of up to so many bytes are handed over within the message. A larger one lies in shared memory, whose
# descriptor comes over a connection of its own: that takes both processes a millisecond, far longer than the message.
_BY_MESSAGE = 1 << 16


@dataclass(frozen=True)
class LoadedBatch:
    """What a loader delivers: a dataclass of tensors and other values."""

    bad: Sequence[str] = field(default=(), kw_only=True)  # "name: reason" of each sample that another replaced

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value.numpy() if isinstance(value, Tensor) and value.nbytes <= _BY_MESSAGE else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            vars(self)[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    def pin_memory(self) -> Self:
        """Move every tensor to page-locked memory (needs CUDA). torch's loader calls this in its pinning thread."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return dataclasses.replace(self, **pinned)


def blank_pictures(*shape: int) -> Tensor:
    """Return uint8 zeros. In a worker they are made in shared memory, to which they would be copied otherwise."""
    worker = get_worker_info()
    if worker is None or 0 in shape:
        return torch.zeros(shape, dtype=torch.uint8)
    try:
        storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch does when it collates
    except RuntimeError as error:
        cannot_hand_over(worker.id, error, None)
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def cannot_hand_over(worker: int, error: Exception, batch: object) -> NoReturn:
    """End this worker: its batch would be awaited for ever."""
    reason = next(iter(str(error).splitlines()), "")
    print(f"data worker {worker}: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
    os._exit(errno.ENOSPC if os.strerror(errno.ENOSPC) in reason else 1)
