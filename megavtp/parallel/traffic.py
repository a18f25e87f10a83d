"""The traffic between ranks as it really is, counted below our collectives, the pipeline and DeepSpeed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megavtp.parallel.mesh import Mesh

# torch.distributed ends in these operators, whichever of its functions was called. Each operation has the number of the
# argument that holds the whole payload, and its operators. A message counts where it is sent, not where it is received.
_OPS = {
    "all_reduce": (0, "allreduce_ allreduce_coalesced_"),
    "all_gather": (0, "allgather_ _allgather_base_ allgather_coalesced_ allgather_into_tensor_coalesced_"),
    "reduce_scatter": (1, "reduce_scatter_ _reduce_scatter_base_ reduce_scatter_tensor_coalesced_"),
    "broadcast": (0, "broadcast_"), "reduce": (0, "reduce_"), "all_to_all": (1, "alltoall_ alltoall_base_"),
    "gather": (1, "gather_"), "scatter": (0, "scatter_"), "send": (0, "send"),
}
_OPERATORS = {name: (op, payload) for op, (payload, names) in _OPS.items() for name in names.split()}
_SILENT = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_"}
# Each of these steps sends (n - 1) / n of the payload.
_RING_STEPS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


@dataclass(frozen=True)
class Transfer:
    """One call of this rank."""

    axis: str  # the mesh axis whose group it ran in; "world", or "other" for a group that is neither
    op: str  # a key of ``_OPS``
    bytes: int  # size of the payload: an all-gather's whole result, a reduce-scatter's whole input
    ranks: int  # size of the group

    @property
    def wire_bytes(self) -> float:
        """The bytes that one rank sends with ring algorithms; a call that has none sends its whole payload."""
        steps = _RING_STEPS.get(self.op)
        return float(self.bytes) if steps is None else steps * self.bytes * (self.ranks - 1) / self.ranks


class Traffic(list[Transfer]):
    """The transfers of a ``count_traffic`` block, in order."""

    def select(self, axis: str | None = None, op: str | None = None) -> "Traffic":
        return Traffic(t for t in self if axis in (None, t.axis) and op in (None, t.op))

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self)

    @property
    def sent(self) -> Counter[tuple[str, str]]:
        """Payload bytes by (axis, operation)."""
        found: Counter[tuple[str, str]] = Counter()
        for t in self:
            found[t.axis, t.op] += t.bytes
        return found

    @property
    def messages(self) -> Counter[tuple[str, str]]:
        """The number of calls by (axis, operation)."""
        return Counter((t.axis, t.op) for t in self)


@contextmanager
def count_traffic(mesh: Mesh) -> Iterator[Traffic]:
    """Record every transfer that this rank takes part in, the backward pass included. Slow: for tests and planning."""
    traffic = Traffic()
    with _Recorder(mesh, traffic):
        yield traffic


class _Recorder(TorchDispatchMode):
    def __init__(self, mesh: Mesh, traffic: Traffic):
        super().__init__()
        self.traffic = traffic
        named = [
            (mesh.tp_group, "tp"), (mesh.pp_group, "pp"), (mesh.pp_down_group, "pp"), (mesh.dp_group, "dp"),
            (mesh.mp_group, "mp"),
        ]
        self.axes = {group.group_name: axis for group, axis in named if group is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name not in _SILENT:
                self._record(name, args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: Sequence[Any]) -> None:
        assert name in _OPERATORS, f"traffic of c10d::{name} is not counted"
        op, payload = _OPERATORS[name]
        group = dist.ProcessGroup.unbox(next(x for x in args if isinstance(x, torch.ScriptObject)))
        axis = self.axes.get(group.group_name, "world" if group.size() == dist.get_world_size() else "other")
        self.traffic.append(Transfer(axis, op, sum(x.nbytes for x in tree_leaves(args[payload])), group.size()))
