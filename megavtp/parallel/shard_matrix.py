"""ZeRO-3 gathers and reduces the parameters of a bucket as one matrix: a row for each rank, columns for each parameter.

DeepSpeed takes such a matrix apart, and puts it together, in a slice for each rank of each parameter. On 1,024 ranks
that is 16,000 slices for every gather of a block of 16 parameters, which the host cannot launch in the time in which a
GPU computes the block. By columns it is one copy for each parameter, whatever the number of ranks.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavtp.arithmetic import ceil_div


def gather_by_columns(parameters: Iterable[Any]) -> None:
    """Let DeepSpeed gather these of its ZeRO-3 parameters by ``begin_gather``."""
    for parameter in parameters:
        parameter.all_gather_coalesced = begin_gather


def reduce_by_columns() -> None:
    """Let the ZeRO-3 engines of this process reduce gradients by ``reduce_scatter``."""
    from deepspeed.runtime.zero import stage3

    stage3.reduce_scatter_coalesced = reduce_scatter


class Gather:
    """A gather of several parameters that is under way: a handle, as DeepSpeed calls it."""

    def __init__(self, work: Any, parameters: Sequence[Any], matrix: Tensor) -> None:
        self.work, self.parameters, self.matrix = work, parameters, matrix
        self.complete = False

    def wait(self) -> None:
        """Wait for the shards and give each parameter its whole tensor."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if self.complete:
            return
        self.work.wait()
        sizes = [parameter.ds_tensor.ds_numel for parameter in self.parameters]
        for parameter, columns in zip(self.parameters, self.matrix.split(sizes, dim=1), strict=True):
            parameter.data = columns.reshape(-1)[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        if self.matrix.is_cuda:
            self.matrix.record_stream(torch.cuda.current_stream())
        del self.matrix
        self.complete = True


class Alone:
    """What a gather is on a rank alone, whose shards are the whole tensors: nothing is copied."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        self.parameters = parameters

    def wait(self) -> None:
        """Give each parameter its tensor."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        for parameter in self.parameters:
            parameter.data = parameter.ds_tensor.data.view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self.parameters = ()


def begin_gather(parameters: Iterable[Any]) -> Gather | Alone:
    """Begin to gather parameters, none of which is gathered or under way yet, in an order that all ranks have."""
    from deepspeed import comm
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameters = sorted(parameters, key=lambda parameter: parameter.ds_id)
    for parameter in parameters:
        if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
            raise RuntimeError(f"a parameter is gathered twice: {parameter.ds_summary()}")
        parameter.ds_status = ZeroParamStatus.INFLIGHT
    group = parameters[0].ds_process_group
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if ranks == 1:
        return Alone(parameters)
    shards = [parameter.ds_tensor for parameter in parameters]
    matrix = shards[0].new_empty(ranks, sum(shard.ds_numel for shard in shards))
    torch.cat(shards, out=matrix[rank])
    work = comm.allgather_fn(matrix.view(-1), matrix[rank], group=group, async_op=True)
    return Gather(work, parameters, matrix)


def reduce_scatter(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return this rank's shards, flat, of the means of ``tensors`` over the ranks of ``group``.

    A lone tensor that the ranks divide evenly is overwritten. A rank alone gets the tensors themselves.
    """
    from deepspeed import comm

    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if ranks == 1:
        return [tensor.view(-1) for tensor in tensors]
    sizes = [ceil_div(tensor.numel(), ranks) for tensor in tensors]
    if len(tensors) == 1 and tensors[0].numel() == ranks * sizes[0]:
        matrix = tensors[0].view(ranks, sizes[0])
    else:
        matrix = tensors[0].new_empty(ranks, sum(sizes))
        for tensor, columns in zip(tensors, matrix.split(sizes, dim=1), strict=True):
            _fill(columns, tensor.view(-1))
    matrix /= ranks
    comm.reduce_scatter_fn(matrix[rank], matrix.view(-1), group=group)
    shards = zip(tensors, sizes, matrix[rank].split(sizes), strict=True)
    return [shard[: max(0, tensor.numel() - rank * size)] for tensor, size, shard in shards]


def _fill(columns: Tensor, flat: Tensor) -> None:
    """Write ``flat`` into ``columns`` row by row; what is left at their end stays as it is, and no one reads it."""
    rows, rest = divmod(flat.numel(), columns.shape[1])
    columns[:rows] = flat[: flat.numel() - rest].view(rows, -1)
    if rest:
        columns[rows, :rest] = flat[flat.numel() - rest :]
