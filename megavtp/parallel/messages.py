"""Messages between pipeline ranks during one pass: activations to the next stage, gradients to the one before."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavtp.parallel.collectives import broadcast_object
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.orders import Op
from megavtp.parallel.striping import ActivationSpec


class Messages:
    """The point-to-point traffic of one pass on this rank; a message is identified by the operation that needs it.

    Each ordered pair of ranks is a channel of its own on which messages come in the order in which the sender's order
    of operations makes them. So both sides know the sequence in advance, and a rank never waits for a send while
    computing. Messages never block an order of operations whose dependencies can all be met.

    Args:
        device: where messages are received; None with one pipeline rank, which gets none.
        orders: the operations of every pipeline rank, in order.
        stages: the number of stages of the pass.
        specs: gives the shapes and dtypes of the activations that enter a stage.
    """

    def __init__(
        self, mesh: Mesh, device: torch.device | None, orders: Sequence[Sequence[Op]], stages: int,
        specs: Callable[[int], list[ActivationSpec]],
    ):
        self._mesh, self._device, self._stages, self._specs = mesh, device, stages, specs
        self._expected = {
            source: deque(
                need for op in order if (need := op.along(1, stages)) and need.stage % mesh.pp == mesh.pp_rank
            )
            for source, order in enumerate(orders) if source != mesh.pp_rank
        }
        self._coming: dict[Op, tuple[list[Tensor], list[Any]]] = {}
        self._sent: deque[tuple[list[Tensor], list[Any]]] = deque()

    def _specs_at(self, op: Op) -> list[ActivationSpec]:
        """Return what ``op`` is sent: activations, or gradients like the activations that left its stage."""
        return self._specs(op.stage if op.kind == "F" else op.stage + 1)

    def post(self, op: Op) -> None:
        """Begin to receive what ``op`` needs, and what its sender sends before that."""
        sender = op.along(-1, self._stages)
        if sender is None:
            return
        source = sender.stage % self._mesh.pp
        group = _group(self._mesh, source, self._mesh.pp_rank)
        while op not in self._coming:
            message = self._expected[source].popleft()
            tensors = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in self._specs_at(message)]
            self._coming[message] = tensors, [dist.irecv(x, group=group, group_src=source) for x in tensors]

    def take(self, op: Op) -> list[Tensor]:
        """Return what ``op`` needs; on a GPU only the stream waits for it, not the host."""
        self.post(op)
        tensors, work = self._coming.pop(op, ([], []))  # the first stage's forward and the last's backward get none
        for one in work:
            one.wait()
        return tensors

    def send(self, op: Op, tensors: Sequence[Tensor]) -> None:
        """Send on what ``op`` has made, without waiting; its shapes must be those of ``specs``."""
        target = op.along(1, self._stages)
        assert target is not None, f"nobody waits for what {op} makes"
        specs = self._specs_at(target)
        made = [(tuple(x.shape), x.dtype) for x in tensors]
        assert made == list(specs), f"{op} makes {made}, its receiver expects {specs}"
        rank = target.stage % self._mesh.pp
        group = _group(self._mesh, self._mesh.pp_rank, rank)
        tensors = [x.detach().contiguous() for x in tensors]
        self._sent.append((tensors, [dist.isend(x, group=group, group_dst=rank) for x in tensors]))
        while self._sent and all(one.is_completed() for one in self._sent[0][1]):
            self._sent.popleft()  # the tensors of a send that is done may be freed

    def finish(self) -> None:
        """Wait until everything is sent."""
        for _, work in self._sent:
            for one in work:
                one.wait()
        self._sent.clear()


def _group(mesh: Mesh, source: int, target: int) -> dist.ProcessGroup:
    """Return the process group for messages from one pipeline rank to another."""
    group = mesh.pp_group if source < target else mesh.pp_down_group
    assert group is not None, "a message needs two pipeline ranks"
    return group


def connect(mesh: Mesh, device: torch.device) -> None:
    """Exchange one message between all neighbours of the ring of pipeline ranks, in the same order on all of them.

    NCCL makes the communicator of a pair of ranks at their first message, and there each waits for the other. In the
    middle of a schedule that could be for ever: a rank asks for a message long before the other can send it.
    """
    x = torch.zeros(1, device=device)
    for source in range(mesh.pp if mesh.pp > 1 else 0):
        for target in sorted({(source + 1) % mesh.pp, (source - 1) % mesh.pp}):
            if mesh.pp_rank == source:
                dist.send(x, group=_group(mesh, source, target), group_dst=target)
            elif mesh.pp_rank == target:
                dist.recv(x, group=_group(mesh, source, target), group_src=source)


def broadcast_last_stage(x: Tensor, mesh: Mesh) -> Tensor:
    """Return the last pipeline rank's ``x`` on all ranks; on the others ``x`` is overwritten."""
    if mesh.pp_group is not None:
        dist.broadcast(x, group=mesh.pp_group, group_src=mesh.pp - 1)
    return x


def broadcast_last_stage_object(value: Any, mesh: Mesh) -> Any:
    """Return the last pipeline rank's ``value`` (small, picklable) on all ranks."""
    return value if mesh.pp_group is None else broadcast_object(value, mesh.pp_group, mesh.pp - 1)
