"""What a computation does, what it makes, and what of that stays alive."""

from __future__ import annotations

import gc
import time
from collections import Counter, defaultdict
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They bring a number to the host, for which a GPU would have to be waited for. (Places, as of ``nonzero``, may be asked
# for on the host.)
HOST_READS = ("_local_scalar_dense", "is_nonzero", "equal")


class Operations(TorchDispatchMode):
    """Watches all operations inside.

    Attributes:
        calls: how often each ran.
        shapes: of all tensors that each returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.calls[name] += 1
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.shapes[name].append(tuple(tensor.shape))
                reference = StorageWeakRef(tensor.untyped_storage())
                self._storages.setdefault(reference.cdata, (reference, tensor.untyped_storage().nbytes()))
        return result

    @property
    def all_shapes(self) -> set[tuple[int, ...]]:
        return {shape for shapes in self.shapes.values() for shape in shapes}

    @property
    def host_reads(self) -> dict[str, int]:
        return {name: self.calls[name] for name in HOST_READS if self.calls[name]}

    @property
    def live_bytes(self) -> int:
        """Of all storages that were made inside."""
        return sum(size for reference, size in self._storages.values() if not reference.expired())

    def settled_bytes(self) -> int:
        """What is alive for good: gloo's threads let go of a tensor some moments after its collective has ended."""
        gc.collect()
        readings = []
        for _ in range(10):
            readings.append(self.live_bytes)
            time.sleep(0.01)
        return min(readings)
