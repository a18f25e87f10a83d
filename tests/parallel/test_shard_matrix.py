"""Shards as columns of a matrix are DeepSpeed's own, bit for bit, in as many operations on few ranks as on many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from operations import Operations
from torch import Tensor

from megavtp.parallel import shard_matrix
from megavtp.parallel.deepspeed_adapter import import_deepspeed

RANKS = 3
# What the ranks divide evenly and what they do not; fewer elements than ranks, and one; a lone tensor of either kind.
BUCKETS = {
    "mixed": [(4, 6), (7,), (2,), (1,), (5, 5)],
    "even": [(3, 4), (9,)],
    "lone, even": [(3, 4)],
    "lone, uneven": [(10,)],
}


def bucket_of(shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def parameters_of(tensors: list[Tensor]) -> list[torch.nn.Parameter]:
    """Parameters that DeepSpeed has cut, of which this rank holds its shard."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    ranks, rank = dist.get_world_size(), dist.get_rank()
    parameters = []
    for index, tensor in enumerate(tensors):
        size = -(-tensor.numel() // ranks)
        padded = torch.cat([tensor.view(-1), torch.full((ranks * size - tensor.numel(),), torch.nan)])
        parameter = torch.nn.Parameter(torch.empty(0))
        parameter.ds_numel, parameter.ds_shape, parameter.ds_id = tensor.numel(), tensor.shape, index
        parameter.ds_tensor = padded.view(ranks, size)[rank].clone()
        parameter.ds_tensor.ds_numel = size
        parameter.ds_process_group, parameter.ds_status = dist.group.WORLD, ZeroParamStatus.NOT_AVAILABLE
        parameters.append(parameter)
    return parameters


class Found(NamedTuple):
    """What one rank has: its shards of the means by both ways, and the tensors that it gathered."""

    ours: list[Tensor]
    theirs: list[Tensor]
    gathered: list[Tensor]


def _of_a_rank(rank: int) -> dict[str, Found]:
    import_deepspeed().init_distributed(verbose=False)
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

    found = {}
    for name, shapes in BUCKETS.items():
        ways = (shard_matrix.reduce_scatter, reduce_scatter_coalesced)
        shards = [[shard.clone() for shard in way(bucket_of(shapes, rank), dist.group.WORLD)] for way in ways]
        parameters = parameters_of(bucket_of(shapes, 0))
        shard_matrix.begin_gather(reversed(parameters)).wait()
        found[name] = Found(*shards, [parameter.data.clone() for parameter in parameters])
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Found]]:
    return run_ranks(RANKS, _of_a_rank, timeout=120)


@pytest.mark.parametrize("name", BUCKETS)
def test_shards_of_means_are_deepspeeds(name: str, found: list[dict[str, Found]]) -> None:
    for rank, of_rank in enumerate(found):
        for shape, ours, theirs in zip(BUCKETS[name], of_rank[name].ours, of_rank[name].theirs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=f"{name}, rank {rank}, {shape}")
    means = [sum(parts) / RANKS for parts in zip(*(bucket_of(BUCKETS[name], r) for r in range(RANKS)), strict=True)]
    for index, mean in enumerate(means):
        whole = torch.cat([of_rank[name].ours[index] for of_rank in found])
        torch.testing.assert_close(whole, mean.view(-1))


@pytest.mark.parametrize("name", BUCKETS)
def test_a_gather_gives_the_whole_tensors(name: str, found: list[dict[str, Found]]) -> None:
    for of_rank in found:
        for whole, tensor in zip(of_rank[name].gathered, bucket_of(BUCKETS[name], 0), strict=True):
            torch.testing.assert_close(whole, tensor, rtol=0, atol=0)


@contextmanager
def world_of(ranks: int) -> Iterator[None]:
    from deepspeed import comm
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=ranks, store=FakeStore())

    def all_gather(output: Tensor, tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        return dist.all_gather_into_tensor(output, tensor, group=group, async_op=async_op)

    try:
        with patch.multiple(comm, reduce_scatter_fn=dist.reduce_scatter_tensor, allgather_fn=all_gather):
            yield
    finally:
        dist.destroy_process_group()


def test_operations_do_not_grow_with_the_ranks() -> None:
    import_deepspeed()
    counts: dict[str, list[int]] = {"gather": [], "reduce": []}
    for ranks in (4, 256):
        tensors = bucket_of([(64, 64), (64,), (300,)], 0)
        with world_of(ranks):
            parameters = parameters_of(tensors)
            with Operations() as operations:
                shard_matrix.begin_gather(parameters).wait()
            counts["gather"].append(operations.calls.total())
            with Operations() as operations:
                shard_matrix.reduce_scatter(tensors)
            counts["reduce"].append(operations.calls.total())
    for few, many in counts.values():
        assert abs(many - few) <= len(tensors), counts  # a tensor that the ranks do not divide evenly takes one more
        assert many < 15 * len(tensors)
