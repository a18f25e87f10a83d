"""ZeRO-0 averages large gradients where they are, and only small ones together; a process alone averages nothing.

DeepSpeed copies all gradients into a bucket, sums it, and copies them back. That is once more the memory of the
gradients and two passes over it, also on a process that has nobody to sum with.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LARGE = 2**20  # elements from which a message costs more than its start


def reduce_in_place(engine: Any) -> None:
    """Let a ZeRO-0 engine average its gradients over the data-parallel ranks by ``average``."""

    def reduce(gradients: Sequence[Tensor], dp_group: dist.ProcessGroup, **_: Any) -> None:
        average(gradients, dp_group)

    engine.allreduce_no_retain = reduce


def average(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace ``tensors``, all of one dtype, by their means over the ranks of ``group``."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return
    torch._foreach_div_(list(tensors), ranks)
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors if tensor.numel() >= LARGE]
    if small := [tensor for tensor in tensors if tensor.numel() < LARGE]:
        together = torch.cat([tensor.reshape(-1) for tensor in small])
        dist.all_reduce(together, group=group)
        parts = together.split([tensor.numel() for tensor in small])
        torch._foreach_copy_(small, [part.view_as(tensor) for part, tensor in zip(parts, small, strict=True)])
    for work in works:
        work.wait()
