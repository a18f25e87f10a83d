"""Counted traffic is that of the calls made, each under its axis, in forward and backward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed import run_ranks

from megavtp.parallel.collectives import all_gather, all_reduce, copy_to_tp, gather_from_dp, reduce_from_tp
from megavtp.parallel.mesh import SINGLE, build_mesh
from megavtp.parallel.traffic import Transfer, count_traffic

ROW = 3 * 4  # bytes of one of the rows below
EXPECTED = [
    Transfer("dp", "all_reduce", 4 * ROW, 2),
    Transfer("tp", "all_gather", 8 * ROW, 2),
    Transfer("tp", "all_reduce", 4 * ROW, 2),  # forward of reduce_from_tp
    Transfer("dp", "all_gather", 4 * ROW, 2),  # in half precision: forward of gather_from_dp
    Transfer("tp", "all_reduce", 4 * ROW, 2),  # backward of copy_to_tp
    Transfer("pp", "send", 2 * ROW, 2),
    Transfer("world", "all_reduce", ROW, 8),
    Transfer("other", "broadcast", ROW, 4),
]


def on_rank(rank: int) -> list[Transfer]:
    mesh = build_mesh(2, 2)
    half_of_the_world = [dist.new_group(list(ranks)) for ranks in (range(4), range(4, 8))][rank // 4]
    x = torch.ones(4, 3)
    with count_traffic(mesh) as traffic:
        all_reduce(x, mesh, "dp")
        all_gather(x, mesh, "tp")
        y = reduce_from_tp(copy_to_tp(x.requires_grad_(), mesh), mesh)
        gather_from_dp(y.detach().half(), mesh)
        y.sum().backward()
        peer = dist.get_global_rank(mesh.pp_group, 1 - mesh.pp_rank)
        sent, received = torch.ones(2, 3), torch.empty(2, 3)
        calls = [
            dist.P2POp(dist.isend, sent, peer, mesh.pp_group), dist.P2POp(dist.irecv, received, peer, mesh.pp_group)
        ]
        for work in dist.batch_isend_irecv(calls):
            work.wait()
        dist.all_reduce(x.detach()[0].clone())
        dist.broadcast(x.detach()[0].clone(), rank // 4 * 4, group=half_of_the_world)
        dist.barrier()
    all_reduce(x, mesh, "dp")  # no longer counted
    return list(traffic)


def test_every_transfer_is_counted_once() -> None:
    assert all(found == EXPECTED for found in run_ranks(8, on_rank))


def test_totals() -> None:
    with count_traffic(SINGLE) as traffic:
        all_reduce(torch.ones(3), SINGLE, "dp")
    assert traffic == [] and traffic.bytes == 0
    traffic.extend(EXPECTED)
    assert traffic.select("tp", "all_reduce").bytes == 8 * ROW
    assert traffic.select("tp").bytes == 16 * ROW
    assert Transfer("tp", "all_reduce", 800, 4).wire_bytes == 1200
    assert Transfer("tp", "all_gather", 800, 4).wire_bytes == Transfer("tp", "reduce_scatter", 800, 4).wire_bytes == 600
    assert [transfer.wire_bytes for transfer in traffic.select("pp")] == [2 * ROW]
