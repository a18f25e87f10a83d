"""What a computation makes, and what of it stays alive."""

from __future__ import annotations

import gc
import time
from collections import Counter

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Every storage made inside, by weak reference, and how often each operator ran."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.storages.setdefault(reference.cdata, (reference, tensor.untyped_storage().nbytes()))
        return result

    def settled_bytes(self) -> int:
        """What is alive for good: gloo's threads let go of a tensor some moments after its collective has ended."""
        gc.collect()
        readings = []
        for _ in range(10):
            readings.append(self.live_bytes)
            time.sleep(0.01)
        return min(readings)

    @property
    def live_bytes(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())
